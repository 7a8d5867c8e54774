"""What is accepted of drafts, against the distribution that the text must have."""

import pytest
import torch
from enumeration import OutcomeEnumerator, distribution_of_outcomes, draws_without_replacement, largest_error
from scipy import stats

from calm.core import speculative
from calm.core.branches import TEXT, Branches
from calm.core.speculative import (
    Accepted,
    Residual,
    accept_by_match,
    accept_by_ratio,
    draw_distinct,
    draw_token,
)


def of_text(tokens):
    """Distributions of three tokens after others: the model's, and a draft's that has one token more."""
    seed = 1 + sum((token + 1) * 7**place for place, token in enumerate(tokens))
    generator = torch.Generator().manual_seed(seed)
    p_V, q_V = (torch.rand(size, generator=generator, dtype=torch.float64) ** 2 for size in (3, 4))
    p_V[seed % 3] *= seed % 2  # Now and then one is impossible,
    q_V[(seed + 1) % 4] *= seed % 5 > 0  # or cannot be drafted.
    return p_V / p_V.sum(), q_V / q_V.sum()


P = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
Q = torch.tensor([0.2, 0.2, 0.4, 0.2], dtype=torch.float64)


def p_value(observed, expected):
    observed, expected = observed.double(), expected.double()
    is_possible = expected > 0
    assert observed[~is_possible].sum() == 0
    expected = expected * observed.sum() / expected.sum()  # Sums that are equal but for rounding.
    return stats.chisquare(observed[is_possible], expected[is_possible]).pvalue


# Numbers of candidates by place: a line, two ways, and several of two tokens.
SHAPES = [{(): 1, (0,): 1}, {(): 2}, {(): 3, (1,): 1}, {(): 2, (0,): 2}, {}]


def grown(shape, enumerator, text):
    """A draft that is drawn from the distributions of `of_text`."""
    tokens, parents, tips = [], [], {(): (TEXT, [*text])}
    for way, number in shape.items():
        place, before = tips[way]
        drawn = enumerator.choose(draws_without_replacement(of_text(before)[1].tolist(), number))
        for which, token in enumerate(drawn):
            tips[(*way, which)] = (len(tokens), [*before, token])
            tokens.append(token)
            parents.append(place)
    return Branches(tokens, parents)


def error_of(shape, monkeypatch):
    """Of the texts that come out, over all drafts and decisions, behind several texts."""
    enumerator, worst = OutcomeEnumerator(), 0.0
    enumerator.patch(monkeypatch)
    for text in ([], [0], [1], [2], [1, 1]):

        def run(text=text):
            draft = grown(shape, enumerator, text)
            model_at, draft_at = (
                lambda place, which=which: of_text([*text, *draft.tokens_to(place)])[which]
                for which in (0, 1)
            )
            accepted = accept_by_ratio(draft, model_at, draft_at)
            return (*(draft.tokens_G[place] for place in accepted.nodes), accepted.next_token)

        outcomes = distribution_of_outcomes(enumerator, run)
        worst = max(worst, largest_error(outcomes, lambda before, text=text: of_text([*text, *before])[0]))
    return worst


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_texts_have_exactly_the_models_distribution(shape, monkeypatch):
    assert error_of(shape, monkeypatch) < 1e-12


class WithReplacement(Residual):
    """Forgets that what was rejected is not drawn again."""

    def reject(self, token):
        draft_V = self._draft_V
        super().reject(token)
        self._draft_V = draft_V


class WithoutResidual(Residual):
    """Compares every candidate with the model's own distribution."""

    def reject(self, token):
        model_V = self.model_V
        super().reject(token)
        self.model_V = model_V


class KeepsAll(Residual):
    def acceptance(self, token):
        return float(super().acceptance(token) > 0)


class OnlyTheRefused(Residual):
    """Takes away the candidate alone, as if it had been certain."""

    def reject(self, token):
        model_V = self.model_V.clone()
        super().reject(token)
        if token < len(model_V):
            model_V[token] = 0
        self.model_V = model_V / model_V.sum()


@pytest.mark.parametrize("fault", [WithReplacement, WithoutResidual, KeepsAll, OnlyTheRefused])
def test_faults_would_be_seen(fault, monkeypatch):
    monkeypatch.setattr(speculative, "Residual", fault)
    assert error_of({(): 2, (0,): 1}, monkeypatch) > 0.01


