"""Writing text chunk by chunk, in the manner of `GenerationMixin.generate`.

Shapes: B batch, T tokens, K tokens per chunk, C chunks, D hidden size, N draws.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from calm.core.chunks import align_to_chunks, as_id_tensor, end_after_eos
from calm.core.temperature import inverse_temperature, sample_from_pool

if TYPE_CHECKING:
    from calm.models.calm import CalmForCausalLM

DEFAULT_MAX_NEW_TOKENS = 128
DEFAULT_NUM_DRAWS = 200  # The paper's pool for T = 0.5.


class ChunkGenerationMixin:
    """`generate` for models that predict chunks."""

    @torch.no_grad()
    def generate(
        self: "CalmForCausalLM",
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        *,
        num_draws: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Continue each prompt by chunks until EOS or `max_new_tokens`.

        Padding of a prompt goes in front of it, so that it ends on a chunk boundary; the model has
        seen this in training, where documents start at a random offset inside their first chunk.

        Args:
            input_ids: Prompts (B, T), padded on either side where `attention_mask` is 0; one
                beginning-of-text token when None.
            attention_mask: (B, T), 1 on tokens of the prompt.
            generation_config: Defaults to the model's; keyword arguments override it. Used are
                `max_new_tokens` (or `max_length`), `temperature` (1, 1/2, 1/3, ...),
                `num_return_sequences`, `use_cache`, `eos_token_id`, `pad_token_id`.
                `do_sample=False` asks for a mode that no likelihood-free model has, and is an error.
            streamer: Receives the new tokens as they are written (batch of one).
            num_draws: Pool size N at temperatures below 1.
            seed: Makes the text repeatable; alternative to `generator`.
            generator: Source of randomness on the model's device.
            **kwargs: Changes of the generation config.

        Returns:
            Prompts with their continuations (B, T + new); rows that ended are filled with padding.

        Raises:
            ValueError: If an argument is out of range, unknown or contradicts another.
        """
        config = self._generation_settings(generation_config, kwargs)
        n = inverse_temperature(config.temperature)
        pool = 1 if n == 1 else (num_draws or DEFAULT_NUM_DRAWS)
        if pool < n:
            raise ValueError(
                f"a temperature of {config.temperature:g} needs at least {n} draws, got num_draws={pool}."
            )
        prompt_BT, mask_BT = self._prompts(input_ids, attention_mask, config.num_return_sequences or 1)
        if generator is None and seed is not None:
            generator = torch.Generator(self.device).manual_seed(seed)
        budget = _num_new_tokens(config, prompt_BT.shape[1])
        if streamer is not None:
            if prompt_BT.shape[0] > 1:
                raise ValueError("a streamer takes one prompt at a time.")
            streamer.put(prompt_BT.cpu())
        new_tokens = self._write(prompt_BT, mask_BT, budget, config, pool, generator, streamer)
        if streamer is not None:
            streamer.end()
        return torch.cat([prompt_BT, new_tokens], dim=1)

    def _generation_settings(
        self: "CalmForCausalLM", config: GenerationConfig | None, overrides: dict[str, Any]
    ) -> GenerationConfig:
        config = copy.deepcopy(config or self.generation_config)
        if overrides.get("max_new_tokens") is None and "max_length" in overrides:
            config.max_new_tokens = None
        config.do_sample = True  # Else transformers warns about every temperature.
        unused = config.update(**overrides)
        if unused:
            raise ValueError(f"generate() does not know the argument(s): {', '.join(sorted(unused))}.")
        if config.do_sample is False and "do_sample" in overrides:
            raise ValueError("there is no greedy decoding without likelihoods: set a low temperature.")
        if (config.num_beams or 1) > 1:
            raise ValueError("beam search needs likelihoods, which this model does not have.")
        config.temperature = 1.0 if config.temperature is None else config.temperature
        if config.eos_token_id is None:
            config.eos_token_id = self.config.eos_token_id
        if config.pad_token_id is None:
            config.pad_token_id = self.config.pad_token_id
        return config

    def _prompts(
        self: "CalmForCausalLM", input_ids: Tensor | None, attention_mask: Tensor | None, copies: int
    ) -> tuple[Tensor, Tensor]:
        """Prompt tokens and mask, (B · copies, T) each."""
        if input_ids is None:
            if self.config.bos_token_id is None:
                raise ValueError("give a prompt: this model has no beginning-of-text token.")
            input_ids = torch.tensor([[self.config.bos_token_id]], device=self.device)
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids must be (batch, tokens), not empty; got {tuple(input_ids.shape)}.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}."
            )
        if not attention_mask.bool().any(-1).all():
            raise ValueError("a prompt has no token: begin it with the beginning-of-text token.")
        return input_ids.repeat_interleave(copies, 0), attention_mask.repeat_interleave(copies, 0)

    def _write(
        self: "CalmForCausalLM",
        prompt_BT: Tensor,
        mask_BT: Tensor,
        budget: int,
        config: GenerationConfig,
        pool: int,
        generator: torch.Generator | None,
        streamer: BaseStreamer | None,
    ) -> Tensor:
        """New tokens of each row, (B, new) with new <= budget."""
        size = self.config.chunk_size
        pad = 0 if config.pad_token_id is None else config.pad_token_id
        eos_ids = as_id_tensor(config.eos_token_id, prompt_BT.device)
        tokens_BT, mask_BC = align_to_chunks(prompt_BT, mask_BT, size, pad)
        position_BC = (mask_BC.cumsum(-1) - 1).clamp_min(0)
        cache = DynamicCache(config=self.config.backbone) if config.use_cache is not False else None
        done_B = torch.zeros(len(prompt_BT), dtype=torch.bool, device=prompt_BT.device)
        written: list[Tensor] = []
        fresh_BT = tokens_BT
        for start in range(0, budget, size):
            inputs = tokens_BT if cache is None else fresh_BT
            hidden_BD = self._run_backbone(
                inputs,
                mask_BC,
                position_BC if cache is None else position_BC[:, -(inputs.shape[1] // size) :],
                cache,
                cache is not None,
            ).last_hidden_state[:, -1]
            chunk_BK = self.sample_chunks(hidden_BD, config.temperature, pool, generator)
            chunk_BK, ends_B = end_after_eos(chunk_BK, eos_ids, pad)
            chunk_BK = torch.where(done_B.unsqueeze(-1), pad, chunk_BK)
            shown_BK = chunk_BK[:, : budget - start]
            written.append(shown_BK)
            if streamer is not None:
                for token in shown_BK[0].cpu():
                    streamer.put(token.unsqueeze(0))
                    if torch.isin(token, eos_ids.cpu()):
                        break
            done_B = done_B | ends_B
            if done_B.all():
                break
            fresh_BT = chunk_BK
            tokens_BT = torch.cat([tokens_BT, chunk_BK], dim=1)
            mask_BC = torch.cat([mask_BC, torch.ones_like(mask_BC[:, :1])], dim=1)
            position_BC = torch.cat([position_BC, position_BC[:, -1:] + 1], dim=1)
        return _trim(torch.cat(written, dim=1), done_B, eos_ids)

    def sample_chunks(
        self: "CalmForCausalLM",
        hidden_PD: Tensor,
        temperature: float = 1.0,
        num_draws: int = DEFAULT_NUM_DRAWS,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One next chunk for every backbone state, (P, K).

        Args:
            hidden_PD: States of the last chunk.
            temperature: 1, 1/2, 1/3, ...; below 1 by the pool rule of `calm.core.temperature`.
            num_draws: Pool size at temperatures below 1.
            generator: Source of randomness.
        """
        if inverse_temperature(temperature) == 1:
            return self.draw_chunks(hidden_PD, 1, generator)[0]
        return sample_from_pool(self.draw_chunks(hidden_PD, num_draws, generator), temperature, generator)

    def draw_chunks(
        self: "CalmForCausalLM", hidden_PD: Tensor, num_draws: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Independent draws of the next chunk at temperature 1, (N, P, K)."""
        return self.autoencoder.decode_tokens(self.head.sample(hidden_PD, num_draws, generator))


def _num_new_tokens(config: GenerationConfig, prompt_length: int) -> int:
    if config.max_new_tokens is not None:
        budget = config.max_new_tokens
    elif config.max_length is not None:
        budget = config.max_length - prompt_length
    else:
        budget = DEFAULT_MAX_NEW_TOKENS
    if budget < 1:
        raise ValueError(
            f"there is no room for new tokens: max_new_tokens is {budget}; it must be at least 1."
        )
    return budget


def _trim(tokens_BT: Tensor, done_B: Tensor, eos_ids: Tensor) -> Tensor:
    """Cut the columns after the last EOS where every row has ended."""
    if not bool(done_B.all()):
        return tokens_BT
    is_eos = torch.isin(tokens_BT, eos_ids)
    return tokens_BT[:, : int(is_eos.any(0).nonzero().max()) + 1] if bool(is_eos.any()) else tokens_BT
