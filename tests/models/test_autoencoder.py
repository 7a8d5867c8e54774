"""The chunk autoencoder: shapes, noise, padding, tying, and blockwise decoding."""

import pytest
import torch
from tiny import tiny_config
from torch.testing import assert_close

from calm.models.autoencoder import CalmAutoencoder


@pytest.fixture(params=[1, 2, 4, 8])
def autoencoder(request):
    return CalmAutoencoder(tiny_config(request.param).autoencoder_config).eval()


def test_shapes(autoencoder):
    size = autoencoder.config.chunk_size
    tokens = torch.randint(40, (3, 5, size))
    posterior = autoencoder.encode(tokens)
    assert posterior.mean.shape == posterior.log_std.shape == (3, 5, 8)
    assert autoencoder.decode(posterior.mean).shape == (3, 5, size, 40)
    assert autoencoder(tokens.flatten(1)).logits.shape == (3, 5 * size, 40)


def test_chunks_do_not_see_each_other(autoencoder):
    tokens = torch.randint(40, (2, autoencoder.config.chunk_size))
    changed = tokens.clone()
    changed[1] = (changed[1] + 1) % 40
    assert (autoencoder.encode(tokens).mean[0] == autoencoder.encode(changed).mean[0]).all()


def test_decoding_in_blocks_gives_the_same_tokens(autoencoder):
    latents = torch.randn(700, 3, 8)  # More than are decoded at once.
    expected = autoencoder.decode(latents).argmax(-1)
    assert (autoencoder.decode_tokens(latents) == expected).all()
    assert autoencoder.decode_tokens(latents[:0]).shape == expected[:0].shape


def test_reading_part_of_a_chunk_gives_the_same_tokens(autoencoder):
    latents, size = torch.randn(5000, 8), autoencoder.config.chunk_size
    expected = autoencoder.decode_tokens(latents)
    states = autoencoder.chunk_states(latents)
    for first, last in ((0, 1), (size - 1, size), (0, size), (1, size)):
        if first < last:
            assert (autoencoder.read_tokens(states, first, last) == expected[:, first:last]).all()


def test_vocabulary_projection_is_tied(autoencoder):
    latents = torch.randn(3, 8)
    before = autoencoder.decode(latents)
    with torch.no_grad():
        autoencoder.get_input_embeddings().weight *= 2
    assert_close(autoencoder.decode(latents), 2 * before)


def test_training_noise_follows_the_generator_and_dropout_rates():
    autoencoder = CalmAutoencoder(tiny_config(4).autoencoder_config)
    tokens = torch.randint(40, (5000, 4))
    noise = autoencoder.draw_noise(tokens, torch.Generator().manual_seed(1))
    again = autoencoder.draw_noise(tokens, torch.Generator().manual_seed(1))
    assert all((a == b).all() for a, b in zip(noise, again, strict=True))
    assert noise.token_keep_PK.float().mean() == pytest.approx(0.85, abs=0.01)
    assert noise.latent_keep_PZ.float().mean() == pytest.approx(0.85, abs=0.01)


def test_padding_carries_no_loss():
    autoencoder = CalmAutoencoder(tiny_config(2).autoencoder_config).eval()
    tokens = torch.tensor([[5, 6, 7, 0, 0, 0]])
    labels = torch.tensor([[5, 6, 7, -100, -100, -100]])
    loss = autoencoder(tokens, labels=labels).loss
    # The chunk without any label is left out, and so is padding within a chunk.
    assert_close(autoencoder(tokens[:, :4], labels=labels[:, :4]).loss, loss)
    log_probs = autoencoder(tokens).logits.log_softmax(-1)
    cross_entropy = -torch.stack([log_probs[0, i, tokens[0, i]] for i in range(3)]).mean()
    kl = autoencoder.encode(tokens[:, :4].view(2, 2)).kl_to_standard_normal().clamp_min(0.5).sum(-1).mean()
    assert_close(loss, 2 * cross_entropy + 1e-3 * kl)


def test_wrong_lengths_are_refused():
    autoencoder = CalmAutoencoder(tiny_config(4).autoencoder_config)
    with pytest.raises(ValueError, match="multiple of the chunk size 4"):
        autoencoder(torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="a chunk has 4 tokens, got 3"):
        autoencoder.encode(torch.zeros(2, 3, dtype=torch.long))
