"""CALM: a Llama-style decoder over chunks that predicts the next latent (paper section 3).

Shapes: B batch, T tokens, K tokens per chunk, C chunks, P positions, D hidden size, Z latent size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import ModelOutput

from calm.core.chunks import IGNORED_LABEL, find_targets, mean_over, split_into_chunks
from calm.core.gaussian import DiagonalGaussian
from calm.models.attention import add_qk_norm
from calm.models.autoencoder import CalmAutoencoder
from calm.models.blocks import ChunkProjection, LastTokenProjection, ZeroLinear
from calm.models.configuration import CalmConfig
from calm.models.distillation import TeacherOutput, distillation_losses
from calm.models.generation.generate import ChunkGenerationMixin
from calm.models.heads import GenerativeHead, Target, build_head
from calm.models.saving import SavingMixin
from calm.models.thoughts import Thinking, read_positions, scale_of
from calm.models.token_layers import TokenLayer

_NO_INPUTS_EMBEDS = (
    "a CALM does not accept inputs_embeds, because it reads whole chunks of tokens. Prompt and prefix tuning "
    "therefore do not work, but low-rank adapters do."
)


@dataclass
class CalmOutput(ModelOutput):
    """Output of a forward pass.

    Args:
        loss: Mean loss of the head over the target chunks; only with labels.
        last_hidden_state: State of every chunk, shape (B, C, D), with D the configuration's `state_size`:
            the backbone's state, followed by the head's own embedding of the chunk if it has one.
        cache: Key-value cache, if one was used.
    """

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    cache: Cache | None = None

    @property
    def past_key_values(self) -> Cache | None:
        """The cache, under its name in transformers before 5.24."""
        return self.cache


class ChunkBackbone(LlamaModel):
    """The decoder over chunks: a `LlamaModel` with its own initial standard deviation for token embeddings.

    Its layers normalize queries and keys if the configuration says so.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            add_qk_norm(layer, config, index)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.embed_tokens:
            init.normal_(module.weight, std=self.config.embedding_initializer_range)
            is_loaded = getattr(module.weight, "_is_hf_initialized", False)
            if self.padding_idx is not None and not is_loaded:
                init.zeros_(module.weight[self.padding_idx])


