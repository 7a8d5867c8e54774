"""BrierLM of samplers whose scores are known: uniform, perfect, collapsed; and what counts as an outcome."""

import datasets
import pytest
import torch
from torch.testing import assert_close

from calm.core.chunks import IGNORED_LABEL
from calm.data.chunking import make_blocks
from calm.errors import InputError
from calm.evaluation.brier import BrierResult, FromDraws, evaluate_brier
from calm.evaluation.held_out import batches_of

PAD, EOS = 0, 1


class Sampler:
    """A `ChunkSampler` made of a function of (next chunks (P, K), chunks before (P, K), generator)."""

    def __init__(self, draw, chunk_size=4):
        self.draw, self.chunk_size, self.calls = draw, chunk_size, []

    def draw_next_chunks(self, block, is_target_BC, num_draws, generator):
        chunks_BCK = block["input_ids"].unflatten(-1, (-1, self.chunk_size))
        target_PK, before_PK = chunks_BCK[:, 1:][is_target_BC], chunks_BCK[:, :-1][is_target_BC]
        self.calls.append((num_draws, target_PK))
        return torch.stack([self.draw(target_PK, before_PK, generator) for _ in range(num_draws)])


def perfect(target_PK, before_PK, generator):
    return target_PK


def block_of(*rows, chunk_size=4):
    """One document per row, without padding."""
    tokens = torch.tensor(rows)
    num_chunks = tokens.shape[1] // chunk_size
    return {
        "input_ids": tokens,
        "labels": tokens,
        "position_ids": torch.arange(num_chunks).repeat(len(tokens), 1),
    }


def evaluate(sampler, *blocks, eos_token_id=EOS, seed=0):
    return evaluate_brier(
        FromDraws(sampler),
        blocks,
        eos_token_id=eos_token_id,
        pad_token_id=PAD,
        seed=seed,
    )


