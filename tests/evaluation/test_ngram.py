"""The n-gram floor: draws follow Witten-Bell probabilities computed by hand; contexts stay in a document."""

import math
from itertools import product

import pytest
import torch

from calm.core.chunks import IGNORED_LABEL
from calm.data.chunking import make_blocks
from calm.evaluation.brier import FromDraws, evaluate_brier
from calm.evaluation.ngram import NGramCounts, NGramSampler
from calm.evaluation.perplexity import evaluate_ngram_perplexity

EOS, A, B, C, PAD = range(5)
NO_TOKEN, UNKNOWN = -1, PAD  # The text never holds the padding id, so a context with it is unknown.
# With EOS: a b $, a b $, a c $, b $. Tokens: 3 a, 3 b, 1 c, 4 $ (11 in all, 4 distinct).
DOCUMENTS = [[A, B], [A, B], [A, C], [B]]
DRAWS = 40_000

# P = trust * counted share + (1 - trust) * distribution of the shorter context; trust = N / (N + D).
# Probabilities are of $ a b c pad, in this order.
UNIFORM = torch.full((5,), 1 / 5, dtype=torch.float64)
UNIGRAM = 11 / 15 * torch.tensor([4, 3, 3, 1, 0], dtype=torch.float64) / 11 + 4 / 15 * UNIFORM
AFTER_A = 3 / 5 * torch.tensor([0, 0, 2, 1, 0], dtype=torch.float64) / 3 + 2 / 5 * UNIGRAM  # b twice, c once.
AFTER_B = 3 / 4 * torch.tensor([1, 0, 0, 0, 0], dtype=torch.float64) + 1 / 4 * UNIGRAM  # $ three times.
AFTER_C = 1 / 2 * torch.tensor([1, 0, 0, 0, 0], dtype=torch.float64) + 1 / 2 * UNIGRAM  # $ once.
AFTER_AB = 2 / 3 * torch.tensor([1, 0, 0, 0, 0], dtype=torch.float64) + 1 / 3 * AFTER_B  # $ twice.
AFTER_AC = 1 / 2 * torch.tensor([1, 0, 0, 0, 0], dtype=torch.float64) + 1 / 2 * AFTER_C  # $ once.


