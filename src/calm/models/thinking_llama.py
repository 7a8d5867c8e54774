"""How a Llama generates after its thoughts: which arguments of transformers' `generate` work, and how.

transformers gets the prompt, a marker, n placeholders, another marker, and a cache that holds the thoughts.
So any other cache would change the text, and anything that counts or reads ids would see n + 2 too many.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from calm.core.chunks import as_id_tensor
from calm.models.generation.arguments import num_texts

_CACHES = "with thoughts, generate creates its own cache"
_DRAFTS = "drafting and contrastive methods would ignore the thoughts"
_PROMPTS = "with thoughts, prompts must be token ids, and positions come from the mask"
_IDS = "it would treat the thought placeholders as text"
_BEAMS = "beam search does not work with thoughts"
_REASONS: dict[str, tuple[str, ...]] = {
    _CACHES: ("past_key_values", "cache", "cache_implementation", "prefill_chunk_size"),
    _DRAFTS: ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "dola_layers",
              "penalty_alpha", "guidance_scale", "custom_generate"),
    _PROMPTS: ("inputs_embeds", "position_ids", "token_healing"),
    _IDS: ("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
           "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "forced_bos_token_id",
           "watermarking_config"),
    _BEAMS: ("num_beams", "num_beam_groups", "constraints", "force_words_ids"),
}  # fmt: skip
# At 1 these have no effect; any argument has none if it is false.
_NEUTRAL_AT_ONE = {"repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beams",
                   "num_beam_groups"}  # fmt: skip
_NAMES = list(inspect.signature(GenerationMixin.generate).parameters)[1:]


class Request:
    """Arguments of one `generate` call: keywords override its configuration, and that the model's."""

    def __init__(
        self, default: GenerationConfig, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        """Collect the arguments of `generate`, positional or by name.

        Raises:
            ValueError: If one of them does not work with thoughts.
        """
        self.arguments: dict[str, Any] = dict(zip(_NAMES, arguments, strict=False)) | keywords
        self._config: GenerationConfig | None = copy.deepcopy(self.arguments.pop("generation_config", None))
        self._default = default
        for reason, names in _REASONS.items():
            for name in names:
                if _has_effect(name, self.setting(name)):
                    raise ValueError(
                        f"{name} is not supported: {reason}; leave it out, or set num_thoughts=0."
                    )
        for name in ("past_key_values", "cache"):
            self.arguments.pop(name, None)  # None here; we pass our own.

    def setting(self, name: str) -> Any:
        """Value of an argument, wherever it is set; None if it is not."""
        if name in self.arguments:
            return self.arguments[name]
        value = getattr(self._config, name, None)
        return getattr(self._default, name, None) if value is None else value

    def override(self, name: str, value: Any) -> None:
        """Override an argument; None overrides as well."""
        # In the configuration if one is given: transformers warns about one combined with keywords.
        if self._config is not None:
            setattr(self._config, name, value)
        # But there, None would mean the model's default.
        if self._config is None or (value is None and getattr(self._default, name, None) is not None):
            self.arguments[name] = value
        else:
            self.arguments.pop(name, None)

    def prompts(self, config: PreTrainedConfig) -> tuple[Tensor, Tensor]:
        """Prompts and their mask, (B, T) each, with one row per requested text.

        Raises:
            ValueError: If there are none, or a model with this configuration cannot read them.
        """
        input_ids, ids_BT = self.arguments.pop("input_ids", None), self.arguments.pop("inputs", None)
        ids_BT = input_ids if ids_BT is None else ids_BT
        mask_BT = self.arguments.pop("attention_mask", None)
        if ids_BT is None:
            raise ValueError("with thoughts, prompts must be token ids: give input_ids.")
        if ids_BT.ndim != 2 or 0 in ids_BT.shape:
            raise ValueError(
                f"input_ids must have a non-empty shape (batch, tokens), got {tuple(ids_BT.shape)}."
            )
        least, most, size = int(ids_BT.min()), int(ids_BT.max()), config.get_text_config().vocab_size
        if least < 0 or most >= size:
            raise ValueError(
                f"token ids must be between 0 and {size - 1}, got {least} to {most}; is this the model's own "
                "tokenizer?"
            )
        mask_BT = self._default_mask(ids_BT) if mask_BT is None else mask_BT
        if mask_BT.shape != ids_BT.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(mask_BT.shape)}, input_ids {tuple(ids_BT.shape)}."
            )
        if not mask_BT.bool().any(-1).all():
            raise ValueError("a prompt is empty: start it with the BOS token.")
        num_copies = num_texts(self.setting("num_return_sequences"))
        self.override("num_return_sequences", 1)
        return ids_BT.repeat_interleave(num_copies, 0), mask_BT.repeat_interleave(num_copies, 0)

    def _default_mask(self, ids_BT: Tensor) -> Tensor:
        """The mask that transformers infers: padding is masked if its id is not also an EOS id."""
        pad, ends = self.setting("pad_token_id"), self.setting("eos_token_id")
        if pad is None or pad in as_id_tensor(ends, torch.device("cpu")).tolist():
            return torch.ones_like(ids_BT)
        return (ids_BT != pad).long()

    def num_new_tokens(self, num_tokens: int) -> int | None:
        """Most tokens to generate after a prompt of `num_tokens`; None if no limit is set.

        Raises:
            ValueError: If `max_length` leaves no room for any.
        """
        max_new_tokens: int | None = self.setting("max_new_tokens")
        max_length: int | None = self.setting("max_length")
        if max_new_tokens is not None or max_length is None:
            return max_new_tokens
        if max_length <= num_tokens:
            raise ValueError(
                f"max_length is {max_length}, but the prompt has {num_tokens} tokens; set "
                "max_new_tokens instead."
            )
        return max_length - num_tokens

    def hide_thoughts(self, prompt_BT: Tensor, num_columns: int) -> None:
        """Make length limits and everything that reads ids see the prompt without thoughts.

        Args:
            prompt_BT: The prompt as it was given.
            num_columns: Number of ids that transformers gets instead, with markers and placeholders.
        """
        extra, visible = num_columns - prompt_BT.shape[1], _VisibleIds(prompt_BT, num_columns)
        for name, preferred in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if self.setting(preferred) is None and self.setting(name):
                self.override(name, max(0, self.setting(name) + extra))
        if processors := self.arguments.get("logits_processor"):
            wrapped = [_WrappedProcessor(processor, visible) for processor in processors]
            self.arguments["logits_processor"] = LogitsProcessorList(wrapped)
        criteria = list(self.arguments.get("stopping_criteria") or [])
        if self.setting("stop_strings") is not None and self.arguments.get("tokenizer") is not None:
            criteria.append(StopStringCriteria(self.arguments["tokenizer"], self.setting("stop_strings")))
            self.override("stop_strings", None)
        if criteria:
            self.arguments["stopping_criteria"] = StoppingCriteriaList(map(visible.wrap_criterion, criteria))
        if (allowed_fn := self.arguments.get("prefix_allowed_tokens_fn")) is not None:
            self.arguments["prefix_allowed_tokens_fn"] = lambda row, ids_T: allowed_fn(
                row, torch.cat([prompt_BT[row], ids_T[num_columns:]])
            )
        if (streamer := self.arguments.get("streamer")) is not None:
            self.arguments["streamer"] = _PromptStreamer(streamer, prompt_BT)

    def keywords(self) -> dict[str, Any]:
        """All arguments, as keywords of `generate`."""
        return {"generation_config": self._config, **self.arguments}