def test_candidates_in_another_order_than_drawn_would_be_seen(monkeypatch):
    monkeypatch.setattr(Branches, "children", property(lambda self: {TEXT: range(len(self))[::-1]}))
    assert error_of({(): 3}, monkeypatch) > 0.01


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_as_many_stay_as_can(number):
    # One candidate stays with the probability that both distributions share; of all tokens one does.
    shares = []
    for tokens, share in draws_without_replacement(Q.tolist(), number):
        residual, rejected = Residual(P, Q), 1.0
        for token in tokens:
            rejected *= 1 - residual.acceptance(token)
            residual.reject(token)
        shares.append(share * (1 - rejected))
    expected = {1: float(P.minimum(Q).sum()), 4: 1.0}
    assert number not in expected or sum(shares) == pytest.approx(expected[number])
    assert sum(shares) >= float(P.minimum(Q).sum()) - 1e-12


def test_many_drafts_leave_the_distribution_as_it_is():
    # Candidates are drawn at once, decisions one by one; and the numbers are those of a generator.
    generator, number = torch.Generator().manual_seed(0), 20_000
    drafts = draw_distinct(Q.expand(number, -1), 2, generator).tolist()
    firsts = torch.zeros(4)
    next_V = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    for tokens in drafts:
        draft = Branches(tokens, [TEXT, TEXT])
        accepted = accept_by_ratio(
            draft, lambda place: P if place == TEXT else next_V, lambda _: Q, generator
        )
        firsts[tokens[accepted.nodes[0]] if accepted.nodes else accepted.next_token] += 1
    assert p_value(firsts, P) > 1e-3


def test_draws_without_replacement_are_as_likely_as_they_should_be():
    weights = [0.5, 0.3, 0.2, 0.0]
    drawn = draw_distinct(torch.tensor([weights]).expand(100_000, -1), 3, torch.Generator().manual_seed(0))
    codes = drawn @ torch.tensor([16, 4, 1])
    expected = torch.zeros(64)
    for tokens, share in draws_without_replacement(weights, 3):
        expected[16 * tokens[0] + 4 * tokens[1] + tokens[2]] = share
    assert p_value(codes.bincount(minlength=64), expected) > 1e-3
    # The fourth has no weight: there is nothing left to draw.
    assert (draw_distinct(torch.tensor([weights]), 4)[:, :3].sort().values == torch.arange(3)).all()


def test_tokens_are_drawn_by_their_weights():
    weights, generator = torch.tensor([0.0, 2.0, 1.0, 0.0, 5.0, 0.0]), torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw_token(weights, generator) for _ in range(10_000)])
    assert p_value(drawn.bincount(minlength=6), weights) > 1e-3
    for damaged in (weights * 0, weights * torch.nan, weights / 0):
        with pytest.raises(ValueError, match="there is no distribution to draw from"):
            draw_token(damaged)


def test_a_draft_like_the_model_stays_whole():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        tokens = [draw_token(Q, generator) for _ in range(3)]
        accepted = accept_by_ratio(Branches.line(tokens), lambda _: Q, lambda _: Q, generator)
        assert list(accepted.nodes) == [0, 1, 2]


def test_distributions_are_asked_for_where_the_text_comes_by():
    draft, asked = Branches([0, 1, 2, 0], [TEXT, TEXT, 0, 1]), []

    def model_at(place):
        asked.append(place)
        return torch.eye(4)[1 if place == TEXT else 3]

    accepted = accept_by_ratio(draft, model_at, lambda place: torch.full((4,), 0.25), torch.Generator())
    assert accepted == Accepted([1], 3) and asked == [TEXT, 1]
    assert accept_by_match(draft, lambda place: {TEXT: 1, 1: 0, 3: 2}[place]) == Accepted([1, 3], 2)


def test_the_impossible_is_never_kept(monkeypatch):
    # A uniform number may be 0, and then is no less than a ratio of 0.
    monkeypatch.setattr(speculative, "_uniform", lambda *_: 0.0)
    accepted = accept_by_ratio(
        Branches.line([0]), lambda _: torch.tensor([0.0, 1.0]), lambda _: torch.tensor([1.0, 0.0])
    )
    assert accepted == Accepted([], 1)


def test_no_draft_is_an_ordinary_draw():
    assert accept_by_ratio(Branches(), lambda _: torch.eye(4)[2], P.__getitem__) == Accepted([], 2)
    assert accept_by_match(Branches(), lambda _: 3) == Accepted([], 3)


def test_agreement_stops_at_the_first_that_differs():
    line = Branches.line([5, 6, 9])
    assert accept_by_match(line, lambda place: [6, 7, 8, 5][place]) == Accepted([0, 1], 7)
    assert accept_by_match(line, lambda place: [6, 9, 8, 5][place]) == Accepted([0, 1, 2], 8)


def test_the_same_seed_keeps_the_same():
    draft = Branches([0, 1, 2], [TEXT, TEXT, 0])
    outcomes = [
        [accept_by_ratio(draft, lambda _: P, lambda _: Q, generator) for _ in range(20)]
        for generator in (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    ]
    assert outcomes[0] == outcomes[1] != outcomes[2]