def sampler_of(documents=None, order=3, chunk_size=4, vocab_size=5, counted_order=None):
    ended = [[*document, EOS] for document in (DOCUMENTS if documents is None else documents)]
    stream = torch.tensor([token for document in ended for token in document])
    lengths = torch.tensor([len(document) for document in ended])
    return NGramSampler(
        NGramCounts(
            stream, lengths, order=order if counted_order is None else counted_order, vocab_size=vocab_size
        ),
        order=order,
        eos_token_id=EOS,
        pad_token_id=PAD,
        chunk_size=chunk_size,
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def agree(count, probability, num):
    """Whether a count lies within 4 standard errors (plus 1, for probabilities near 0)."""
    return abs(count - num * probability) <= 4 * (num * probability * (1 - probability)) ** 0.5 + 1


def block_of(tokens, labels, position_ids):
    return {
        "input_ids": torch.tensor(tokens),
        "labels": torch.tensor(labels),
        "position_ids": torch.tensor(position_ids),
    }


def test_distributions_by_hand():
    """The distributions above, once more as fractions over one denominator."""
    assert (75 * UNIGRAM).tolist() == pytest.approx([24, 19, 19, 9, 4])
    assert (375 * AFTER_A).tolist() == pytest.approx([48, 38, 188, 93, 8])
    assert (300 * AFTER_B).tolist() == pytest.approx([249, 19, 19, 9, 4])
    assert (900 * AFTER_AB).tolist() == pytest.approx([849, 19, 19, 9, 4])


CASES = {
    "known": (3, [A, B], AFTER_AB),
    "known, seen once": (3, [A, C], AFTER_AC),
    "longer context unknown": (3, [B, A], AFTER_A),
    "start of a document": (3, [NO_TOKEN, B], AFTER_B),
    "a context of another document": (3, [EOS, B], AFTER_B),
    "after the end, where the next document begins": (3, [B, EOS], UNIGRAM),
    "nothing before": (3, [NO_TOKEN, NO_TOKEN], UNIGRAM),
    "unknown token": (3, [A, UNKNOWN], UNIGRAM),
    "unknown token before a known one": (3, [UNKNOWN, A], AFTER_A),
    "bigram": (2, [A], AFTER_A),
    "bigram, nothing before": (2, [NO_TOKEN], UNIGRAM),
    "unigram": (1, [], UNIGRAM),
}


@pytest.mark.parametrize(("order", "history", "distribution"), CASES.values(), ids=CASES)
def test_draws_follow_the_distribution(order, history, distribution):
    history_PH = torch.tensor(history, dtype=torch.long).repeat(DRAWS, 1)
    tokens = sampler_of(order=order).draw_tokens(history_PH, generator())
    for token, count in enumerate(torch.bincount(tokens, minlength=5).tolist()):
        assert agree(count, float(distribution[token]), DRAWS), (
            token,
            count / DRAWS,
            float(distribution[token]),
        )


@pytest.mark.parametrize(("order", "history", "distribution"), CASES.values(), ids=CASES)
def test_probabilities_equal_the_distribution(order, history, distribution):
    history_PH = torch.tensor(history, dtype=torch.long).repeat(5, 1)
    actual = sampler_of(order=order).probability(history_PH, torch.arange(5))
    torch.testing.assert_close(actual, distribution, atol=1e-7, rtol=0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_counts_of_a_higher_order_give_the_same_model(order):
    history_PH = torch.tensor([[A, B], [B, A], [NO_TOKEN, A]])[:, 3 - order :]
    models = sampler_of(order=order), sampler_of(order=order, counted_order=5)
    first, second = (model.probability(history_PH, torch.tensor([EOS, B, C])) for model in models)
    assert first.tolist() == second.tolist()
    first, second = (model.draw_tokens(history_PH.repeat(50, 1), generator()) for model in models)
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize("order", [1, 2, 5])
def test_probabilities_of_all_tokens_add_up_to_one(order):
    documents = torch.randint(1, 9, (20, 30), generator=generator()).tolist()
    sampler = sampler_of(documents, order=order, vocab_size=9)
    history_PH = torch.randint(-1, 9, (50, order - 1), generator=generator(1))
    probabilities = [sampler.probability(history_PH, torch.full((50,), token)) for token in range(9)]
    torch.testing.assert_close(torch.stack(probabilities).sum(0), torch.ones(50, dtype=torch.float64))
    assert min(map(torch.min, probabilities)) > 0


@pytest.mark.parametrize("order", [1, 3, 9])
def test_log_probability_of_a_text_is_the_sum_over_its_tokens(order):
    """Also of the first tokens, which have less context than the order allows."""
    sampler = sampler_of(order=order)
    expected = (
        [UNIGRAM[A], AFTER_A[B], AFTER_AB[EOS]] if order > 1 else [UNIGRAM[A], UNIGRAM[B], UNIGRAM[EOS]]
    )
    for first in range(4):
        nats = -sum(math.log(float(p)) for p in expected[first:])
        assert sampler.log_probability([A, B, EOS], first) == pytest.approx(-nats, abs=1e-6)
    assert sampler.log_probability([]) == 0


def test_perplexity_of_a_text_by_hand():
    """In chunks of two: [b a], the first, is not scored; then [b $] after "a"."""
    block = block_of([[B, A, B, EOS]], [[B, A, B, EOS]], [[0, 1]])
    result = evaluate_ngram_perplexity(sampler_of(chunk_size=2), [block])
    after_ab = float(AFTER_AB[EOS])
    assert result.num_tokens == 2
    assert result.cross_entropy == pytest.approx(
        -(float(AFTER_A[B].log()) + math.log(after_ab)) / 2, abs=1e-6
    )


def test_perplexity_ignores_what_follows_eos():
    block = block_of([[B, A, A, EOS, PAD, PAD]], [[B, A, A, EOS, -100, -100]], [[0, 1]])
    result = evaluate_ngram_perplexity(sampler_of(order=1, chunk_size=3), [block])
    assert result.num_tokens == 1
    assert result.cross_entropy == pytest.approx(-math.log(float(UNIGRAM[EOS])), abs=1e-6)


def test_start_of_a_document_is_not_the_last_token_of_the_vocabulary():
    """A token id of -1 must not yield the packed key of another context."""
    sampler = sampler_of([[B, A]] * 40, order=3, vocab_size=3)
    tokens = sampler.draw_tokens(torch.tensor([[NO_TOKEN, B]]).repeat(DRAWS, 1), generator())
    assert agree(int((tokens == A).sum()), 40 / 41 + 1 / 41 / 3, DRAWS)


def test_contexts_in_one_batch_do_not_mix():
    """Each row follows its own distribution, even with known and unknown contexts side by side."""
    cases = [(history, distribution) for order, history, distribution in CASES.values() if order == 3]
    history_PH = torch.tensor([history for history, _ in cases]).repeat(DRAWS // 4, 1)
    tokens = sampler_of().draw_tokens(history_PH, generator(1)).view(-1, len(cases))
    for column, (_, distribution) in enumerate(cases):
        for token, count in enumerate(torch.bincount(tokens[:, column], minlength=5).tolist()):
            assert agree(count, float(distribution[token]), DRAWS // 4)


def test_chunks_follow_the_product_of_the_distributions():
    """Bigram chunks of two after "a": P(x) P(y | x), and always padding after EOS."""
    after = {A: AFTER_A, B: AFTER_B, C: AFTER_C, PAD: UNIGRAM, EOS: torch.eye(5)[PAD]}
    distribution = {(x, y): float(AFTER_A[x] * after[x][y]) for x, y in product(range(5), repeat=2)}
    assert sum(distribution.values()) == pytest.approx(1)
    block = block_of([[B, A, A, A]], [[B, A, A, A]], [[0, 1]])
    sampler = sampler_of(order=2, chunk_size=2)
    draws = sampler.draw_next_chunks(block, torch.tensor([[True]]), DRAWS, generator())
    assert draws.shape == (DRAWS, 1, 2)
    counts = torch.bincount(draws[:, 0, 0] * 5 + draws[:, 0, 1], minlength=25).view(5, 5)
    for (x, y), probability in distribution.items():
        assert agree(int(counts[x, y]), probability, DRAWS), (x, y)


def test_only_padding_follows_eos():
    block = block_of([[A, B, A, C, A, A, A, A]], [[A, B, A, C, A, A, A, A]], [[0, 1]])
    draws = sampler_of().draw_next_chunks(block, torch.tensor([[True]]), 2000, generator())[:, 0]
    after = (draws == EOS).long().cumsum(-1) - (draws == EOS).long() > 0
    assert after.sum() > 1000 and (draws[after] == PAD).all()
    assert (draws[~after] != PAD).sum() > 1000


@pytest.mark.parametrize("order", [1, 2, 4, 6, 11])
def test_histories_stay_in_the_document(order):
    """Padding, other documents and other blocks are not part of the context."""
    X = IGNORED_LABEL
    block = block_of(
        [
            [0, 0, 0, 5, 6, 7, 8, 9, 10, 1, 0, 0, 0, 0, 11, 12, 13, 14, 1, 0],
            [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 1, 0, 0, 0, 0, 0, 0, 0],
        ],
        [
            [X, X, X, 5, 6, 7, 8, 9, 10, 1, X, X, X, X, 11, 12, 13, 14, 1, X],
            [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 1, X, X, X, X, X, X, X],
        ],
        [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]],
    )
    is_target = torch.tensor([[True, True, False, True], [True, True, True, False]])
    sampler = sampler_of([[5, 6, 7]], order=order, vocab_size=20)
    histories = []

    def draw_tokens(history_PH, generator):
        histories.append(history_PH)
        return torch.full((len(history_PH),), 15)

    sampler.draw_tokens = draw_tokens
    draws = sampler.draw_next_chunks(block, is_target, 2, generator())
    assert draws.tolist() == [[[15] * 4] * 6] * 2
    before = [[5], [5, 6, 7, 8, 9], [11, 12], [5, 6, 7, 8], [5, 6, 7, 8, 9, 5, 6, 7]]
    before.append([*before[-1], 8, 9, 5, 6])
    # Histories of all targets, once per draw; at each step with the tokens drawn before it.
    for step, history_PH in enumerate(histories):
        padded = [[NO_TOKEN] * 11 + history + [15] * step for history in before]
        expected = [history[len(history) - (order - 1) :] for history in padded]
        assert history_PH.tolist() == expected * 2


def test_packed_documents_are_one_context():
    """EOS is part of the context, so the text before it is never mistaken for the same document's."""
    arrays = make_blocks(
        [[A, B], [A, B], [A, C]],
        [0, 1, 2],
        chunk_size=4,
        block_size=8,
        eos_token_id=EOS,
        pad_token_id=PAD,
        layout="packed",
    )
    block = {name: torch.from_numpy(array) for name, array in arrays.items()}
    sampler, histories = sampler_of(), []
    sampler.draw_tokens = lambda history, _: (
        histories.append(history) or torch.zeros(len(history), dtype=torch.long)
    )
    sampler.draw_next_chunks(block, torch.tensor([[True], [False]]), 1, generator())
    assert histories[0].tolist() == [[EOS, A]]


def test_draws_are_independent_and_repeatable():
    block = block_of([[A, A, A, A] * 500], [[A, A, A, A] * 500], [list(range(500))])
    is_target = torch.ones(1, 499, dtype=torch.bool)
    first = sampler_of().draw_next_chunks(block, is_target, 2, generator(3))
    assert torch.equal(first, sampler_of().draw_next_chunks(block, is_target, 2, generator(3)))
    assert not torch.equal(first, sampler_of().draw_next_chunks(block, is_target, 2, generator(4)))
    num_equal = int((first[0, :, 0] == first[1, :, 0]).sum())
    assert agree(num_equal, float(AFTER_A.square().sum()), 499)


def score(documents, order, text):
    """Brier scores of a model of `documents` on one long text of whole chunks."""
    block = block_of([text], [text], [list(range(len(text) // 4))])
    return evaluate_brier(
        FromDraws(sampler_of(documents, order)), [block], eos_token_id=EOS, pad_token_id=PAD, seed=0
    )


def test_higher_order_predicts_a_cycle_up_to_smoothing():
    """Either "a" or "b" follows "a"; two tokens of context decide which, but for 1 / (N + 1) of smoothing."""
    cycle = [A, A, B] * 400
    trigram, bigram = score([cycle], 3, cycle), score([cycle], 2, cycle)
    assert min(trigram.means) > 0.97 and trigram.brier_lm > 97
    assert bigram.brier_lm < 60
    assert score([cycle], 5, cycle).brier_lm > 97
    # Right with probability 400/401, plus what the shorter contexts contribute.
    history = torch.tensor([[A, A]]).repeat(DRAWS, 1)
    wrong = int((sampler_of([cycle], 3).draw_tokens(history, generator()) != B).sum())
    assert 0 < wrong < 2 * DRAWS / 401


def test_confident_model_of_another_text_scores_0():
    assert score([[A, A, B] * 400], 3, [C, C, B, A] * 100).brier_lm == 0


def test_order_longer_than_every_document():
    """Contexts longer than any document are unknown, and shorter ones decide."""
    sampler = sampler_of(order=6)
    tokens = sampler.draw_tokens(torch.tensor([[B, A, B, A, B]]).repeat(DRAWS, 1), generator())
    assert agree(int((tokens == EOS).sum()), float(AFTER_AB[EOS]), DRAWS)


def test_empty_documents():
    """Only their EOS is counted."""
    tokens = sampler_of([[], []], order=1).draw_tokens(torch.zeros(DRAWS, 0, dtype=torch.long), generator())
    assert agree(int((tokens == EOS).sum()), 2 / 3 + 1 / 3 / 5, DRAWS)
