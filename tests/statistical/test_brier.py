"""BrierLM against a Markov chain whose Brier-n are known, and its standard errors by simulation."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from calm.core.brier import (
    DocumentSums,
    brier_lm,
    brier_lm_difference,
    brier_lm_error,
    brier_scores,
    brier_scores_of_draws,
    share_of_equal_pairs,
)
from calm.evaluation.brier import FromDraws, evaluate_brier
from calm.evaluation.steps import DrawScorer

# The chains of the model and of the text, over three tokens; the model is slightly wrong.
MODEL = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.25, 0.05, 0.7]], dtype=torch.float64)
TRUTH = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)


def stationary(chain_VV):
    return torch.linalg.matrix_power(chain_VV, 200)[0]


def sums_over_paths(max_order, first_VV, second_VV):
    """Mean over tokens of the text of the sum over paths of n tokens of both chains' probabilities.

    Products along paths are entries of powers of the elementwise product.
    """
    start_V, ones_V = stationary(TRUTH), torch.ones(3, dtype=torch.float64)
    power = torch.linalg.matrix_power
    return [float(start_V @ power(first_VV * second_VV, n) @ ones_V) for n in range(1, max_order + 1)]


def exact_means(max_order):
    """2 sum_y Q(y) P(y) - sum_x P(x)^2 for n tokens after a token of the text."""
    hits, collisions = sums_over_paths(max_order, TRUTH, MODEL), sums_over_paths(max_order, MODEL, MODEL)
    return [2 * hit - collision for hit, collision in zip(hits, collisions, strict=True)]


def walk(chain_VV, start, steps, generator):
    """Paths of a chain, (..., steps), after tokens of any shape."""
    path, token = [], start
    for _ in range(steps):
        distribution = chain_VV[token].reshape(-1, 3)
        token = torch.multinomial(distribution, 1, generator=generator).view(start.shape)
        path.append(token)
    return torch.stack(path, dim=-1)


def text_blocks(num_rows, num_tokens, chunk_size, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.multinomial(stationary(TRUTH).expand(num_rows, 3), 1, generator=generator).squeeze(1)
    tokens = walk(TRUTH, start, num_tokens, generator)
    position_ids = torch.arange(num_tokens // chunk_size).expand(num_rows, -1)
    return {"input_ids": tokens, "labels": tokens, "position_ids": position_ids}


class ChainSampler:
    """Draws whole chunks of a chain."""

    def __init__(self, chunk_size, chain_VV=MODEL):
        self.chunk_size, self.chain_VV = chunk_size, chain_VV

    def draw_next_chunks(self, block, is_target_BC, num_draws, generator):
        last_P = block["input_ids"].unflatten(1, (-1, self.chunk_size))[:, :-1, -1][is_target_BC]
        return walk(self.chain_VV, last_P.expand(num_draws, -1), self.chunk_size, generator)


class ChainReader:
    """The model's chain as a `Reader` whose outputs are the last tokens of units of fewer than four."""

    model = SimpleNamespace(dtype=torch.float32)

    def __init__(self, unit_size):
        self.unit_size = unit_size

    def new_cache(self):
        return None

    def read(self, tokens_BT, mask, position_BU, cache):
        return tokens_BT[:, self.unit_size - 1 :: self.unit_size].unsqueeze(-1)

    def draw(self, outputs_PX, num_draws, generator):
        return walk(MODEL, outputs_PX[:, 0].expand(num_draws, -1), self.unit_size, generator)


def scorer_of_chain(chunk_size):
    return FromDraws(ChainSampler(chunk_size)) if chunk_size >= 4 else DrawScorer(ChainReader(chunk_size))


@pytest.mark.parametrize("num_draws", [2, 5])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 6, 8])
def test_means_of_a_markov_chain_for_every_chunk_size(chunk_size, num_draws):
    scorer = scorer_of_chain(chunk_size)
    size = scorer.chunk_size
    blocks = [text_blocks(100, 40 * size, size, seed) for seed in range(5)]
    result = evaluate_brier(
        scorer, blocks, eos_token_id=None, pad_token_id=0, seed=chunk_size, num_draws=num_draws
    )
    assert result.num_chunks == 5 * 100 * 39
    for mean, error, exact in zip(result.means, result.errors, exact_means(size), strict=True):
        assert 0 < error < 0.01
        assert abs(mean - exact) < 3 * error
    assert result.hits == pytest.approx(sums_over_paths(size, TRUTH, MODEL), abs=0.01)
    assert result.collisions == pytest.approx(sums_over_paths(size, MODEL, MODEL), abs=0.01)
    assert abs(result.brier_lm - brier_lm(exact_means(4))) < 3 * result.brier_lm_error


@pytest.mark.parametrize("chunk_size", [2, 4])
def test_standard_errors_have_the_right_coverage(chunk_size):
    """In 400 repetitions the true value lies within 1.96 standard errors about 95% of the time."""
    scorer = scorer_of_chain(chunk_size)
    exact = torch.tensor(exact_means(4), dtype=torch.float64)
    covered, repetitions = torch.zeros(5), 400
    for repetition in range(repetitions):
        # Short documents: the scores of a document depend on each other.
        blocks = [text_blocks(60, 24, 4, 1000 + repetition)]
        result = evaluate_brier(scorer, blocks, eos_token_id=None, pad_token_id=0, seed=repetition)
        means, errors = torch.tensor(result.means), torch.tensor(result.errors)
        covered[:4] += (means - exact).abs() < 1.96 * errors
        covered[4] += abs(result.brier_lm - brier_lm(exact)) < 1.96 * result.brier_lm_error
    # Four standard deviations of the share of 400 draws with probability 0.95 are 0.044.
    assert (covered / repetitions).min() > 0.90
    assert (covered / repetitions).max() < 0.995


