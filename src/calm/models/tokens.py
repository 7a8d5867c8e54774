"""The model of tokens that CALM is compared with."""

from typing import Any

import transformers
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from calm.core.chunks import IGNORED_LABEL
from calm.core.cross_entropy import cross_entropy


class LlamaForCausalLM(transformers.LlamaForCausalLM):
    """A Llama that trains on a CPU without the scores of all tokens in memory.

    It bears the name of its parent, which its folder says and which reads it.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """See `transformers.LlamaForCausalLM`; where it trains on a CPU, there is a loss alone.

        Args:
            input_ids: Tokens (B, T).
            attention_mask: (B, T), 0 on padding.
            position_ids: Position of every token in its document (B, T).
            labels: Tokens (B, T) with -100 where there is no loss.
            num_items_in_batch: What the sum of the losses is divided by; their number when None.
            **others: As there.
        """
        # Not all of them in `others`: the Trainer hands over the columns that this function names.
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
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
        is_target_BT = labels[:, 1:] != IGNORED_LABEL
        targets_M = labels[:, 1:][is_target_BT]
        losses_M = cross_entropy(states_BTD[:, :-1][is_target_BT], self.lm_head.weight, targets_M)
        count = max(len(losses_M), 1) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=losses_M.sum() / count)
