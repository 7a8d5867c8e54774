"""What is kept of drafts, against the distribution that the text must have."""

import pytest
import torch
from scipy import stats

from calm.core.speculative import Kept, keep_by_agreement, keep_by_ratio

P = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
Q = torch.tensor([[0.2, 0.2, 0.4, 0.2], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)


def drawn(p_V, generator):
    return int(torch.multinomial(p_V, 1, generator=generator))


def kept_of(rule, model_SV, draft_GV, number=10_000, fault=None):
    """(tokens kept, next token) of many independent drafts."""
    told_GV, residual_of = draft_GV, draft_GV.__getitem__
    if fault == "residual of another place":
        residual_of = draft_GV[1:].expand_as(draft_GV).__getitem__
    elif fault == "the model's own distribution instead of the residual":
        residual_of = (0 * draft_GV).__getitem__
    elif fault == "everything is kept":
        told_GV = 0 * draft_GV
    generator = torch.Generator().manual_seed(0)
    outcomes = []
    for _ in range(number):
        tokens = [drawn(q_V, generator) for q_V in draft_GV]
        if rule == "ratio":
            of_token = told_GV[range(len(tokens)), tokens]
            kept = keep_by_ratio(model_SV, tokens, of_token, residual_of, generator)
        else:
            kept = keep_by_agreement([drawn(p_V, generator) for p_V in model_SV], tokens)
        outcomes.append((*tokens[: kept.number], kept.next_token))
    return outcomes


def p_value(observed, expected):
    is_possible = expected > 0
    assert observed[~is_possible].sum() == 0
    expected = expected * observed.sum() / expected.sum()  # Sums that are equal but for rounding.
    return stats.chisquare(observed[is_possible], expected[is_possible]).pvalue


@pytest.mark.parametrize("rule", ["ratio", "agreement"])
def test_tokens_have_the_models_distribution(rule):
    outcomes = kept_of(rule, P, Q)
    first_V = torch.bincount(torch.tensor([one[0] for one in outcomes]), minlength=4)
    assert p_value(first_V, P[0] * len(outcomes)) > 1e-3
    # Where the first stays, the second has the model's distribution at the next place, whatever the first is.
    second = torch.tensor([one[1] for one in outcomes if len(one) > 1])
    assert p_value(torch.bincount(second, minlength=4), P[1] * len(second)) > 1e-3


@pytest.mark.parametrize(
    "fault",
    [
        "residual of another place",
        "the model's own distribution instead of the residual",
        "everything is kept",
    ],
)
def test_faults_would_be_seen(fault):
    outcomes = kept_of("ratio", P, Q, fault=fault)
    first_V = torch.bincount(torch.tensor([one[0] for one in outcomes]), minlength=4)
    assert (fault == "everything is kept" and first_V[3] > 0) or p_value(first_V, P[0]) < 1e-6


@pytest.mark.parametrize(
    ("rule", "share"), [("ratio", float(P[0].minimum(Q[0]).sum())), ("agreement", float(P[0] @ Q[0]))]
)
def test_as_many_stay_as_can(rule, share):
    outcomes = kept_of(rule, P, Q)
    stayed = sum(len(one) > 1 for one in outcomes) / len(outcomes)
    assert abs(stayed - share) < 4 * (share * (1 - share) / len(outcomes)) ** 0.5


def test_a_draft_like_the_model_stays_whole():
    outcomes = kept_of("ratio", P, P[:2], 500)
    assert all(len(one) == 3 for one in outcomes)


def test_the_impossible_is_never_kept():
    # A uniform number may be 0, and then is no less than a ratio of 0.
    model_SV, zero = torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.zeros(1)
    kept = keep_by_ratio(model_SV, [0], zero, lambda place: torch.tensor([0.0, 1.0]))
    assert kept == Kept(0, 1)


def test_tokens_that_the_model_lacks_are_refused_and_their_probability_is_made_up_for():
    # The draft has five tokens, the model four; it cannot read the fifth, so it has read one place only.
    draft_GV = torch.tensor([[0.1, 0.1, 0.3, 0.1, 0.4]], dtype=torch.float64)
    generator, firsts = torch.Generator().manual_seed(0), []
    for _ in range(10_000):
        token = drawn(draft_GV[0], generator)
        model_SV = P[:1] if token == 4 else P[:2]
        kept = keep_by_ratio(
            model_SV, [token], draft_GV[0, [token]], lambda place: draft_GV[place], generator
        )
        firsts.append(token if kept.number else kept.next_token)
    assert p_value(torch.bincount(torch.tensor(firsts), minlength=4), P[0] * len(firsts)) > 1e-3


def test_a_draft_with_fewer_tokens_than_the_model():
    draft_V = torch.tensor([0.5, 0.5])
    kept = keep_by_ratio(
        torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), [1], torch.tensor([0.5]), lambda place: draft_V
    )
    assert kept == Kept(0, 2)


def test_no_draft_is_an_ordinary_draw():
    assert keep_by_ratio(
        P[1:2] * 0 + torch.eye(4, dtype=torch.float64)[2], [], torch.empty(0), P.__getitem__
    ) == Kept(0, 2)
    assert keep_by_agreement([3], []) == Kept(0, 3)


def test_agreement_stops_at_the_first_that_differs():
    assert keep_by_agreement([5, 6, 7, 8], [5, 6, 9]) == Kept(2, 7)
    assert keep_by_agreement([5, 6, 7, 8], [5, 6, 7]) == Kept(3, 8)
    assert keep_by_agreement([5], [9]) == Kept(0, 5)  # The model could not read 9.


def test_the_same_seed_keeps_the_same():
    outcomes = [
        keep_by_ratio(P, [0, 1], Q[[0, 1], [0, 1]], Q.__getitem__, torch.Generator().manual_seed(seed))
        for seed in (1, 1)
    ]
    assert outcomes[0] == outcomes[1]
