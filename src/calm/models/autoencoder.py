"""The chunk autoencoder: K tokens <-> one latent (paper section 2).

Shapes: P positions (chunks), K tokens per chunk, D hidden size, Z latent size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from calm.core.argmax import argmax_of_scores
from calm.core.chunks import IGNORED_LABEL, have_label, mean_over, split_into_chunks
from calm.core.gaussian import DiagonalGaussian, floored_kl
from calm.models.blocks import SwiGLUBlock
from calm.models.codes import CodeDecoder, CodeEncoder, draw_codes
from calm.models.configuration import CalmAutoencoderConfig
from calm.models.saving import SavingMixin

_LATENTS_AT_ONCE = 512  # Keeps the decoder's activations in a CPU's caches.


class AutoencoderNoise(NamedTuple):
    """All randomness of one training step.

    token_keep_PK: boolean, False where a token is dropped.
    posterior_PZ: standard normal noise of the latent.
    latent_keep_PZ: boolean, False where a latent entry is dropped.
    """

    token_keep_PK: Tensor
    posterior_PZ: Tensor
    latent_keep_PZ: Tensor


@dataclass
class AutoencoderOutput(ModelOutput):
    """Output of a forward pass.

    Args:
        loss: K times the mean token cross-entropy plus the weighted KL, in nats.
        logits: Decoder logits of every token, shape (B, T, V); only without labels.
        cross_entropy: Mean token cross-entropy, in nats.
        kl: Mean floored KL of a chunk, in nats.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cross_entropy: Tensor | None = None
    kl: Tensor | None = None


