"""Distillation: a teacher's predictions for a batch, and the loss of a CALM or token-level model on them.

The teacher is a token-level Transformer, which gives the distribution of every token given those before it
in its document. A model with token distributions learns from them at every position of every target chunk
(docs/uptraining.md).

Shapes: B batch, T tokens, K tokens per chunk, C chunks, P target chunks, D hidden size of both, Y size of the
teacher's states, U its vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from calm.core.chunks import IGNORED_LABEL, split_into_chunks
from calm.core.distillation import SoftTargets
from calm.models.heads import Distillable, GenerativeHead


class TeacherOutput(NamedTuple):
    """A teacher's predictions for a batch.

    Args:
        states_BTY: Its state at each token, which predicts the next one.
        table_UY: Its output embeddings: a token's logit is the product of its row and the state.
        bias_U: Added to the logits.
        weight: Its share of the loss, from 0 to 1; the rest is cross-entropy.
        temperature: Divides the logits of both models.
        hidden_BTD: Its states after the layer at which the student's backbone ends; None if they are not
            used.
        hidden_weight: Weight in the loss of the distance between the backbone's states and these.
    """

    states_BTY: Tensor
    table_UY: Tensor
    bias_U: Tensor | None
    weight: float
    temperature: float = 1.0
    hidden_BTD: Tensor | None = None
    hidden_weight: float = 0.0

    def at_tokens(self, is_target: Tensor) -> SoftTargets:
        """Soft targets (M rows) of those of the tokens 1..T-1 that `is_target` (B, T - 1) marks."""
        states_MY = self.states_BTY[:, :-1][is_target]
        weights_M = torch.full_like(states_MY[:, 0], self.weight, dtype=torch.float32)
        return SoftTargets(states_MY, self.table_UY, self.bias_U, weights_M, self.temperature)

    def at_chunks(self, is_target_BC: Tensor, labels_BT: Tensor, chunk_size: int) -> SoftTargets:
        """Soft targets (P·K rows) of all tokens of those of the chunks 1..C-1 that are targets.

        What follows the end of a text in its last chunk is padding, which no teacher predicts: there the loss
        is cross-entropy alone.
        """
        # The state at a token predicts the next one, so the states for a chunk start one token earlier.
        before_BCKY = self.states_BTY[:, chunk_size - 1 : -1].unflatten(1, (-1, chunk_size))
        has_label_BCK = split_into_chunks(labels_BT, chunk_size)[:, 1:] != IGNORED_LABEL
        weights_PK = self.weight * has_label_BCK[is_target_BC].float()
        states_MY = before_BCKY[is_target_BC].flatten(0, 1)
        return SoftTargets(states_MY, self.table_UY, self.bias_U, weights_PK.flatten(), self.temperature)

    def distances(self, states_PD: Tensor, is_target_BC: Tensor, chunk_size: int) -> Tensor:
        """Squared distance of the backbone's states from the teacher's at the last token of each chunk, (P,).

        It is relative to the teacher's squared norm: 0 for the same state, 1 for a zero state.
        States grow from layer to layer, and at some tokens a few entries are hundreds of times as large as
        elsewhere; a relative distance weights all chunks equally, whatever the layer and the rest of the
        batch.

        Args:
            states_PD: Backbone states that predict the target chunks, without the head's own embedding.
            is_target_BC: Which of the chunks 1..C-1 are targets.
            chunk_size: Tokens per chunk K.
        """
        assert self.hidden_BTD is not None
        teacher_BCD = self.hidden_BTD[:, chunk_size - 1 :: chunk_size]
        teacher_PD = teacher_BCD[:, :-1][is_target_BC].float()
        distance_P = (states_PD.float() - teacher_PD).square().sum(-1)
        return distance_P / teacher_PD.square().sum(-1)


def distillation_losses(
    head: GenerativeHead,
    states_PD: Tensor,
    tokens_PK: Tensor,
    teacher_output: TeacherOutput,
    is_target_BC: Tensor,
    labels: Tensor,
) -> Tensor:
    """Loss of a CALM with a teacher at each target chunk, (P,).

    It is the mean over the chunk's tokens, plus the weighted distance of the states if the teacher gives any.

    Args:
        head: Its head.
        states_PD: States that predict the chunks.
        tokens_PK: The tokens of the chunks.
        teacher_output: The teacher's predictions for the batch.
        is_target_BC: Which of the chunks 1..C-1 are targets.
        labels: Tokens (B, T) with -100 on padding.

    Raises:
        ValueError: If the head has no token distributions.
    """
    if not isinstance(head, Distillable):
        raise ValueError(f"a {head.config.head_type} head has no token distributions to learn.")
    chunk_size = tokens_PK.shape[-1]
    soft_targets = teacher_output.at_chunks(is_target_BC, labels, chunk_size)
    losses_P = head.distillation_losses(states_PD, tokens_PK, soft_targets).mean(-1)
    if teacher_output.hidden_BTD is None:
        return losses_P
    backbone_PD = states_PD[:, : head.hidden_size]  # Without the head's own embedding of the chunk.
    distances_P = teacher_output.distances(backbone_PD, is_target_BC, chunk_size)
    return losses_P + teacher_output.hidden_weight * distances_P


def token_positions(labels_BT: Tensor, position_ids_BC: Tensor | None, chunk_size: int) -> Tensor | None:
    """Position of each token in its document, (B, T), as a token-level model counts it.

    A document may have padding in front, so that it ends on a chunk boundary or starts anywhere in its first
    chunk; its first token has position 0. Every padding token has position 0 too, which makes it a document
    of its own that no other token sees.

    Args:
        labels_BT: Tokens with -100 on padding.
        position_ids_BC: Position of every chunk in its document, 0 at a start; None for one document.
        chunk_size: Tokens per chunk K; with 1, `position_ids_BC` is returned as is, whatever the labels.
    """
    if position_ids_BC is None or chunk_size == 1:
        return position_ids_BC
    is_token_BT = (labels_BT != IGNORED_LABEL).long()
    before_BCK = split_into_chunks(is_token_BT.cumsum(-1) - is_token_BT, chunk_size)
    # Number of tokens in the row before the document of each chunk: the count at the document's first chunk,
    # carried on to its other chunks by the running maximum, since counts grow from document to document.
    at_start_BC = before_BCK[..., 0].masked_fill(position_ids_BC != 0, 0).cummax(-1).values
    return (before_BCK - at_start_BC.unsqueeze(-1)).flatten(-2) * is_token_BT
