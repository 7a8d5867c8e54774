"""Speculative sampling, against the distribution that the text must have."""

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


def distributions_after(tokens):
    """Next-token distributions after some tokens: the model's over 3 tokens, and the draft's over 4."""
    seed = 1 + sum((token + 1) * 7**index for index, token in enumerate(tokens))
    generator = torch.Generator().manual_seed(seed)
    p_V, q_V = (torch.rand(size, generator=generator, dtype=torch.float64) ** 2 for size in (3, 4))
    p_V[seed % 3] *= seed % 2  # Now and then a token is impossible,
    q_V[(seed + 1) % 4] *= seed % 5 > 0  # or cannot be drafted.
    return p_V / p_V.sum(), q_V / q_V.sum()


P = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
Q = torch.tensor([0.2, 0.2, 0.4, 0.2], dtype=torch.float64)


def p_value(observed, expected):
    observed, expected = observed.double(), expected.double()
    is_possible = expected > 0
    assert observed[~is_possible].sum() == 0
    expected = expected * observed.sum() / expected.sum()  # Scipy requires equal sums.
    return stats.chisquare(observed[is_possible], expected[is_possible]).pvalue


# Token trees: the number of candidates after each node, which is given by its path from the root.
SHAPES = [{(): 1, (0,): 1}, {(): 2}, {(): 3, (1,): 1}, {(): 2, (0,): 2}, {}]


def sample_draft(shape, enumerator, text):
    """A draft of a shape, sampled from the draft's distributions."""
    tokens, parents, nodes = [], [], {(): (TEXT, [*text])}
    for path, number in shape.items():
        parent, before = nodes[path]
        drawn = enumerator.choose(draws_without_replacement(distributions_after(before)[1].tolist(), number))
        for sibling, token in enumerate(drawn):
            nodes[(*path, sibling)] = (len(tokens), [*before, token])
            tokens.append(token)
            parents.append(parent)
    return Branches(tokens, parents)


def error_of_distribution(shape, monkeypatch):
    """Largest error of the texts' distribution after several texts, over all drafts and decisions."""
    enumerator, worst = OutcomeEnumerator(), 0.0
    enumerator.patch(monkeypatch)
    for text in ([], [0], [1], [2], [1, 1]):

        def run(text=text):
            draft = sample_draft(shape, enumerator, text)
            model_at, draft_at = (
                lambda node, index=index: distributions_after([*text, *draft.tokens_to(node)])[index]
                for index in (0, 1)
            )
            accepted = accept_by_ratio(draft, model_at, draft_at)
            return (*(draft.tokens_G[node] for node in accepted.nodes), accepted.next_token)

        outcomes = distribution_of_outcomes(enumerator, run)
        error = largest_error(outcomes, lambda before, text=text: distributions_after([*text, *before])[0])
        worst = max(worst, error)
    return worst


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_texts_have_exactly_the_models_distribution(shape, monkeypatch):
    assert error_of_distribution(shape, monkeypatch) < 1e-12


class WithReplacement(Residual):
    """Ignores that a rejected candidate is not drawn again."""

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


class AcceptsAll(Residual):
    """Accepts every candidate that is possible under the model."""

    def acceptance(self, token):
        return float(super().acceptance(token) > 0)


class RemovesOnlyTheRejected(Residual):
    """Removes the rejected candidate from the model's distribution, as if it had been certain."""

    def reject(self, token):
        model_V = self.model_V.clone()
        super().reject(token)
        if token < len(model_V):
            model_V[token] = 0
        self.model_V = model_V / model_V.sum()


@pytest.mark.parametrize("fault", [WithReplacement, WithoutResidual, AcceptsAll, RemovesOnlyTheRejected])
def test_faulty_residuals_are_detected(fault, monkeypatch):
    monkeypatch.setattr(speculative, "Residual", fault)
    assert error_of_distribution({(): 2, (0,): 1}, monkeypatch) > 0.01