def test_error_of_a_difference_has_the_right_coverage_and_is_smaller():
    """The chain of the text against that of the model, on the same documents."""
    right, wrong = ChainSampler(4, TRUTH), ChainSampler(4)
    exact = torch.tensor(sums_over_paths(4, TRUTH, TRUTH), dtype=torch.float64)  # 2 hit - collision = hit.
    difference = brier_lm(exact) - brier_lm(exact_means(4))
    covered, ratios, repetitions = 0, [], 300
    for repetition in range(repetitions):
        blocks = [text_blocks(60, 24, 4, 5000 + repetition)]
        settings = {"eos_token_id": None, "pad_token_id": 0, "num_draws": 16}
        right_result, wrong_result = (
            evaluate_brier(FromDraws(sampler), blocks, seed=seed + 2 * repetition, **settings)
            for seed, sampler in enumerate((right, wrong))
        )
        measured, error = brier_lm_difference(right_result.documents, wrong_result.documents)
        assert measured == pytest.approx(right_result.brier_lm - wrong_result.brier_lm)
        covered += abs(measured - difference) < 1.96 * error
        ratios.append(error / math.hypot(right_result.brier_lm_error, wrong_result.brier_lm_error))
    assert 0.90 < covered / repetitions < 0.995
    assert max(ratios) < 0.95
    assert difference > 0


def test_difference_of_equal_undefined_and_incomparable_scores():
    generator = torch.Generator().manual_seed(2)
    scores, document = torch.rand(60, 4, generator=generator), torch.arange(60) // 3
    sums = DocumentSums.of_positions(scores, document)
    assert brier_lm_difference(sums, sums) == pytest.approx((0, 0), abs=1e-6)
    undefined = DocumentSums.of_positions(-scores, document)
    difference, error = brier_lm_difference(sums, undefined)
    assert difference == pytest.approx(brier_lm(sums.means_X)) and math.isnan(error)
    with pytest.raises(ValueError, match="only be compared on the same documents"):
        brier_lm_difference(sums, DocumentSums.of_positions(scores[:-1], document[:-1]))


def test_errors_take_the_documents_into_account():
    """If all scores of a document are equal, their number in a document does not lower the error."""
    generator = torch.Generator().manual_seed(0)
    once = torch.rand(50, 4, generator=generator, dtype=torch.float64)
    document = torch.arange(50)
    single = DocumentSums.of_positions(once, document)
    many = DocumentSums.of_positions(once.repeat_interleave(7, 0), document.repeat_interleave(7))
    assert_close(many.covariance_XX, single.covariance_XX)
    assert_close(single.covariance_XX.diagonal(), once.var(0) / 50)


def test_sums_of_parts_add_up():
    generator = torch.Generator().manual_seed(1)
    scores, document = torch.rand(90, 4, generator=generator), torch.arange(90) // 4
    expected = DocumentSums.of_positions(scores, document)
    # The cut at 42 splits a document, whose two parts have to be joined again.
    cuts = [(0, 42), (42, 60), (60, 90)]
    parts = [DocumentSums.of_positions(scores[a:b], document[a:b]) for a, b in cuts]
    actual = DocumentSums.concat(parts)
    for name, value in vars(expected).items():
        assert_close(getattr(actual, name), value)
    assert expected.num_positions == 90 and len(expected.count_D) == 23
    assert_close(expected.means_X, scores.double().mean(0))


def test_no_error_for_a_single_document_or_a_mean_of_zero():
    one = DocumentSums.of_positions(torch.rand(5, 4), torch.zeros(5, dtype=torch.long))
    assert one.covariance_XX.isnan().all()
    assert math.isnan(brier_lm_error(one.means_X, one.covariance_XX))
    assert math.isnan(brier_lm_error(torch.tensor([0.5, 0.2, 0.0, 0.1]), torch.eye(4)))


def test_error_of_brier_lm_follows_from_its_gradient():
    """The reference is the delta method with a gradient by finite differences."""
    means = torch.tensor([0.4, 0.2, 0.1, 0.05], dtype=torch.float64)
    factor = torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    covariance = factor @ factor.T * 1e-6
    steps = torch.eye(4, dtype=torch.float64) * 1e-6
    gradient = torch.tensor([(brier_lm(means + s) - brier_lm(means - s)) / 2e-6 for s in steps])
    assert brier_lm_error(means, covariance) == pytest.approx(
        float(gradient.double() @ covariance @ gradient.double()) ** 0.5, rel=1e-4
    )


def test_more_draws_average_all_pairs():
    """The U-statistic is the mean of the two-draw scores over all pairs of draws."""
    generator = torch.Generator().manual_seed(3)
    draws = torch.randint(2, (5, 30, 4), generator=generator)
    target = torch.randint(2, (30, 4), generator=generator)
    pairs = [brier_scores(draws[i], draws[j], target) for i in range(5) for j in range(i)]
    assert_close(brier_scores_of_draws(draws, target), torch.stack(pairs).mean(0))


def test_one_draw_is_too_few():
    with pytest.raises(ValueError, match="at least two draws, got 1"):
        share_of_equal_pairs(torch.zeros(1, 2, 4))
