"""How well the autoencoder reconstructs text."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from calm.core.chunks import IGNORED_LABEL, split_into_chunks
from calm.errors import InputError
from calm.evaluation.processes import Batch
from calm.models.autoencoder import CalmAutoencoder


@dataclass(frozen=True)
class ReconstructionResult:
    """Shares of held-out text reconstructed exactly, as fractions.

    Args:
        token_accuracy: Share of tokens, decoding the posterior mean.
        chunk_accuracy: Share of chunks without a wrong token, decoding the posterior mean.
        token_accuracy_noisy: Share of tokens, decoding a sample from the posterior.
        posterior_std: Mean standard deviation of the posterior.
    """

    token_accuracy: float
    chunk_accuracy: float
    token_accuracy_noisy: float
    posterior_std: float

    def as_metrics(self) -> dict[str, float]:
        """The fields in percent, except the standard deviation."""
        return {
            "token_accuracy": 100 * self.token_accuracy,
            "chunk_accuracy": 100 * self.chunk_accuracy,
            "token_accuracy_noisy": 100 * self.token_accuracy_noisy,
            "posterior_std": self.posterior_std,
        }


@torch.no_grad()
def evaluate_reconstruction(
    autoencoder: CalmAutoencoder, batches: Iterable[Batch], generator: torch.Generator
) -> ReconstructionResult:
    """Encode and decode held-out blocks; padding does not count.

    Raises:
        InputError: If there is no token to score.
    """
    tokens = chunks = exact = exact_noisy = exact_chunks = 0
    std = 0.0
    for batch in batches:
        size = autoencoder.config.chunk_size
        labels_PK = split_into_chunks(batch["labels"], size).flatten(0, 1)
        is_token_PK = labels_PK != IGNORED_LABEL
        has_token_P = is_token_PK.any(-1)
        labels_PK, is_token_PK = labels_PK[has_token_P], is_token_PK[has_token_P]
        posterior = autoencoder.encode(split_into_chunks(batch["input_ids"], size).flatten(0, 1)[has_token_P])
        exact_PK = (autoencoder.decode_tokens(posterior.mean) == labels_PK) | ~is_token_PK
        exact_noisy_PK = autoencoder.decode_tokens(posterior.sample(1, generator)[0]) == labels_PK
        tokens += int(is_token_PK.sum())
        chunks += len(labels_PK)
        exact += int(exact_PK[is_token_PK].sum())
        exact_noisy += int(exact_noisy_PK[is_token_PK].sum())
        exact_chunks += int(exact_PK.all(-1).sum())
        std += float(posterior.std.mean(-1).sum())
    if tokens == 0:
        raise InputError("the held-out text has no token to score; give more text.")
    return ReconstructionResult(exact / tokens, exact_chunks / chunks, exact_noisy / tokens, std / chunks)