class CalmForCausalLM(ChunkGenerationMixin, SavingMixin, PreTrainedModel):
    """Continuous autoregressive language model with its frozen autoencoder inside."""

    config: CalmConfig
    config_class = CalmConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # transformers' Trainer would divide by tokens; our trainer divides by what the loss is a mean over.
    accepts_loss_kwargs = False
    _no_split_modules = ["LlamaDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: CalmConfig) -> None:
        super().__init__(config)
        self.autoencoder = CalmAutoencoder(config.autoencoder)
        self.backbone = ChunkBackbone(config.backbone)
        if not config.final_norm:
            self.backbone.norm = nn.Identity()  # type: ignore[assignment]
        self.projection: ChunkProjection | LastTokenProjection
        if config.input_projection == "mlp":
            self.projection = ChunkProjection(config.input_size, config.hidden_size, config.layer_norm_eps)
        else:
            self.projection = LastTokenProjection(config.input_size, config.hidden_size)
        self.head: GenerativeHead = build_head(config.head, config.hidden_size, config.latent_size)
        self.head.attach(self.autoencoder)
        self.head.attach_backbone(self.backbone)
        self.post_init()
        self._freeze_unused()
        self.generation_config = GenerationConfig(
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            do_sample=True,
            temperature=0.5,  # Above that, text is hardly fluent (paper, section 5).
        )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
        if isinstance(module, TokenLayer):
            for sink in module.sinks:
                init.zeros_(sink)

    def _freeze_unused(self) -> None:
        self.autoencoder.requires_grad_(False).eval()
        if not (self.config.reads_tokens or self.head.shares_embeddings):
            self.backbone.embed_tokens.requires_grad_(False)

    def train(self, mode: bool = True) -> "CalmForCausalLM":
        """Set the mode of backbone and head; the autoencoder stays frozen and in eval mode."""
        super().train(mode)
        self._freeze_unused()
        return self

    def change_sampling(self, **changes: Any) -> None:
        """Change how the trained head samples; see `CalmConfig.change_sampling`."""
        self.config.change_sampling(**changes)
        self.head.config = self.config.head

    def change_training(self, **changes: Any) -> None:
        """Change how the head is trained from now on; see `CalmConfig.change_training`."""
        self.config.change_training(**changes)
        self.head.config = self.config.head

    def get_input_embeddings(self) -> nn.Embedding:
        """The model's own token embedding (not the autoencoder's)."""
        return self.backbone.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.backbone.set_input_embeddings(value)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """The token embedding; it cannot be resized, since the autoencoder was trained with its vocabulary.

        Raises:
            ValueError: If another size is asked for.
        """
        size = new_num_tokens or self.config.vocab_size
        size = -(-size // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        if size != self.config.vocab_size:
            raise ValueError(
                f"the vocabulary cannot be resized from {self.config.vocab_size} to {size} tokens: the "
                "model's autoencoder was trained with it. Retrain both with a tokenizer that has them."
            )
        return self.get_input_embeddings()

    def get_submodule(self, target: str) -> nn.Module:
        """A submodule, by its dotted name.

        Raises:
            ValueError: If peft looks for the embeddings of a learned prompt, which a CALM cannot take.
        """
        if target == "embeddings.word_embeddings":  # peft looks this up first for prompt tuning.
            raise ValueError(_NO_INPUTS_EMBEDS)
        return super().get_submodule(target)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **arguments: Any) -> dict[str, Any]:
        """Return the arguments unchanged. Wrappers such as peft's need this method; `generate` does not."""
        return {"input_ids": input_ids, **arguments}

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        generator: torch.Generator | None = None,
        noise: Any = None,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,
        is_thought: Tensor | None = None,
        state_before: Tensor | None = None,
        teacher_output: TeacherOutput | None = None,
        **others: Any,
    ) -> CalmOutput:
        """Compute the state of every chunk and, with labels, the head's loss for predicting the next chunks.

        Args:
            input_ids: Tokens (B, T), T a multiple of K.
            labels: Tokens (B, T) with -100 on padding. Chunk i + 1 is predicted from chunk i if it
                has a label and belongs to the same document (see `find_targets`).
            attention_mask: (B, T), 0 on padding; a chunk is masked only if all its tokens are.
            position_ids: Position of every chunk in its document (B, C). Each 0 starts a new
                document, which does not see the previous one.
            cache: Cache of earlier chunks, to which these are added.
            use_cache: Whether to return a cache if none is given.
            num_items_in_batch: Target chunks in the whole optimizer step; the summed loss is
                divided by it (the mean over this batch when None).
            generator: Source of the head's training noise; the default generator when None.
            noise: Recorded training noise of the head.
            return_dict: Ignored; accepted because wrappers pass it. The output is always a `CalmOutput`.
            past_key_values: `cache`, under its name in transformers before 5.24.
            is_thought: Which chunks read the previous state instead of tokens, (B, C); see
                `calm.models.thoughts`.
            state_before: State (B, D) before the first chunk, for rows that start with a thought.
            teacher_output: A teacher's predictions for the batch; the loss is then that of
                `calm.models.distillation`.
            **others: Other arguments of wrappers, such as peft's `inputs_embeds`; must be None or False.

        Raises:
            ValueError: If T is not a multiple of K, an argument is unknown, a row with thoughts holds
                several documents, thoughts are combined with gradient checkpointing (which drops the cache
                that they need), or the head cannot learn from a teacher.
        """
        _check_unused(others)
        chunks_BCK = split_into_chunks(input_ids, self.config.chunk_size)
        thinking = None
        if is_thought is not None and bool(is_thought.any()):
            if attention_mask is None and position_ids is not None and bool((position_ids[:, 1:] == 0).any()):
                raise ValueError(
                    "a row with thoughts must hold one document, because thoughts need a KV cache."
                )
            chunks_BCK = chunks_BCK.masked_fill(is_thought.unsqueeze(-1), self.config.pad_token_id or 0)
            thinking = Thinking(is_thought, scale_of(self.config), state_before)
        posterior_BCZ = self._encode(chunks_BCK) if self.config.reads_latents else None
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config.backbone)
        states_BCD = self._states(
            chunks_BCK, self._chunk_mask(attention_mask), position_ids, cache, posterior_BCZ, thinking
        )
        output = CalmOutput(last_hidden_state=states_BCD, cache=cache)
        if labels is None:
            return output
        is_target_BC = find_targets(labels, position_ids, self.config.chunk_size)
        tokens_PK = self._targets(chunks_BCK, labels)[:, 1:][is_target_BC]
        states_PD = states_BCD[:, :-1][is_target_BC]
        if teacher_output is None:
            inputs_PK = chunks_BCK[:, 1:][is_target_BC]
            if posterior_BCZ is not None and torch.equal(inputs_PK, tokens_PK):
                posterior_PZ = posterior_BCZ[:, 1:][is_target_BC]
            else:
                posterior_PZ = self._encode(tokens_PK)
            loss_P = self.head.loss(states_PD, Target(posterior_PZ, tokens_PK), noise, generator)
        else:
            loss_P = distillation_losses(
                self.head, states_PD, tokens_PK, teacher_output, is_target_BC, labels
            )
        output.loss = mean_over(loss_P, num_items_in_batch)
        return output

    def _targets(self, chunks_BCK: Tensor, labels_BT: Tensor) -> Tensor:
        """Tokens to predict, (B, C, K): those of the input, or of the step that supervises a thought."""
        labels_BCK = split_into_chunks(labels_BT, self.config.chunk_size)
        has_label_BCK = labels_BCK != IGNORED_LABEL
        # Labels differ from the input only at thoughts that are supervised with a step.
        is_step_BC1 = (has_label_BCK & (labels_BCK != chunks_BCK)).any(-1, keepdim=True)
        steps_BCK = labels_BCK.masked_fill(~has_label_BCK, self.config.pad_token_id or 0)
        return torch.where(is_step_BC1, steps_BCK, chunks_BCK)

    def count_targets(self, labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Denominator of the loss: the number of predicted chunks."""
        return find_targets(labels, position_ids, self.config.chunk_size).sum()

    def draw_training_noise(
        self,
        generators: Sequence[torch.Generator],
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """Sample the `noise` of a training forward pass, separately for each row of the batch.

        Args:
            generators: One per row, on the model's device.
            input_ids: As in `forward`.
            labels: As in `forward`.
            position_ids: As in `forward`.
        """
        counts_B = find_targets(labels, position_ids, self.config.chunk_size).sum(-1).tolist()
        rows: list[Any] = [
            self.head.draw_noise(count, generator, input_ids.device)
            for count, generator in zip(counts_B, generators, strict=True)
        ]
        if rows[0] is None:
            return None
        if not isinstance(rows[0], tuple):
            raise TypeError(
                f"{type(self.head).__name__}.draw_noise must return a named tuple of tensors or None, "
                f"not a {type(rows[0]).__name__}."
            )
        noise_class: Any = type(rows[0])
        return noise_class(
            *(None if parts[0] is None else torch.cat(parts, dim=1) for parts in zip(*rows, strict=True))
        )

    def hidden_states_of_chunks(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """State of every chunk, (B, C, D), as in `CalmOutput`; state i predicts chunk i + 1."""
        return self.forward_chunks(input_ids, self._chunk_mask(attention_mask), position_ids)

    def forward_chunks(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """State of every chunk, (B, C, D), continuing from a cache, to which the chunks are added.

        Args:
            input_ids: Tokens (B, T), T a multiple of K.
            mask: Chunk mask, cached chunks included: (B, all chunks), or 4D, added to attention scores.
            position_ids: Position of every chunk (B, C).
            cache: Cache of earlier chunks.
        """
        chunks_BCK = split_into_chunks(input_ids, self.config.chunk_size)
        return self._states(chunks_BCK, mask, position_ids, cache)

    def _chunk_mask(self, mask_BT: Tensor | None) -> Tensor | None:
        return None if mask_BT is None else split_into_chunks(mask_BT, self.config.chunk_size).amax(-1)

    def _states(
        self,
        chunks_BCK: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        posterior_BCZ: DiagonalGaussian | None = None,
        thinking: Thinking | None = None,
    ) -> Tensor:
        """State of every chunk: the backbone's, followed by the head's own embedding if it has one."""
        inputs_BCD = self.embed_chunks(chunks_BCK, posterior_BCZ)
        states_BCD = read_positions(self.backbone, inputs_BCD, mask, position_ids, cache, thinking)
        extra_BCX = self.head.embed_chunks(chunks_BCK)
        return states_BCD if extra_BCX is None else torch.cat([states_BCD, extra_BCX], dim=-1)

    def embed_chunks(self, chunks_BCK: Tensor, posterior_BCZ: DiagonalGaussian | None = None) -> Tensor:
        """The backbone's input for each chunk, (B, C, D).

        Args:
            chunks_BCK: Tokens of the chunks; any leading axes.
            posterior_BCZ: Their posterior, if already computed.
        """
        parts = []
        if self.config.reads_tokens:
            parts.append(self.backbone.embed_tokens(chunks_BCK).flatten(-2))
        if self.config.reads_latents:
            parts.append((posterior_BCZ or self._encode(chunks_BCK)).mean)
        return self.projection(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))

    @torch.no_grad()
    def _encode(self, chunks_PK: Tensor) -> DiagonalGaussian:
        """Posterior of each chunk, (P, Z), for any leading axes P."""
        return self.autoencoder.encode(chunks_PK)


def _check_unused(arguments: dict[str, Any]) -> None:
    """Raise ValueError if an unsupported argument is set."""
    unsupported = [name for name, value in arguments.items() if value is not None and value is not False]
    if "inputs_embeds" in unsupported:
        raise ValueError(_NO_INPUTS_EMBEDS)
    if unsupported:
        raise ValueError(f"forward() does not support the argument(s): {', '.join(unsupported)}.")
