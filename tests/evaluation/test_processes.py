"""Two processes that share a text give it the scores of a single process."""

import pickle
from pathlib import Path

import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from tiny import EOS, PAD, tiny_model
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from calm.evaluation.brier import evaluate_brier
from calm.evaluation.perplexity import evaluate_perplexity
from calm.evaluation.processes import batches_of_process
from calm.evaluation.scorers import scorer_of

WORLD_SIZE = 2


def blocks():
    """An odd number of batches, not all of the same size."""
    generator = torch.Generator().manual_seed(0)
    for rows in (4, 4, 1):
        tokens = torch.randint(3, 40, (rows, 24), generator=generator)
        yield {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(6).repeat(rows, 1)}


def score():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = {"eos_token_id": EOS, "pad_token_id": PAD}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    baseline = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).eval()
    models = [tiny_model(2), tiny_model(4), baseline]
    return [
        *(evaluate_brier(scorer_of(model), blocks(), seed=7, **settings) for model in models),
        evaluate_perplexity(baseline, blocks(), **settings),
        [index for index, _ in batches_of_process(blocks())],
    ]


def score_in_process(rank, folder):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD_SIZE
    )
    Path(folder, str(rank)).write_bytes(pickle.dumps(score()))
    distributed.destroy_process_group()


def figures_of(result):
    """All figures of a result by name, including those of its documents."""
    figures = dict(vars(result))
    if "documents" in figures:
        figures |= vars(figures.pop("documents"))
    return {name: torch.as_tensor(figure) for name, figure in figures.items()}


def test_two_processes_score_as_one(tmp_path):
    *alone, all_batches = score()
    multiprocessing.spawn(score_in_process, (str(tmp_path),), nprocs=WORLD_SIZE)
    shares = []
    for rank in range(WORLD_SIZE):
        *together, share = pickle.loads((tmp_path / str(rank)).read_bytes())
        shares.append(share)
        for expected, actual in zip(alone, together, strict=True):
            expected_figures, actual_figures = figures_of(expected), figures_of(actual)
            assert expected_figures.keys() == actual_figures.keys()
            for name, figure in expected_figures.items():
                assert_close(figure, actual_figures[name], rtol=1e-12, atol=0, equal_nan=True)
    assert shares == [[0, 2], [1]] and all_batches == [0, 1, 2]