def random_documents_in_blocks(num_documents=12):
    """Blocks in the layout of training: padding, several documents per block, some cut by a block's edge."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 30, (num_documents,), generator=generator).tolist()
    documents = [torch.randint(2, 5, (length,), generator=generator).tolist() for length in lengths]
    arrays = make_blocks(
        documents, list(range(num_documents)), chunk_size=4, block_size=24, eos_token_id=EOS, pad_token_id=PAD
    )
    return datasets.Dataset.from_dict(arrays).with_format("torch")


def test_uniform_sampler():
    """2 P(y) - sum P^2 = V^-n for the uniform distribution over V tokens, whatever the text is."""
    vocab, generator = 4, torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab, (400, 4 * 501), generator=generator)
    sampler = Sampler(lambda target, _, generator: torch.randint(vocab, target.shape, generator=generator))
    result = evaluate(sampler, block_of(*tokens.tolist()), eos_token_id=None)
    assert result.num_chunks == 400 * 500
    for order, mean in enumerate(result.means, 1):
        p = vocab**-order
        # The variance of a + b - c for pairwise independent indicators of probability p, where abc = ab.
        assert abs(mean - p) < 4 * (3 * p * (1 - p) / result.num_chunks) ** 0.5


def test_perfect_sampler():
    result = evaluate(Sampler(perfect), block_of([5, 6, 7, 8] * 3, [9] * 12))
    assert result.means == (1.0, 1.0, 1.0, 1.0)
    assert result.brier_lm == pytest.approx(100)
    assert (result.num_chunks, result.context) == (4, 12)


def test_collapsed_sampler():
    """Always the same wrong chunk: -1 at every order, and no bogus score from a product of negatives."""
    result = evaluate(Sampler(lambda target, *_: torch.full_like(target, 99)), block_of([5, 6, 7, 8] * 3))
    assert result.means == (-1.0, -1.0, -1.0, -1.0)
    assert result.brier_lm == 0.0


def test_wrong_from_the_third_token():
    sampler = Sampler(lambda target, *_: target.index_fill(-1, torch.tensor([2]), 99))
    result = evaluate(sampler, block_of([5, 6, 7, 8] * 3))
    assert result.means == (1.0, 1.0, -1.0, -1.0)
    assert result.brier_lm == 0.0


def test_right_in_three_of_four_chunks():
    """A deterministic sampler that is right for a share s of the chunks scores 2 s - 1."""
    text = [5, 5, 5, 5] * 4 + [6, 6, 6, 6]
    result = evaluate(Sampler(lambda target, *_: torch.full_like(target, 5)), block_of(text))
    assert result.means == (0.5, 0.5, 0.5, 0.5)
    assert result.brier_lm == pytest.approx(50)
    assert result.as_metrics() == pytest.approx(
        {"brier_lm": 50, "brier_1": 50, "brier_2": 50, "brier_3": 50, "brier_4": 50}
    )


def test_long_chunks_have_more_orders_but_the_same_brier_lm():
    sampler = Sampler(lambda target, *_: target.index_fill(-1, torch.tensor([5]), 99), chunk_size=6)
    result = evaluate(sampler, block_of([5] * 18, chunk_size=6))
    assert result.means == (1.0, 1.0, 1.0, 1.0, 1.0, -1.0)
    assert result.brier_lm == pytest.approx(100)
    assert list(result.as_metrics()) == ["brier_lm", "brier_1", "brier_2", "brier_3", "brier_4"]


def test_sampler_is_asked_for_two_draws_of_each_target():
    """Targets are the chunks 1..C-1 with a label that do not start a document, in order."""
    X = IGNORED_LABEL
    block = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 7, 8, 9, EOS, 0, 5, 5, 5, 6, EOS, 0, 0, 0, 0, 0, 0]]),
        "labels": torch.tensor([[X, X, 5, 6, 7, 8, 9, EOS, X, 5, 5, 5, 6, EOS, X, X, X, X, X, X]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 0]]),
    }
    sampler = Sampler(perfect)
    assert evaluate(sampler, block).num_chunks == 2
    ((num_draws, target_PK),) = sampler.calls
    assert num_draws == 2
    assert target_PK.tolist() == [[7, 8, 9, EOS], [6, EOS, 0, 0]]


@pytest.mark.parametrize("eos_token_id", [EOS, [EOS, 77]])
def test_tokens_after_eos_do_not_matter(eos_token_id):
    """Neither in the text nor in the draws, even if the two draws differ there."""
    block = block_of([5, 6, 7, 8, 5, EOS, 9, 9], [5, 6, 7, 8, EOS, 7, 7, 7])

    def draw(target, before, generator):
        is_after_eos = (target == EOS).long().cumsum(-1) - (target == EOS).long() > 0
        return torch.where(is_after_eos, torch.randint(50, 1000, target.shape, generator=generator), target)

    assert evaluate(Sampler(draw), block, eos_token_id=eos_token_id).means == (1.0, 1.0, 1.0, 1.0)
    # If nothing ends a text, random tokens count: from order 3 in the first target, order 2 in the second.
    assert evaluate(Sampler(draw), block, eos_token_id=None).means == (1.0, 0.5, 0.0, 0.0)


def test_position_of_eos_matters():
    """A draw that ends where the text goes on is wrong, and padding alone does not end a text."""
    block = block_of([5, 6, 7, 8, 5, EOS, PAD, PAD])
    early = evaluate(Sampler(lambda target, *_: torch.tensor([[EOS, 5, EOS, 0]])), block)
    assert early.means == (-1.0, -1.0, -1.0, -1.0)
    endless = evaluate(Sampler(lambda target, *_: torch.tensor([[5, PAD, PAD, PAD]])), block)
    assert endless.means == (1.0, -1.0, -1.0, -1.0)


def test_any_of_several_eos_ids_ends_a_text():
    block = block_of([5, 6, 7, 8, 5, 77, 9, 9])
    sampler = Sampler(lambda target, *_: torch.tensor([[5, 77, 3, 2]]))
    assert evaluate(sampler, block, eos_token_id=[EOS, 77]).means == (1.0, 1.0, 1.0, 1.0)
    assert evaluate(sampler, block, eos_token_id=EOS).means == (1.0, 1.0, -1.0, -1.0)


def test_batching_of_blocks_does_not_change_the_result():
    """For a deterministic sampler, which repeats the previous chunk but for its last token."""
    blocks = random_documents_in_blocks()
    sampler = Sampler(lambda target, before, _: torch.cat([before[:, :3], before[:, 3:] % 3 + 2], dim=-1))
    num_blocks = len(blocks)
    assert num_blocks > 4
    alone = evaluate(sampler, *(blocks[i : i + 1] for i in range(num_blocks)))
    for result in (evaluate(sampler, blocks[:]), evaluate(sampler, blocks[:3], blocks[3:])):
        assert (result.means, result.num_chunks) == (alone.means, alone.num_chunks)
        assert result.errors == pytest.approx(alone.errors, rel=1e-9)
    assert -1 < alone.means[0] < 1 and alone.num_chunks > 20
    in_reverse = evaluate(sampler, *(blocks[i : i + 1] for i in reversed(range(num_blocks))))
    assert_close(torch.tensor(in_reverse.means), torch.tensor(alone.means))


def test_batch_without_targets_is_skipped():
    empty = {
        "input_ids": torch.zeros(1, 8, dtype=torch.long),
        "labels": torch.full((1, 8), IGNORED_LABEL),
        "position_ids": torch.tensor([[0, 0]]),
    }
    block = block_of([5, 6, 7, 8] * 2)
    sampler = Sampler(perfect)
    result = evaluate(sampler, empty, block, empty)
    assert (result.means, result.num_chunks, result.context) == ((1.0, 1.0, 1.0, 1.0), 1, 8)
    assert len(sampler.calls) == 1


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_short_chunks_are_refused(chunk_size):
    with pytest.raises(
        InputError, match=f"at least 4 tokens, but this sampler draws only {chunk_size} at a time"
    ):
        evaluate(Sampler(perfect, chunk_size), block_of([5] * 12, chunk_size=chunk_size))


def test_text_without_a_target_is_refused():
    starts_only = block_of([5, 6, 7, 8] * 2) | {"position_ids": torch.tensor([[0, 0]])}
    for blocks in ([], [starts_only]):
        with pytest.raises(InputError, match="no chunk to score"):
            evaluate(Sampler(perfect), *blocks)


def test_brier_lm_needs_four_orders():
    with pytest.raises(ValueError, match="4 orders"):
        _ = BrierResult((1.0, 1.0, 1.0), 1, 8).brier_lm


@pytest.mark.parametrize(("num_blocks", "expected"), [(None, 20), (3, 3), (8, 8), (17, 17), (99, 20)])
def test_batches_hold_the_first_blocks_in_order(num_blocks, expected):
    blocks = datasets.Dataset.from_dict({"input_ids": [[i] * 8 for i in range(20)]}).with_format("torch")
    batches = list(batches_of(blocks, num_blocks))
    assert torch.cat([batch["input_ids"] for batch in batches])[:, 0].tolist() == list(range(expected))
    assert max(len(batch["input_ids"]) for batch in batches) <= 8


def test_document_in_two_batches_counts_as_one_document():
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 8, (4, 12), generator=generator) for _ in range(2)]
    blocks = [block_of(*text.tolist()) for text in texts]
    for block in blocks:
        block["document_ids"] = torch.arange(4).unsqueeze(-1).expand(4, 3)

    def score(blocks):
        return evaluate(Sampler(lambda target, *_: torch.full_like(target, 5)), *blocks)

    one_batch = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    assert score(blocks).errors == pytest.approx(score([one_batch]).errors)
    as_other_documents = [
        block | {"document_ids": block["document_ids"] + 4 * i} for i, block in enumerate(blocks)
    ]
    assert score(as_other_documents).means == score(blocks).means
    assert score(as_other_documents).errors != pytest.approx(score(blocks).errors)
