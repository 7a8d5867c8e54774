"""Values that refactoring must not change: losses, gradients, texts, scores, a trained run.

    python tests/golden/values.py OUTPUT.json      # on this machine, to the bit
    python tests/golden/values.py OUTPUT.json BEFORE.json

With a second file every difference is printed, and there must be none. Other processors round differently, so
`test_golden.py` compares the numbers of `golden.json` with a tolerance and tokens as they are.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import load_file
from tiny import tiny_model
from toy import toy_recipe
from transformers import LlamaConfig, LlamaForCausalLM

from calm.data.stories import stories
from calm.evaluation.held_out import score_brier, score_perplexity
from calm.training.stages import train

HEADS: dict[str, dict[str, Any]] = {
    "energy": {"head_type": "energy"},
    "energy_integrated": {"head_type": "energy", "num_posterior_draws": 0},
    "flow": {"head_type": "flow"},
    "flow_heun": {"head_type": "flow", "solver": "heun", "num_steps": 3, "time_bins": 50},
    "diffusion": {"head_type": "diffusion"},
    "diffusion_ddim": {"head_type": "diffusion", "sampler": "ddim", "image_likelihood": True},
    "categorical_flow": {"head_type": "categorical_flow"},
    "sequential": {"head_type": "sequential"},
}
TAKES_TEMPERATURE = ("categorical_flow", "sequential")
PROMPTS = torch.tensor([[1, 7, 9, 11, 5, 21, 8], [0, 0, 0, 1, 9, 33, 12]])
MASK = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
IDS = torch.randint(3, 40, (3, 16), generator=torch.Generator().manual_seed(5))


def values_of_head(fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Loss, gradients and texts of a small model with a head."""
    torch.manual_seed(0)
    model = tiny_model(head_config=fields, **changes)
    model.train()
    loss = model(IDS, labels=IDS, generator=torch.Generator().manual_seed(1)).loss
    loss.backward()
    gradients = {
        name: float(weight.grad.double().norm())
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
    model.eval()
    values: dict[str, Any] = {"loss": float(loss.detach()), "gradients": gradients}
    hidden_PD = model.hidden_states_of_chunks(IDS)[:, 1]
    draws_NPK = model.draw_chunks(hidden_PD, 3, torch.Generator().manual_seed(2))
    values["draws"] = draws_NPK.tolist()
    for name, settings in _samplings(fields["head_type"]):
        output = model.generate(
            PROMPTS, attention_mask=MASK, max_new_tokens=14, seed=4, return_dict_in_generate=True, **settings
        )
        values[name] = output.sequences.tolist()
        values[f"{name}, draws"] = output.num_draws.tolist()
        values[f"{name}, agreement"] = output.agreement.tolist()
    return values


def _samplings(head_type: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "T = 1", {"temperature": 1.0}
    yield "T = 0.7, exact", {"temperature": 0.7, "sampler": "exact"}
    yield "T = 0.5, exact, short", {"temperature": 0.5, "sampler": "exact", "max_draws": 9}
    yield "T = 0.5, pool", {"temperature": 0.5, "sampler": "pool", "num_draws": 40}
    yield "T = 1, cut pool", {"temperature": 1.0, "sampler": "pool", "num_draws": 40, "top_p": 0.4}
    yield "T = 0, pool", {"temperature": 0.0, "sampler": "pool", "num_draws": 40}
    yield "T = 0.5", {"temperature": 0.5}
    if head_type in TAKES_TEMPERATURE:
        yield "T = 0.4, head", {"temperature": 0.4, "sampler": "head"}
    if head_type == "sequential":
        yield "T = 0", {"temperature": 0.0}


def values_of_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """The history of a training run, the norms of its weights, and hashes of its model folder."""
    text = folder / "stories.jsonl"
    text.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories(0, 12)))
    model_folder = train(toy_recipe(text, **changes), folder / "run")
    history = json.loads((folder / "run/history.json").read_text())
    weights = load_file(model_folder / "model.safetensors")
    prefixes = ("loss", "eval_", "grad_norm", "learning_rate", "step")
    return {
        "history": {
            stage: [
                {key: value for key, value in entry.items() if key.startswith(prefixes)} for entry in entries
            ]
            for stage, entries in history.items()
        },
        "weights": {name: float(weight.double().norm()) for name, weight in weights.items()},
        "bits of files": {
            file.name: hashlib.sha256(_without(file, str(folder))).hexdigest()
            for file in sorted(model_folder.iterdir())
            if file.name != "checksums.json"
        },
    }


def _without(file: Path, folder: str) -> bytes:
    return file.read_bytes().replace(folder.encode(), b"FOLDER")


def values_of_tokens() -> dict[str, Any]:
    """Scores of a small Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    return _scores(LlamaForCausalLM(config).eval())


def _scores(model: Any) -> dict[str, Any]:
    blocks = _Blocks()
    scores = {
        "best": score_brier(model, blocks).means,
        "draws": score_brier(model, blocks, num_draws=3, estimator="draws").means,
    }
    head = getattr(model, "head", None)
    if head is None or head.config.head_type == "sequential":
        scores["nats"] = score_perplexity(model, blocks).cross_entropy
    return {name: list(value) if isinstance(value, tuple) else value for name, value in scores.items()}


class _Blocks:
    """Two blocks of text, with the interface of a dataset."""

    def __init__(self) -> None:
        tokens = torch.randint(3, 40, (2, 16), generator=torch.Generator().manual_seed(8))
        tokens[0, 9:12] = torch.tensor([2, 0, 0])
        labels = tokens.masked_fill(tokens == 0, -100)
        labels[1, :2], tokens[1, :2] = -100, 0
        position_ids = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 3]])
        self._columns = {"input_ids": tokens, "labels": labels, "position_ids": position_ids}

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self._columns.items()}


def all_values(folder: Path) -> dict[str, Any]:
    """All values, by what they were computed from."""
    torch.set_num_threads(1)
    values = {name: values_of_head(fields) for name, fields in HEADS.items()}
    values["latents read"] = values_of_head(HEADS["energy"], backbone_input="latents")
    values["chunks of two"] = values_of_head(HEADS["flow"], chunk_size=2)
    for name in HEADS:
        torch.manual_seed(0)
        values[f"scores, {name}"] = _scores(tiny_model(head_config=HEADS[name]))
    values["scores, tokens"] = values_of_tokens()
    for name, changes in (("run", {}), ("baseline", {"model": "autoregressive", "chunk_size": 1})):
        (folder / name).mkdir()
        values[name] = values_of_run(folder / name, **changes)
    return values


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Where two sets of values are not the same to the bit."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from differences(before.get(key), after.get(key), f"{path} / {key}")
    elif before != after:
        yield f"{path}: {before} became {after}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        result = all_values(Path(temporary))
    Path(sys.argv[1]).write_text(json.dumps(result) + "\n")
    changed = (
        list(differences(json.loads(Path(sys.argv[2]).read_text()), json.loads(json.dumps(result))))
        if len(sys.argv) > 2
        else []
    )
    print("\n".join(changed) or "no difference")
    sys.exit(bool(changed))
