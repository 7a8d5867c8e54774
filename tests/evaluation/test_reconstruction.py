"""Reconstruction scores: values known by construction, and padding that never counts."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from calm.core.chunks import IGNORED_LABEL
from calm.core.gaussian import DiagonalGaussian
from calm.errors import InputError
from calm.evaluation.reconstruction import ReconstructionResult, evaluate_reconstruction
from calm.models.autoencoder import CalmAutoencoder
from calm.models.configuration import CalmAutoencoderConfig

PAD, BAD, X = 0, 7, IGNORED_LABEL
NO_NOISE = 1e-6


class Stub:
    """An autoencoder whose latent is the chunk itself; it decodes `BAD` and padding wrongly."""

    def __init__(self, std=NO_NOISE, chunk_size=4):
        self.config, self.std, self.seen = SimpleNamespace(chunk_size=chunk_size), std, []

    def encode(self, tokens_PK):
        self.seen += tokens_PK.tolist()
        return DiagonalGaussian(tokens_PK.float(), torch.full(tokens_PK.shape, math.log(self.std)))

    def decode_tokens(self, latents_PZ):
        tokens = latents_PZ.round().long()
        return torch.where((tokens == BAD) | (tokens == PAD), 99, tokens)


def block_of(tokens, labels=None):
    tokens = torch.tensor(tokens)
    return {"input_ids": tokens, "labels": tokens if labels is None else torch.tensor(labels)}


def evaluate(autoencoder, *blocks, seed=0):
    return evaluate_reconstruction(autoencoder, blocks, torch.Generator().manual_seed(seed))


def test_perfect_reconstruction():
    result = evaluate(Stub(), block_of([[1, 2, 3, 4, 5, 6, 8, 9]]))
    assert result == ReconstructionResult(1.0, 1.0, 1.0, pytest.approx(NO_NOISE))


def test_known_accuracies():
    """3 of 16 tokens wrong, in 2 of 4 chunks."""
    result = evaluate(Stub(), block_of([[1, 2, 3, 4, BAD, 6, BAD, 9], [1, 1, 1, 1, 2, 2, 2, BAD]]))
    assert result.token_accuracy == pytest.approx(13 / 16)
    assert result.token_accuracy_noisy == pytest.approx(13 / 16)
    assert result.chunk_accuracy == pytest.approx(2 / 4)


def test_padding_does_not_count():
    """Not as a token, right or wrong, nor as a chunk; chunks of padding only are not even encoded."""
    stub = Stub()
    block = block_of(
        [[0, 0, 0, 1, 2, BAD, 3, 0, 0, 0, 0, 0], [4, 5, 6, 8, 9, 0, 0, 0, 0, 0, 0, 0]],
        [[X, X, X, 1, 2, BAD, 3, X, X, X, X, X], [4, 5, 6, 8, 9, X, X, X, X, X, X, X]],
    )
    result = evaluate(stub, block)
    assert result.token_accuracy == pytest.approx(8 / 9)
    assert result.token_accuracy_noisy == pytest.approx(8 / 9)
    assert result.chunk_accuracy == pytest.approx(3 / 4)
    assert stub.seen == [[0, 0, 0, 1], [2, BAD, 3, 0], [4, 5, 6, 8], [9, 0, 0, 0]]


def test_padding_id_counts_where_it_is_labeled_as_text():
    result = evaluate(Stub(), block_of([[1, 2, PAD, 3]]))
    assert (result.token_accuracy, result.chunk_accuracy) == (0.75, 0.0)


def test_accuracies_are_over_all_tokens_not_means_of_batches():
    few = block_of([[BAD, 0, 0, 0]], [[BAD, X, X, X]])
    many = block_of([[1, 2, 3, 4, 5, 6, 8, 9]])
    result = evaluate(Stub(), few, many)
    assert result.token_accuracy == pytest.approx(8 / 9)
    assert result.chunk_accuracy == pytest.approx(2 / 3)


def test_noisy_accuracy_and_posterior_std():
    """A latent moved by more than one half is another token: P(|N(0, s)| < 1/2) = erf(1 / (2 s sqrt 2))."""
    std, num = 0.4, 40_000
    tokens = torch.randint(20, 90, (10, num // 10), generator=torch.Generator().manual_seed(0))
    result = evaluate(Stub(std), block_of(tokens.tolist()))
    expected = math.erf(0.5 / (std * math.sqrt(2)))
    assert abs(result.token_accuracy_noisy - expected) < 4 * (expected * (1 - expected) / num) ** 0.5
    assert (result.token_accuracy, result.chunk_accuracy) == (1.0, 1.0)
    assert result.posterior_std == pytest.approx(std)


def test_posterior_std_is_the_mean_over_chunks_and_dimensions():
    class Growing(Stub):
        def encode(self, tokens_PK):
            return DiagonalGaussian(tokens_PK.float(), tokens_PK.float().log())  # The std is the token id.

    result = evaluate(Growing(), block_of([[1, 2, 3, 4]]), block_of([[5, 5, 5, 5, 6, 6, 6, 6]]))
    assert result.posterior_std == pytest.approx((2.5 + 5 + 6) / 3)


@pytest.mark.parametrize("blocks", [[], [block_of([[0, 0, 0, 0]], [[X, X, X, X]])]])
def test_text_without_a_token_is_refused(blocks):
    with pytest.raises(InputError, match="no token to score"):
        evaluate(Stub(), *blocks)


def test_metrics_are_in_percent():
    metrics = ReconstructionResult(0.5, 0.25, 0.125, 0.3).as_metrics()
    assert metrics == {
        "token_accuracy": 50,
        "chunk_accuracy": 25,
        "token_accuracy_noisy": 12.5,
        "posterior_std": 0.3,
    }


def test_scores_of_an_autoencoder_against_its_own_reconstruction():
    torch.manual_seed(0)
    config = CalmAutoencoderConfig(
        vocab_size=30, chunk_size=4, latent_size=8, hidden_size=16, intermediate_size=16
    )
    autoencoder = CalmAutoencoder(config).eval()
    torch.nn.init.normal_(autoencoder.encoder.embed_tokens.weight)
    tokens = torch.randint(30, (3, 40))
    with torch.no_grad():
        posterior = autoencoder.encode(tokens.view(-1, 4))
        reconstructed = autoencoder.decode_tokens(posterior.mean).view(3, 40)
    assert not torch.equal(reconstructed, tokens)
    block = {"input_ids": tokens, "labels": reconstructed}
    result = evaluate(autoencoder, block)
    assert (result.token_accuracy, result.chunk_accuracy) == (1.0, 1.0)
    assert 0 < result.token_accuracy_noisy < 1
    assert_close(result.posterior_std, float(posterior.std.mean()))
    assert evaluate(autoencoder, block) == result
    assert evaluate(autoencoder, block, seed=1).token_accuracy_noisy != result.token_accuracy_noisy
    wrong = {"input_ids": tokens, "labels": (reconstructed + 1) % 30}
    assert evaluate(autoencoder, wrong).token_accuracy == 0