def _has_effect(name: str, value: Any) -> bool:
    """Whether an argument with this value has any effect."""
    if name in ("past_key_values", "cache", "inputs_embeds", "position_ids"):
        return value is not None  # Empty caches are falsy, and tensors have no truth value.
    if name in ("bad_words_ids", "sequence_bias"):
        # Banning or biasing a single token does not depend on the ids before it, so only longer words count.
        words = [
            word[0] if name == "sequence_bias" and isinstance(value, list) else word for word in value or ()
        ]
        return any(len(word) > 1 for word in words)
    if name == "forced_bos_token_id":
        return value is not None
    return bool(value) and not (name in _NEUTRAL_AT_ONE and value == 1)


@dataclass(frozen=True)
class _VisibleIds:
    """The given prompt and the generated tokens, without markers and placeholders.

    Args:
        prompt_BT: The prompt as it was given.
        num_columns: Number of ids before the generated tokens, with markers and placeholders.
    """

    prompt_BT: Tensor
    num_columns: int

    def select(self, ids_BT: Tensor) -> Tensor:
        """The visible ids among all."""
        return torch.cat([self.prompt_BT, ids_BT[:, self.num_columns :]], dim=1)

    def wrap_criterion(self, criterion: Any) -> Any:
        """Wrap a stopping criterion so that it reads the visible ids."""
        # A criterion of a built-in type replaces transformers' own, so it must keep its type.
        if type(criterion) in (EosTokenCriteria, MaxTimeCriteria):
            return criterion
        if type(criterion) is MaxLengthCriteria:
            max_length = criterion.max_length + self.num_columns - self.prompt_BT.shape[1]
            return MaxLengthCriteria(max_length, criterion.max_position_embeddings)
        return _WrappedCriterion(criterion, self)


class _WrappedProcessor:
    def __init__(self, processor: Callable[[Tensor, Tensor], Tensor], visible: _VisibleIds) -> None:
        self._processor, self._visible = processor, visible

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._processor(self._visible.select(input_ids), scores)


class _WrappedCriterion:
    def __init__(self, criterion: Callable[..., Any], visible: _VisibleIds) -> None:
        self._criterion, self._visible = criterion, visible
        if hasattr(criterion, "eos_token_id"):  # Tells transformers that rows end separately.
            self.eos_token_id = criterion.eos_token_id

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self._criterion(self._visible.select(input_ids), scores, **kwargs)


class _PromptStreamer(BaseStreamer):
    """A streamer that passes on the prompt as it was given, without markers and placeholders."""

    def __init__(self, streamer: BaseStreamer, prompt_BT: Tensor) -> None:
        self._streamer, self._prompt_BT, self._has_begun = streamer, prompt_BT, False

    def put(self, value: Tensor) -> None:
        """Stream the prompt first, then new tokens."""
        self._streamer.put(value if self._has_begun else self._prompt_BT.cpu())
        self._has_begun = True

    def end(self) -> None:
        """Signal that the text has ended."""
        self._streamer.end()
