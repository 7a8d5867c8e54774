"""What a teacher, a Transformer of tokens, says of a batch, and how a model of chunks or of tokens hears it.

A teacher reads the tokens of a batch one by one, and knows the distribution of each after those before it in
its document. A model that predicts tokens by their distributions learns from them at every place of every
chunk that is a target (docs/uptraining.md).

Shapes: B batch, T tokens, K tokens per chunk, C chunks, P target chunks, D hidden size of both, Y size of the
teacher's states, U its vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from calm.core.chunks import IGNORED_LABEL, split_into_chunks
from calm.core.distillation import Teaching
from calm.models.heads import GenerativeHead, Teachable


class Lesson(NamedTuple):
    """What a teacher says of a batch.

    Args:
        states_BTY: Its state at each token, by which it predicts the next one.
        table_UY: A row for each of its tokens, whose product with a state is the token's score.
        bias_U: Added to the scores.
        weight: Its share of the loss, from 0 to 1; the rest is cross-entropy.
        temperature: What scores of both are divided by.
        inner_BTD: Its states after the layer with which the learner's backbone ends; None if they are not
            learned from.
        inner_weight: What the distance of the backbone's states from those counts in the loss.
    """

    states_BTY: Tensor
    table_UY: Tensor
    bias_U: Tensor | None
    weight: float
    temperature: float = 1.0
    inner_BTD: Tensor | None = None
    inner_weight: float = 0.0

    def at_tokens(self, is_target: Tensor) -> Teaching:
        """Of the tokens 1..T-1 that are targets, (B, T - 1)."""
        states_MY = self.states_BTY[:, :-1][is_target]
        weights_M = torch.full_like(states_MY[:, 0], self.weight, dtype=torch.float32)
        return Teaching(states_MY, self.table_UY, self.bias_U, weights_M, self.temperature)

    def at_chunks(self, is_target_BC: Tensor, labels_BT: Tensor, chunk_size: int) -> Teaching:
        """Of all tokens of the chunks 1..C-1 that are targets, (P·K).

        What follows the end of a text in its last chunk is padding, of which no teacher knows: there the loss
        is cross-entropy alone.
        """
        # The state at a token predicts the next one: those of a chunk are one token earlier.
        before_BCKY = self.states_BTY[:, chunk_size - 1 : -1].unflatten(1, (-1, chunk_size))
        has_label_BCK = split_into_chunks(labels_BT, chunk_size)[:, 1:] != IGNORED_LABEL
        weights_PK = self.weight * has_label_BCK[is_target_BC].float()
        states_MY = before_BCKY[is_target_BC].flatten(0, 1)
        return Teaching(states_MY, self.table_UY, self.bias_U, weights_PK.flatten(), self.temperature)

    def distances(self, states_PD: Tensor, is_target_BC: Tensor, chunk_size: int) -> Tensor:
        """How far states of the backbone are from the teacher's at the last token of their chunks, (P,).

        Squared, and relative to the square of the teacher's: 0 for the same state, 1 for none. States grow
        from layer to layer, and at some tokens a few numbers of them are hundreds of times as large as
        elsewhere; relative to itself each chunk counts alike, whatever layer is compared and whatever else
        is in the batch.

        Args:
            states_PD: States by which the target chunks are predicted, without what the head reads itself.
            is_target_BC: Which of the chunks 1..C-1 are targets.
            chunk_size: Tokens per chunk K.
        """
        assert self.inner_BTD is not None
        wanted_BCD = self.inner_BTD[:, chunk_size - 1 :: chunk_size]
        wanted_PD = wanted_BCD[:, :-1][is_target_BC].float()
        far_P = (states_PD.float() - wanted_PD).square().sum(-1)
        return far_P / wanted_PD.square().sum(-1)


def taught_losses(
    head: GenerativeHead,
    states_PD: Tensor,
    tokens_PK: Tensor,
    lesson: Lesson,
    is_target_BC: Tensor,
    labels: Tensor,
) -> Tensor:
    """Loss of a CALM that has a teacher, at each target chunk, (P,): a mean over its tokens.

    Args:
        head: Its head.
        states_PD: States by which the chunks are predicted.
        tokens_PK: The chunks.
        lesson: What the teacher says of the batch.
        is_target_BC: Which of the chunks 1..C-1 are targets.
        labels: Tokens (B, T) with -100 on padding.

    Raises:
        ValueError: If the head has no distributions of tokens.
    """
    if not isinstance(head, Teachable):
        raise ValueError(f"a {head.config.head_type} head has no distributions of tokens to learn.")
    chunk_size = tokens_PK.shape[-1]
    teaching = lesson.at_chunks(is_target_BC, labels, chunk_size)
    losses_P = head.taught_losses(states_PD, tokens_PK, teaching).mean(-1)
    if lesson.inner_BTD is None:
        return losses_P
    own_PD = states_PD[:, : head.hidden_size]
    return losses_P + lesson.inner_weight * lesson.distances(own_PD, is_target_BC, chunk_size)


def token_positions(labels_BT: Tensor, position_ids_BC: Tensor | None, chunk_size: int) -> Tensor | None:
    """Position of each token in its document, (B, T), as a model of tokens counts them.

    A document has padding in front, so that it ends on a chunk boundary or begins anywhere in its first
    chunk; its first token has position 0. So has padding, each a document of its own, so that no token sees
    it.

    Args:
        labels_BT: Tokens with -100 on padding.
        position_ids_BC: Position of every chunk in its document, 0 at a start; None for one document.
        chunk_size: Tokens per chunk K; with 1 these are the positions already, whatever has labels.
    """
    if position_ids_BC is None or chunk_size == 1:
        return position_ids_BC
    is_token_BT = (labels_BT != IGNORED_LABEL).long()
    before_BCK = split_into_chunks(is_token_BT.cumsum(-1) - is_token_BT, chunk_size)
    # Tokens before the document of each chunk: counts at the starts, which grow from one to the next.
    at_start_BC = before_BCK[..., 0].masked_fill(position_ids_BC != 0, 0).cummax(-1).values
    return (before_BCK - at_start_BC.unsqueeze(-1)).flatten(-2) * is_token_BT
