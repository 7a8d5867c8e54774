"""Brier scores from draws alone, BrierLM, and their standard errors (paper section 4).

Shapes: N draws, P positions, K tokens of a chunk (column n-1 belongs to order n), S steps of a window.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_ORDERS = 4  # BrierLM combines Brier-1 to Brier-4.


def window_of(chunk_size: int) -> int:
    """Tokens of a scored window: the fewest whole chunks that hold the four tokens BrierLM needs."""
    return -(-NUM_ORDERS // chunk_size) * chunk_size


def brier_scores(draw_1_PK: Tensor, draw_2_PK: Tensor, target_PK: Tensor) -> Tensor:
    """Unbiased estimates of Brier-1..Brier-K at every position, shape (P, K).

    Order n treats the next n tokens as one outcome y and estimates
    2 P(y) - sum_x P(x)^2 by 1{x1 = y} + 1{x2 = y} - 1{x1 = x2}, with x1, x2 the first n tokens of
    two independent draws.

    Args:
        draw_1_PK: Token ids of one draw of the model.
        draw_2_PK: Token ids of a second, independent draw.
        target_PK: Token ids of the text.

    Raises:
        ValueError: If the shapes differ.
    """
    if not draw_1_PK.shape == draw_2_PK.shape == target_PK.shape:
        raise ValueError(
            "draws and target must have the same shape, got "
            f"{tuple(draw_1_PK.shape)}, {tuple(draw_2_PK.shape)} and {tuple(target_PK.shape)}."
        )
    return brier_scores_of_draws(torch.stack([draw_1_PK, draw_2_PK]), target_PK)


def brier_scores_of_draws(draws_NPK: Tensor, target_PK: Tensor) -> Tensor:
    """`brier_scores` from any number of independent draws, shape (P, K): same mean, lower variance.

    These are U-statistics: P(y) is estimated by the share of draws that hit, sum_x P(x)^2 by the share of
    the N(N-1)/2 pairs of draws that agree.

    Args:
        draws_NPK: Token ids of N >= 2 draws.
        target_PK: Token ids of the text.

    Raises:
        ValueError: If there are fewer than two draws, or the shapes do not fit.
    """
    if draws_NPK.ndim != 3 or draws_NPK.shape[1:] != target_PK.shape:
        raise ValueError(
            f"draws must be (N, P, K) with a target (P, K), got {tuple(draws_NPK.shape)} and "
            f"{tuple(target_PK.shape)}."
        )
    return 2 * share_of_hits(draws_NPK, target_PK) - share_of_equal_pairs(draws_NPK)


def share_of_hits(draws_NPK: Tensor, target_PK: Tensor) -> Tensor:
    """Share of draws whose first n tokens match the text, n = 1..K, shape (P, K)."""
    return matching_prefixes(draws_NPK, target_PK.expand_as(draws_NPK)).float().mean(0)


def share_of_equal_pairs(draws_NPK: Tensor) -> Tensor:
    """Share of all pairs of draws that agree on their first n tokens, n = 1..K, shape (P, K).

    Raises:
        ValueError: If there are fewer than two draws.
    """
    num_draws = len(draws_NPK)
    if num_draws < 2:
        raise ValueError(f"a Brier score needs at least two draws, got {num_draws}.")
    equal_PK = torch.zeros(draws_NPK.shape[1:], device=draws_NPK.device)
    for later in range(1, num_draws):
        earlier_NPK = draws_NPK[:later]
        equal_PK += matching_prefixes(earlier_NPK, draws_NPK[later].expand_as(earlier_NPK)).sum(0)
    return equal_PK / (num_draws * (num_draws - 1) / 2)


def brier_losses(of_token_PK: Tensor, of_pair_PK: Tensor) -> Tensor:
    """Exact negative Brier-1..Brier-K of chunks whose tokens are independent of each other, (P, K).

    Probabilities then factorize: sum_x P(x)^2 - 2 P(y), with x over the outcomes of the first n tokens, is
    the product of the tokens' sums of squares, minus twice the product of the true tokens' probabilities.
    Its expectation is lowest at the true probabilities (a strictly proper score).

    Args:
        of_token_PK: Probability of the true token at each position.
        of_pair_PK: Sum of squared probabilities at each position.
    """
    return of_pair_PK.cumprod(-1) - 2 * of_token_PK.cumprod(-1)


def windows_of_steps(hits_SPK: Tensor, equal_SPK: Tensor, follows_SP: Tensor) -> tuple[Tensor, Tensor]:
    """Hits and collisions of windows that are generated in S steps of K tokens, (P, S·K) each.

    The accuracy term uses teacher forcing: every step follows the true text, so the probability of hitting
    a window is the product over its steps. The collision term follows the path of the first draw: each
    step is conditioned on that draw's chunks, and only pairs that have agreed so far can still agree
    (paper, appendix on K < 4).

    Args:
        hits_SPK: Unbiased estimates of P(first n tokens of the step are the true ones | true text),
            independent over steps.
        equal_SPK: Estimates of sum_x P(x)^2 over the first n tokens of the step, given the path so far.
        follows_SP: Estimates of P(the path's chunk of this step | the path so far).

    Returns:
        Unbiased estimates of P(y) and of sum_x P(x)^2; Brier-n is 2 P(y) - sum_x P(x)^2.
    """
    hit_P = equal_P = torch.ones_like(follows_SP[0])
    hits, equals = [], []
    for hits_PK, equal_PK, follows_P in zip(hits_SPK, equal_SPK, follows_SP, strict=True):
        hits.append(hit_P[:, None] * hits_PK)
        equals.append(equal_P[:, None] * equal_PK)
        hit_P = hit_P * hits_PK[:, -1]
        equal_P = equal_P * follows_P
    return torch.cat(hits, dim=1), torch.cat(equals, dim=1)


def matching_prefixes(first_PK: Tensor, second_PK: Tensor) -> Tensor:
    """Whether the first n tokens agree, n = 1..K: boolean, shape (P, K), any leading axes P."""
    return torch.eq(first_PK, second_PK).long().cumprod(-1).bool()


def brier_lm(means: Sequence[float] | Tensor) -> float:
    """BrierLM = 100 · (Brier-1 · Brier-2 · Brier-3 · Brier-4)^(1/4), from the mean of each order.

    Undefined if any mean is not positive (see `undefined_brier_lm`); returns 0 then, since the product of two
    negative means would otherwise look like a good score.

    Args:
        means: Means of Brier-1 to Brier-4; further orders are ignored.

    Raises:
        ValueError: If fewer than four orders are given.
    """
    factors = [float(mean) for mean in means[:NUM_ORDERS]]
    if len(factors) < NUM_ORDERS:
        raise ValueError(f"BrierLM needs the means of {NUM_ORDERS} orders, got {len(factors)}.")
    if any(math.isnan(mean) for mean in factors):
        return math.nan
    if min(factors) <= 0:
        return 0.0
    return 100 * math.exp(sum(map(math.log, factors)) / NUM_ORDERS)


def undefined_brier_lm(means: Sequence[float] | Tensor) -> str | None:
    """Why BrierLM is undefined, such as "Brier-4 below 0"; None if it is defined.

    Weak models have no skill at the higher orders, and an estimate near 0 may fall below it. Compare them by
    Brier-1 or cross-entropy instead.

    Args:
        means: Means of Brier-1 to Brier-4; further orders are ignored.
    """
    for order, mean in enumerate(map(float, means[:NUM_ORDERS]), 1):
        if not mean > 0:
            problem = "below 0" if mean < 0 else "is 0" if mean == 0 else "is not known"
            return f"Brier-{order} {problem}"
    return None


@dataclass(frozen=True)
class DocumentSums:
    """Per-document sums of per-position figures, from which means and standard errors follow.

    Figures within a document are dependent, so standard errors treat documents as the sample:
    with s_d the sum of the n_d figures of a document and m = sum s_d / sum n_d, the covariance of m is
    estimated by D/(D-1) · sum (s_d - m n_d)(s_d - m n_d)^T / (sum n_d)^2, the linearized ratio estimator.

    Args:
        document_D: A unique number for each document.
        count_D: Positions n_d.
        total_DX: Sums s_d of X figures.
    """

    document_D: Tensor
    count_D: Tensor
    total_DX: Tensor

    @staticmethod
    def of_positions(figures_PX: Tensor, document_P: Tensor) -> "DocumentSums":
        """Sum figures by document.

        Args:
            figures_PX: Figures of each position.
            document_P: Document number of each position.
        """
        ones_P = torch.ones(len(document_P), dtype=torch.float64)
        return _sum_by_document(document_P.cpu(), ones_P, figures_PX.double().cpu())

    @staticmethod
    def concat(parts: Sequence["DocumentSums"]) -> "DocumentSums":
        """Merge the sums of several parts of a text; a document may span parts."""
        return _sum_by_document(*(torch.cat(fields) for fields in zip(*map(_fields, parts), strict=True)))

    def pairs_with(self, other: "DocumentSums") -> bool:
        """Whether both cover the same documents, with the same number of positions in each."""
        return torch.equal(self.document_D, other.document_D) and torch.equal(self.count_D, other.count_D)

    @property
    def num_positions(self) -> int:
        """Number of positions in all documents."""
        return int(self.count_D.sum())

    @property
    def means_X(self) -> Tensor:
        """Mean of each figure over all positions."""
        return self.total_DX.sum(0) / self.count_D.sum()

    @property
    def covariance_XX(self) -> Tensor:
        """Estimated covariance of the means; NaN for a single document."""
        deviation_DX = self.total_DX - self.count_D.unsqueeze(-1) * self.means_X
        num_documents = len(self.count_D)
        factor = num_documents / (num_documents - 1) if num_documents > 1 else math.nan
        return factor * deviation_DX.T @ deviation_DX / self.count_D.sum() ** 2


def _fields(sums: DocumentSums) -> tuple[Tensor, Tensor, Tensor]:
    return sums.document_D, sums.count_D, sums.total_DX


def _sum_by_document(document_P: Tensor, count_P: Tensor, figures_PX: Tensor) -> DocumentSums:
    document_D, index_P = torch.unique(document_P, return_inverse=True)
    count_D = count_P.new_zeros(len(document_D)).index_add(0, index_P, count_P)
    total_DX = figures_PX.new_zeros(len(document_D), figures_PX.shape[1]).index_add(0, index_P, figures_PX)
    return DocumentSums(document_D, count_D, total_DX)


def brier_lm_error(means_K: Tensor, covariance_KK: Tensor) -> float:
    """Standard error of BrierLM by the delta method; NaN if BrierLM is undefined or its covariance is NaN.

    The derivative of BrierLM with respect to the mean of order n is BrierLM / (4 mean_n).

    Args:
        means_K: Means of Brier-1 to Brier-4; further orders are ignored.
        covariance_KK: Their covariance.
    """
    if not brier_lm(means_K) > 0:
        return math.nan
    gradient = _gradient(means_K)
    return _root(gradient @ covariance_KK[:NUM_ORDERS, :NUM_ORDERS].double() @ gradient)


def brier_lm_difference(first: DocumentSums, second: DocumentSums) -> tuple[float, float]:
    """BrierLM of one model minus that of another on the same text, and its standard error.

    A document that is hard for one model is usually hard for the other, so the difference is known more
    precisely than either score. Uses the delta method on the joint covariance of both models' means.

    Args:
        first: Sums of Brier-1 to Brier-4 of one model; further orders are ignored.
        second: Sums of the other model.

    Returns:
        The difference in BrierLM points, and its standard error (NaN if either score is undefined).

    Raises:
        ValueError: If the two do not cover the same positions of the same documents.
    """
    if not first.pairs_with(second):
        raise ValueError(
            "two models can only be compared on the same documents, split into the same windows."
        )
    totals = [sums.total_DX[:, :NUM_ORDERS] for sums in (first, second)]
    joint = DocumentSums(first.document_D, first.count_D, torch.cat(totals, dim=1))
    first_means_K, second_means_K = joint.means_X.chunk(2)
    first_score, second_score = brier_lm(first_means_K), brier_lm(second_means_K)
    difference = first_score - second_score
    if not min(first_score, second_score) > 0:
        return difference, math.nan
    gradient = torch.cat([_gradient(first_means_K), -_gradient(second_means_K)])
    return difference, _root(gradient @ joint.covariance_XX @ gradient)


def _gradient(means_K: Tensor) -> Tensor:
    """Gradient of BrierLM with respect to the means."""
    return brier_lm(means_K) / (NUM_ORDERS * means_K[:NUM_ORDERS].double())


def _root(variance: Tensor) -> float:
    """Square root of a variance that rounding may have left slightly negative."""
    return math.nan if math.isnan(float(variance)) else math.sqrt(max(float(variance), 0.0))