def test_wrong_order_of_candidates_is_detected(monkeypatch):
    monkeypatch.setattr(Branches, "children", property(lambda self: {TEXT: range(len(self))[::-1]}))
    assert error_of_distribution({(): 3}, monkeypatch) > 0.01


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_probability_of_accepting_a_candidate(number):
    # A single candidate: sum of min(p, q). All tokens as candidates: one of them is always accepted.
    probabilities = []
    for tokens, probability in draws_without_replacement(Q.tolist(), number):
        residual, rejected = Residual(P, Q), 1.0
        for token in tokens:
            rejected *= 1 - residual.acceptance(token)
            residual.reject(token)
        probabilities.append(probability * (1 - rejected))
    expected = {1: float(P.minimum(Q).sum()), 4: 1.0}
    assert number not in expected or sum(probabilities) == pytest.approx(expected[number])
    assert sum(probabilities) >= float(P.minimum(Q).sum()) - 1e-12


def test_randomly_drawn_drafts_leave_the_distribution_unchanged():
    # Here candidates and decisions come from a generator, not from an enumeration.
    generator, number = torch.Generator().manual_seed(0), 20_000
    drafts = draw_distinct(Q.expand(number, -1), 2, generator).tolist()
    firsts = torch.zeros(4)
    next_V = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    for tokens in drafts:
        draft = Branches(tokens, [TEXT, TEXT])
        accepted = accept_by_ratio(draft, lambda node: P if node == TEXT else next_V, lambda _: Q, generator)
        firsts[tokens[accepted.nodes[0]] if accepted.nodes else accepted.next_token] += 1
    assert p_value(firsts, P) > 1e-3


def test_draws_without_replacement_have_the_right_distribution():
    weights = [0.5, 0.3, 0.2, 0.0]
    drawn = draw_distinct(torch.tensor([weights]).expand(100_000, -1), 3, torch.Generator().manual_seed(0))
    codes = drawn @ torch.tensor([16, 4, 1])
    expected = torch.zeros(64)
    for tokens, probability in draws_without_replacement(weights, 3):
        expected[16 * tokens[0] + 4 * tokens[1] + tokens[2]] = probability
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


def test_draft_from_the_models_distribution_is_fully_accepted():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        tokens = [draw_token(Q, generator) for _ in range(3)]
        accepted = accept_by_ratio(Branches.line(tokens), lambda _: Q, lambda _: Q, generator)
        assert list(accepted.nodes) == [0, 1, 2]


def test_distributions_are_requested_only_at_visited_nodes():
    draft, requested = Branches([0, 1, 2, 0], [TEXT, TEXT, 0, 1]), []

    def model_at(node):
        requested.append(node)
        return torch.eye(4)[1 if node == TEXT else 3]

    accepted = accept_by_ratio(draft, model_at, lambda node: torch.full((4,), 0.25), torch.Generator())
    assert accepted == Accepted([1], 3) and requested == [TEXT, 1]
    assert accept_by_match(draft, lambda node: {TEXT: 1, 1: 0, 3: 2}[node]) == Accepted([1, 3], 2)


def test_token_of_probability_zero_is_never_accepted(monkeypatch):
    # A uniform number may be 0, and then is no less than a ratio of 0.
    monkeypatch.setattr(speculative, "_uniform", lambda *_: 0.0)
    accepted = accept_by_ratio(
        Branches.line([0]), lambda _: torch.tensor([0.0, 1.0]), lambda _: torch.tensor([1.0, 0.0])
    )
    assert accepted == Accepted([], 1)


def test_empty_draft_gives_an_ordinary_draw():
    assert accept_by_ratio(Branches(), lambda _: torch.eye(4)[2], P.__getitem__) == Accepted([], 2)
    assert accept_by_match(Branches(), lambda _: 3) == Accepted([], 3)


def test_matching_stops_at_the_first_different_token():
    line = Branches.line([5, 6, 9])
    assert accept_by_match(line, lambda node: [6, 7, 8, 5][node]) == Accepted([0, 1], 7)
    assert accept_by_match(line, lambda node: [6, 9, 8, 5][node]) == Accepted([0, 1, 2], 8)


def test_same_seed_accepts_the_same_tokens():
    draft = Branches([0, 1, 2], [TEXT, TEXT, 0])
    outcomes = [
        [accept_by_ratio(draft, lambda _: P, lambda _: Q, generator) for _ in range(20)]
        for generator in (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    ]
    assert outcomes[0] == outcomes[1] != outcomes[2]