class _Encoder(nn.Module):
    def __init__(self, config: CalmAutoencoderConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.blocks = nn.ModuleList(
            SwiGLUBlock(size, config.intermediate_size, eps) for _ in range(config.num_encoder_layers)
        )
        self.squeeze = nn.Linear(config.chunk_size * size, size)
        self.norm = nn.RMSNorm(size, eps=eps)
        self.out = nn.Linear(size, 2 * config.latent_size)

    def forward(self, tokens_PK: Tensor) -> DiagonalGaussian:
        half = len(self.blocks) // 2
        hidden = self.embed_tokens(tokens_PK)
        for block in self.blocks[:half]:
            hidden = block(hidden)
        hidden = self.squeeze(hidden.flatten(-2))
        for block in self.blocks[half:]:
            hidden = block(hidden)
        return DiagonalGaussian(*self.out(self.norm(hidden)).chunk(2, dim=-1))


class _Decoder(nn.Module):
    def __init__(self, config: CalmAutoencoderConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.chunk_size = config.chunk_size
        self.inp = nn.Linear(config.latent_size, size)
        self.blocks = nn.ModuleList(
            SwiGLUBlock(size, config.intermediate_size, eps) for _ in range(config.num_decoder_layers)
        )
        self.expand = nn.Linear(size, config.chunk_size * size)
        self.norm = nn.RMSNorm(size, eps=eps)

    def forward(self, latents_PZ: Tensor) -> Tensor:
        """Token vectors before the vocabulary projection, shape (P, K, D)."""
        return self.token_vectors(self.chunk_states(latents_PZ), 0, self.chunk_size)

    def chunk_states(self, latents_PZ: Tensor) -> Tensor:
        """The part of decoding that all tokens of a chunk share, shape (P, D)."""
        hidden = self.inp(latents_PZ.to(self.inp.weight.dtype))  # Some heads always draw in float32.
        for block in self.blocks[: len(self.blocks) // 2]:
            hidden = block(hidden)
        return hidden

    def token_vectors(self, states_PD: Tensor, first: int, last: int) -> Tensor:
        """Vectors of the tokens at positions first..last-1 of the chunk, shape (P, last - first, D)."""
        size = states_PD.shape[-1]
        rows = slice(first * size, last * size)
        hidden = F.linear(states_PD, self.expand.weight[rows], self.expand.bias[rows])
        hidden = hidden.unflatten(-1, (last - first, size))
        for block in self.blocks[len(self.blocks) // 2 :]:
            hidden = block(hidden)
        return self.norm(hidden)


class CalmAutoencoder(SavingMixin, PreTrainedModel):
    """Context-free variational autoencoder of chunks: MLPs only, or fixed codes that need no training."""

    config: CalmAutoencoderConfig
    config_class = CalmAutoencoderConfig
    base_model_prefix = "autoencoder"
    main_input_name = "input_ids"
    # transformers' Trainer would divide by tokens; our trainer divides by what the loss is a mean over.
    accepts_loss_kwargs = False
    # It has no attention, so it works with whichever implementation the enclosing model asks for.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: CalmAutoencoderConfig) -> None:
        super().__init__(config)
        self.encoder: _Encoder | CodeEncoder
        self.decoder: _Decoder | CodeDecoder
        if config.has_codes:
            self.encoder, self.decoder = CodeEncoder(config), CodeDecoder(config)
        else:
            self.encoder, self.decoder = _Encoder(config), _Decoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self.config.has_codes and isinstance(module, nn.Embedding):
            draw_codes(module)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding, which is also the vocabulary projection of the decoder."""
        return self.encoder.embed_tokens

    def encode(self, tokens_PK: Tensor) -> DiagonalGaussian:
        """Posterior of each chunk: mean and log-std of shape (P, Z), for any leading axes P."""
        if tokens_PK.shape[-1] != self.config.chunk_size:
            raise ValueError(
                f"a chunk has {self.config.chunk_size} tokens, got {tokens_PK.shape[-1]} in the last axis."
            )
        return self.encoder(tokens_PK)

    def decode(self, latents_PZ: Tensor) -> Tensor:
        """Token logits of each latent, shape (P, K, V)."""
        weight_VD = self.encoder.embed_tokens.weight
        return F.linear(self.decoder(latents_PZ).to(weight_VD.dtype), weight_VD)

    def decode_tokens(self, latents_PZ: Tensor) -> Tensor:
        """Most likely tokens of each latent, shape (P, K), for any leading axes P.

        The logits are never all in memory at once; see `calm.core.argmax`.
        """
        if torch.compiler.is_compiling():  # An unknown number of latents cannot be split.
            return self.decode(latents_PZ).argmax(-1)
        latents = latents_PZ.reshape(-1, latents_PZ.shape[-1])
        tokens = [self._most_likely(self.decoder(part)) for part in latents.split(_LATENTS_AT_ONCE)]
        return torch.cat(tokens).unflatten(0, latents_PZ.shape[:-1])

    def chunk_states(self, latents_PZ: Tensor) -> Tensor:
        """The part of decoding that all K tokens share, shape (P, D): the input of `read_tokens`."""
        return self.decoder.chunk_states(latents_PZ)

    def read_tokens(self, states_PD: Tensor, first: int, last: int) -> Tensor:
        """Most likely tokens at positions first..last-1 of each chunk, shape (P, last - first).

        `decode_tokens` gives the same tokens, but always computes all K positions.
        """
        chunks_at_once = _LATENTS_AT_ONCE * self.config.chunk_size // (last - first)
        parts = states_PD.split(chunks_at_once)
        return torch.cat([self._most_likely(self.decoder.token_vectors(part, first, last)) for part in parts])

    def _most_likely(self, vectors: Tensor) -> Tensor:
        """Tokens with the largest logits; drops the last axis of the token vectors."""
        weight_VD = self.encoder.embed_tokens.weight
        flat = vectors.flatten(0, -2).to(weight_VD.dtype)
        return argmax_of_scores(flat, weight_VD).view(vectors.shape[:-1])

    def draw_noise(self, tokens_PK: Tensor, generator: torch.Generator | None = None) -> AutoencoderNoise:
        """Sample the randomness of one training step on chunks (P, K)."""
        config, device = self.config, tokens_PK.device
        shape_PZ = (*tokens_PK.shape[:-1], config.latent_size)
        token_uniform_PK = torch.rand(tokens_PK.shape, generator=generator, device=device)
        posterior_PZ = torch.randn(shape_PZ, generator=generator, device=device)
        latent_uniform_PZ = torch.rand(shape_PZ, generator=generator, device=device)
        return AutoencoderNoise(
            token_uniform_PK > config.token_dropout, posterior_PZ, latent_uniform_PZ > config.latent_dropout
        )

    def count_targets(self, labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Denominators of the loss: tokens with a label, and chunks with at least one, (2,)."""
        has_label_BC = have_label(labels, self.config.chunk_size)
        return torch.stack([(labels != IGNORED_LABEL).sum(), has_label_BC.sum()])

    def draw_training_noise(
        self, generators: Sequence[torch.Generator], input_ids: Tensor, labels: Tensor, **_: Any
    ) -> AutoencoderNoise:
        """Sample the `noise` of a training forward pass, separately for each row of the batch.

        Args:
            generators: One per row, on the model's device.
            input_ids: As in `forward`.
            labels: As in `forward`.
        """
        chunks_BCK = split_into_chunks(input_ids, self.config.chunk_size)
        has_label_BC = have_label(labels, self.config.chunk_size)
        rows = [
            self.draw_noise(chunks_CK[has_label_C], generator)
            for chunks_CK, has_label_C, generator in zip(chunks_BCK, has_label_BC, generators, strict=True)
        ]
        return AutoencoderNoise(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: AutoencoderNoise | None = None,
        num_items_in_batch: Tensor | None = None,
    ) -> AutoencoderOutput:
        """Encode, sample a latent (the mean in eval mode) and decode; with labels, return the loss instead.

        Args:
            input_ids: Tokens (B, T), T a multiple of K.
            labels: Tokens to reconstruct (B, T); -100 carries no loss, and chunks without any label
                are left out.
            generator: Source of the training noise; the default generator when None.
            noise: Recorded training noise to use instead, for the chunks that have a label.
            num_items_in_batch: Tokens with a label, and chunks with at least one, in the whole optimizer
                step, (2,); those of this batch when None. The summed losses are divided by them.

        Raises:
            ValueError: If T is not a multiple of K.
        """
        config = self.config
        chunks_PK = split_into_chunks(input_ids, config.chunk_size).flatten(0, 1)
        if labels is None:
            logits_PKV = self.decode(self._latents(chunks_PK, generator, noise)[0])
            return AutoencoderOutput(logits=logits_PKV.reshape(*input_ids.shape, -1))
        labels_PK = split_into_chunks(labels, config.chunk_size).flatten(0, 1)
        has_label_P = have_label(labels, config.chunk_size).flatten()
        latents_PZ, posterior = self._latents(chunks_PK[has_label_P], generator, noise)
        cross_entropy = F.cross_entropy(
            self.decode(latents_PZ).flatten(0, 1).float(),
            labels_PK[has_label_P].flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
        )
        kl = floored_kl(posterior, config.kl_floor).sum()
        num_tokens, num_chunks = (
            self.count_targets(labels) if num_items_in_batch is None else num_items_in_batch
        )
        cross_entropy, kl = mean_over(cross_entropy, num_tokens), mean_over(kl, num_chunks)
        loss = config.chunk_size * cross_entropy + config.kl_weight * kl
        return AutoencoderOutput(loss=loss, cross_entropy=cross_entropy.detach(), kl=kl.detach())

    def _latents(
        self, chunks_PK: Tensor, generator: torch.Generator | None, noise: AutoencoderNoise | None
    ) -> tuple[Tensor, DiagonalGaussian]:
        """Latents to decode, and the posterior they come from."""
        if not self.training and noise is None:
            posterior = self.encode(chunks_PK)
            return posterior.mean, posterior
        noise = noise or self.draw_noise(chunks_PK, generator)
        inputs_PK = torch.where(noise.token_keep_PK, chunks_PK, self.config.dropped_token_id)
        posterior = self.encode(inputs_PK)
        latents = posterior.mean + posterior.std * noise.posterior_PZ
        return latents * noise.latent_keep_PZ / (1 - self.config.latent_dropout), posterior
