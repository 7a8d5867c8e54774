"""The token-level model that CALMs are compared with."""

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from calm.core.chunks import IGNORED_LABEL, align_to_chunks, mean_over, positions_of
from calm.core.cross_entropy import cross_entropy
from calm.core.distillation import distillation
from calm.models.caches import CACHE
from calm.models.context import check_room
from calm.models.distillation import TeacherOutput
from calm.models.saving import SavingMixin
from calm.models.thinking_llama import Request
from calm.models.thoughts import THOUGHT, Thinking, Thoughts, read_positions, scale_of, thoughts_for


class LlamaForCausalLM(SavingMixin, transformers.LlamaForCausalLM):
    """A Llama that trains on a CPU without all logits in memory, and supports continuous thoughts.

    It has the name of its parent class, which is what saved folders record: the parent can load them too.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        is_thought: Tensor | None = None,
        teacher_output: TeacherOutput | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """See `transformers.LlamaForCausalLM`.

        With a teacher, and in training with thoughts or on a CPU, only the loss is returned.

        Args:
            input_ids: Tokens (B, T).
            attention_mask: (B, T), 0 on padding.
            position_ids: Position of every token in its document (B, T).
            labels: Tokens (B, T) with -100 where there is no loss.
            num_items_in_batch: Divisor of the summed loss; the number of targets when None.
            is_thought: Which positions read the previous state instead of a token, (B, T); see
                `calm.models.thoughts`.
            teacher_output: A teacher's predictions for the batch; the loss is then that of
                `calm.models.distillation`.
            **others: As in the parent.

        Raises:
            ValueError: If thoughts are combined with gradient checkpointing (which drops their cache),
                several documents in a row, `inputs_embeds`, or outputs beyond loss, logits and cache.
        """
        # Parameters instead of `others`, because the Trainer passes only columns that the signature names.
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if is_thought is not None and is_thought.any():
            if teacher_output is not None:
                raise ValueError("a teacher is not supported with thoughts: leave out the teacher_output.")
            return self._forward_thinking(is_thought, inputs, labels, num_items_in_batch, others)
        if labels is not None and teacher_output is not None:
            states_BTD = self.model(**inputs, **others).last_hidden_state
            loss = self._loss(states_BTD, labels, num_items_in_batch, teacher_output)
            return CausalLMOutputWithPast(loss=loss)
        if labels is None or not (self.training and labels.is_cpu):
            if num_items_in_batch is not None:
                others["num_items_in_batch"] = num_items_in_batch
            return super().forward(**inputs, labels=labels, **others)

        # The parent computes other losses, and anything beyond the loss.
        parent_options = ("output_hidden_states", "output_attentions", "shift_labels", "logits_to_keep")
        if any(self._is_set(name, others) for name in parent_options) or not self._is_set(
            "return_dict", others
        ):
            return super().forward(**inputs, labels=labels, num_items_in_batch=num_items_in_batch, **others)
        states_BTD = self.model(**inputs, **others).last_hidden_state
        return CausalLMOutputWithPast(loss=self._loss(states_BTD, labels, num_items_in_batch))

    def _is_set(self, name: str, others: dict[str, Any]) -> bool:
        value = others.get(name)
        value = getattr(self.config, name, None) if value is None else value
        return value is not None and value is not False

    def _forward_thinking(
        self,
        is_thought: Tensor,
        inputs: dict[str, Any],
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None,
        others: dict[str, Any],
    ) -> CausalLMOutputWithPast:
        if inputs["input_ids"] is None or others.get("inputs_embeds") is not None:
            raise ValueError("rows with thoughts must be token ids: pass input_ids, not inputs_embeds.")
        unknown = others.keys() - {CACHE, "use_cache", "return_dict"}
        for name in ("output_hidden_states", "output_attentions", *sorted(unknown)):
            # logits_to_keep=0 asks for all logits, which are returned anyway.
            if self._is_set(name, others) and not (isinstance(others.get(name), int) and others[name] == 0):
                raise ValueError(f"{name} is not supported with thoughts: leave it out.")
        if not self._is_set("return_dict", others):
            raise ValueError("return_dict=False is not supported with thoughts: leave it out.")
        positions = inputs["position_ids"]
        if inputs["attention_mask"] is None and positions is not None and (positions[..., 1:] == 0).any():
            # With a cache, which thoughts need, transformers does not keep documents apart.
            raise ValueError(
                "rows with thoughts must hold one document each: position_ids must not restart within a row."
            )
        only_loss = labels is not None and self.training
        cache, use_cache = others.get(CACHE), others.get("use_cache")
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not only_loss)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        states_BTD = self.think(is_thought=is_thought, cache=cache, **inputs)
        loss = None if labels is None else self._loss(states_BTD, labels, num_items_in_batch)
        logits_BTV = None if only_loss else self.lm_head(states_BTD)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **{CACHE: cache if use_cache else None})

    def _loss(
        self,
        states_BTD: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None,
        teacher_output: TeacherOutput | None = None,
    ) -> Tensor:
        is_target_BT = labels[:, 1:] != IGNORED_LABEL
        targets_M = labels[:, 1:][is_target_BT]
        states_MD, head = states_BTD[:, :-1][is_target_BT], self.lm_head
        if teacher_output is not None:
            losses_M = distillation(states_MD, head.weight, targets_M, teacher_output.at_tokens(is_target_BT))
        elif type(head) is torch.nn.Linear:
            losses_M = cross_entropy(states_MD, head.weight, targets_M, head.bias)
        else:  # An adapter wraps the layer, and does more than multiply by its weight.
            losses_M = F.cross_entropy(head(states_MD).float(), targets_M, reduction="none")
        return mean_over(losses_M, num_items_in_batch)

    def think(
        self,
        input_ids: Tensor,
        is_thought: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """State of every position, (B, T, D), some of which are thoughts.

        The arguments are those of `forward`, and a cache to fill.
        """
        ids_BT = input_ids.masked_fill(is_thought, self.config.pad_token_id or 0)
        inputs_BTD = self.model.embed_tokens(ids_BT)
        thinking = Thinking(is_thought, scale_of(self.config))
        return read_positions(self.model, inputs_BTD, attention_mask, position_ids, cache, thinking)

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, *args: Any, num_thoughts: int | None = None, **kwargs: Any
    ) -> Any:
        """See `transformers.GenerationMixin.generate`; the model thinks before it generates.

        Args:
            inputs: Prompts (B, T).
            *args: As there.
            num_thoughts: Number of thoughts after each prompt: as many as in training when None; none when 0,
                as in the parent.
            **kwargs: As there. Caches, drafts, beams and penalties do not work with thoughts (see
                `calm.models.thinking_llama`); lengths, processors and criteria do not see the thoughts.

        Returns:
            Prompts with their continuations, without markers and thoughts.

        Raises:
            ValueError: If the number is out of range, another argument does not work with thoughts, or a
                prompt cannot be read.
        """
        thoughts = thoughts_for(self.config, num_thoughts, warns=True)
        if thoughts is None:
            return self._generate(inputs, *args, **kwargs)
        return self._generate_thinking(thoughts, inputs, *args, **kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()  # Type checkers do not see its `generate`.
        return parent.generate(*args, **kwargs)

    def _generate_thinking(self, thoughts: Thoughts, *args: Any, **kwargs: Any) -> Any:
        request = Request(self.generation_config, args, kwargs)
        ids_BT, mask_BT = request.prompts(self.config)
        prompt_BT, mask_BT = align_to_chunks(ids_BT, mask_BT, 1, self.config.pad_token_id or 0)
        num_prompt = prompt_BT.shape[1]
        thoughts_N = torch.tensor(thoughts.tokens(1), device=prompt_BT.device)
        input_BT = torch.cat([prompt_BT, thoughts_N.expand(len(prompt_BT), -1)], dim=1)
        mask_BT = torch.cat([mask_BT, torch.ones_like(input_BT[:, num_prompt:])], dim=1)
        num_new = request.num_new_tokens(ids_BT.shape[1]) or 1
        check_room(self.config, num_prompt, num_new, len(thoughts_N))
        cache = DynamicCache(config=self.config)
        position_BT = positions_of(mask_BT)
        # All but the last marker, which `generate` reads itself.
        read_BT = input_BT[:, :-1]
        self.think(read_BT, read_BT == THOUGHT, mask_BT[:, :-1], position_BT[:, :-1], cache)
        request.hide_thoughts(ids_BT, input_BT.shape[1])
        request.override("use_cache", True)
        output = self._generate(
            input_BT.masked_fill(input_BT == THOUGHT, thoughts.begin),
            attention_mask=mask_BT,
            **{CACHE: cache},
            **request.keywords(),
        )
        is_tensor = isinstance(output, Tensor)
        generated_BT = output if is_tensor else output.sequences
        sequences_BT = torch.cat([ids_BT, generated_BT[:, input_BT.shape[1] :]], dim=1)
        if is_tensor:
            return sequences_BT
        output.sequences = sequences_BT
        return output
