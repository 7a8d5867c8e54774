"""The model of tokens that CALM is compared with."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from calm.core.chunks import IGNORED_LABEL, align_to_chunks
from calm.core.cross_entropy import cross_entropy
from calm.models.caches import CACHE
from calm.models.context import check_room
from calm.models.thoughts import THOUGHT, Thinking, Thoughts, read_positions, scale_of, thoughts_for


class LlamaForCausalLM(transformers.LlamaForCausalLM):
    """A Llama that trains on a CPU without the scores of all tokens in memory, and can think.

    It bears the name of its parent, which its folder says and which reads it: the weights are the same.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        is_thought: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """See `transformers.LlamaForCausalLM`; where it trains on a CPU, there is a loss alone.

        Args:
            input_ids: Tokens (B, T).
            attention_mask: (B, T), 0 on padding.
            position_ids: Position of every token in its document (B, T).
            labels: Tokens (B, T) with -100 where there is no loss.
            num_items_in_batch: What the sum of the losses is divided by; their number when None.
            is_thought: Which positions read the state before them instead of a token, (B, T); see
                `calm.models.thoughts`.
            **others: As there.

        Raises:
            ValueError: If there are thoughts and gradients are checkpointed, which drops their cache.
        """
        # Not all of them in `others`: the Trainer hands over the columns that this function names.
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if is_thought is not None:
            assert input_ids is not None
            cache = others.get(CACHE)
            states_BTD = self.think(input_ids, is_thought, attention_mask, position_ids, cache)
            loss = None if labels is None else self._loss(states_BTD, labels, num_items_in_batch)
            logits_BTV = None if loss is not None and self.training else self.lm_head(states_BTD)
            return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **{CACHE: cache})
        if labels is None or not (self.training and labels.is_cpu):
            if num_items_in_batch is not None:
                others["num_items_in_batch"] = num_items_in_batch
            return super().forward(**inputs, labels=labels, **others)

        def is_set(name: str) -> bool:
            value = others.get(name)
            value = getattr(self.config, name, None) if value is None else value
            return value is not None and value is not False

        # More than the loss, or another loss, is the parent's to find.
        asked = ("output_hidden_states", "output_attentions", "shift_labels", "logits_to_keep")
        if any(is_set(name) for name in asked) or not is_set("return_dict"):
            return super().forward(**inputs, labels=labels, num_items_in_batch=num_items_in_batch, **others)
        states_BTD = self.model(**inputs, **others).last_hidden_state
        return CausalLMOutputWithPast(loss=self._loss(states_BTD, labels, num_items_in_batch))

    def _loss(self, states_BTD: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        is_target_BT = labels[:, 1:] != IGNORED_LABEL
        targets_M = labels[:, 1:][is_target_BT]
        losses_M = cross_entropy(states_BTD[:, :-1][is_target_BT], self.lm_head.weight, targets_M)
        count = max(len(losses_M), 1) if num_items_in_batch is None else num_items_in_batch
        return losses_M.sum() / count

    def think(
        self,
        input_ids: Tensor,
        is_thought: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """State of every position, (B, T, D), some of which are thoughts.

        The arguments are those of `forward`, and a cache, which is filled.
        """
        ids_BT = input_ids.masked_fill(is_thought, self.config.pad_token_id or 0)
        inputs_BTD = self.model.embed_tokens(ids_BT)
        thinking = Thinking(is_thought, scale_of(self.config))
        return read_positions(self.model, inputs_BTD, attention_mask, position_ids, cache, thinking)

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, *args: Any, num_thoughts: int | None = None, **kwargs: Any
    ) -> Any:
        """See `transformers.GenerationMixin.generate`; before it writes, it thinks.

        Args:
            inputs: Prompts (B, T).
            *args: As there.
            num_thoughts: Thoughts after each prompt. None takes as many as the model was trained with, 0 is
                the ordinary model.
            **kwargs: As there. `num_beams` and `inputs_embeds` do not go with thoughts.

        Returns:
            Prompts with their continuations; markers and thoughts are not shown.

        Raises:
            ValueError: If the number is out of range, or thoughts do not go with another argument.
        """
        thoughts = thoughts_for(self.config, num_thoughts, warns=True)
        if thoughts is None:
            return self._generate(inputs, *args, **kwargs)
        return self._generate_thinking(thoughts, inputs, *args, **kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()  # By its type this class could not write.
        return parent.generate(*args, **kwargs)

    def _generate_thinking(
        self,
        thoughts: Thoughts,
        inputs: Tensor | None = None,
        generation_config: transformers.GenerationConfig | None = None,
        *args: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> Any:
        ids_BT = input_ids if inputs is None else inputs
        if ids_BT is None:
            raise ValueError("a model that thinks needs a prompt of tokens: give input_ids.")

        def setting(name: str) -> Any:
            return kwargs.get(name, getattr(generation_config or self.generation_config, name, None))

        if (setting("num_beams") or 1) > 1:
            raise ValueError("beams do not go with thoughts; leave num_beams out.")
        copies = setting("num_return_sequences") or 1
        mask_BT = torch.ones_like(ids_BT) if attention_mask is None else attention_mask
        ids_BT, mask_BT = ids_BT.repeat_interleave(copies, 0), mask_BT.repeat_interleave(copies, 0)
        if kwargs.get("max_new_tokens") is None and (longest := kwargs.pop("max_length", None)) is not None:
            kwargs["max_new_tokens"] = max(1, longest - ids_BT.shape[1])
        all_BT, mask_BT = align_to_chunks(ids_BT, mask_BT, 1, self.config.pad_token_id or 0)
        tokens_N = torch.tensor(thoughts.tokens(1), device=all_BT.device)
        all_BT = torch.cat([all_BT, tokens_N.expand(len(all_BT), -1)], dim=1)
        mask_BT = torch.cat([mask_BT, torch.ones_like(all_BT[:, mask_BT.shape[1] :])], dim=1)
        num_new = kwargs.get("max_new_tokens") or 1
        check_room(self.config, all_BT.shape[1] - len(tokens_N), num_new, len(tokens_N))
        cache = DynamicCache(config=self.config)
        position_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
        # All but the last: its state is what `generate` begins with.
        read_BT = all_BT[:, :-1]
        self.think(read_BT, read_BT == THOUGHT, mask_BT[:, :-1], position_BT[:, :-1], cache)
        shown = None if streamer is None else _WithPrompt(streamer, ids_BT)
        outcome = self._generate(
            all_BT.masked_fill(all_BT == THOUGHT, thoughts.begin),
            generation_config,
            *args,
            attention_mask=mask_BT,
            streamer=shown,
            **{**kwargs, "num_return_sequences": 1, CACHE: cache},
        )
        is_tensor = isinstance(outcome, Tensor)
        written_BT = outcome if is_tensor else outcome.sequences
        sequences_BT = torch.cat([ids_BT, written_BT[:, all_BT.shape[1] :]], dim=1)
        if is_tensor:
            return sequences_BT
        outcome.sequences = sequences_BT
        return outcome


class _WithPrompt(BaseStreamer):
    """A streamer that is shown the prompt as it was given, without what stands for thoughts."""

    def __init__(self, streamer: BaseStreamer, prompt_BT: Tensor) -> None:
        self._streamer, self._prompt_BT, self._has_begun = streamer, prompt_BT, False

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then new tokens."""
        self._streamer.put(value if self._has_begun else self._prompt_BT.cpu())
        self._has_begun = True

    def end(self) -> None:
        """Tell that the text has ended."""
        self._streamer.end()
