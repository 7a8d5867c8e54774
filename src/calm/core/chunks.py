"""Tokens grouped into chunks: views, targets, and ends of text.

Shapes: B batch, T tokens, K tokens per chunk, C chunks (T = C·K), P positions.
"""

import torch
from torch import Tensor

IGNORED_LABEL = -100  # Label of tokens excluded from the loss, as in torch and transformers.


def split_into_chunks(tokens_BT: Tensor, chunk_size: int) -> Tensor:
    """View tokens as chunks, (B, T) -> (B, C, K).

    Raises:
        ValueError: If T is not a multiple of K.
    """
    if tokens_BT.shape[-1] % chunk_size:
        raise ValueError(
            f"the number of tokens must be a multiple of the chunk size {chunk_size}, "
            f"got {tokens_BT.shape[-1]}; pad to a chunk boundary."
        )
    return tokens_BT.unflatten(-1, (-1, chunk_size))


def have_label(labels_BT: Tensor, chunk_size: int) -> Tensor:
    """Which chunks contain a token with a label, boolean (B, C)."""
    return (split_into_chunks(labels_BT, chunk_size) != IGNORED_LABEL).any(-1)


def find_targets(labels_BT: Tensor, position_ids_BC: Tensor | None, chunk_size: int) -> Tensor:
    """Which of chunks 1..C-1 are predicted from the chunk before, boolean (B, C-1).

    A chunk is a target if it has a label and does not start a document.

    Args:
        labels_BT: Tokens, with -100 on padding.
        position_ids_BC: Position of each chunk in its document, starting at 0; None for a single document.
        chunk_size: Tokens per chunk K.
    """
    is_target = have_label(labels_BT, chunk_size)[:, 1:]
    return is_target if position_ids_BC is None else is_target & (position_ids_BC[:, 1:] > 0)


def mean_over(losses: Tensor, count: Tensor | int | None) -> Tensor:
    """Sum of losses over a number of targets, (); 0 for a batch without a target, not 0 / 0.

    Args:
        losses: Losses, or their sum.
        count: Number of targets that the mean is over; that of the losses if None.
    """
    count = torch.as_tensor(losses.numel() if count is None else count, device=losses.device)
    return losses.sum() / count.masked_fill(count == 0, 1)


def number_documents(position_ids_BC: Tensor) -> Tensor:
    """Number of the document that each chunk belongs to, (B, C), unique across rows.

    Args:
        position_ids_BC: Position of each chunk in its document, starting at 0.
    """
    in_row_BC = (position_ids_BC == 0).long().cumsum(-1)
    row_B1 = torch.arange(len(position_ids_BC), device=position_ids_BC.device).unsqueeze(-1)
    return row_B1 * (position_ids_BC.shape[-1] + 1) + in_row_BC


def positions_of(mask_BC: Tensor) -> Tensor:
    """Position of each chunk (or token) among those that contain text; 0 on the padding in front.

    Args:
        mask_BC: 1 on chunks that contain text.
    """
    return (mask_BC.cumsum(-1) - 1).clamp_min(0)


def is_after_eos(chunk_PK: Tensor, eos_ids: Tensor) -> Tensor:
    """Which tokens of a chunk come after its first EOS, (P, K).

    Args:
        chunk_PK: Token ids, any leading axes P.
        eos_ids: All ids that end a text, 1-D, may be empty.
    """
    is_eos_PK = torch.isin(chunk_PK, eos_ids).long()
    return is_eos_PK.cumsum(-1) - is_eos_PK > 0


def end_after_eos(chunk_PK: Tensor, eos_ids: Tensor, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Replace what follows the first EOS of a chunk with padding; also return which chunks end, (P,).

    Args:
        chunk_PK: Token ids, any leading axes P.
        eos_ids: All ids that end a text, 1-D, may be empty.
        pad_token_id: Id to put after the end.
    """
    ended_PK = torch.where(is_after_eos(chunk_PK, eos_ids), pad_token_id, chunk_PK)
    return ended_PK, torch.isin(chunk_PK, eos_ids).any(-1)


def align_to_chunks(
    prompt_BT: Tensor, mask_BT: Tensor, chunk_size: int, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Right-align the tokens of each prompt and left-pad to whole chunks.

    Args:
        prompt_BT: Prompts with padding anywhere.
        mask_BT: 1 on tokens, 0 on padding.
        chunk_size: Tokens per chunk K.
        pad_token_id: Id to pad with.

    Returns:
        Tokens (B, C·K), and the mask of chunks that contain any token (B, C).
    """
    length_B = mask_BT.bool().sum(-1)
    num_tokens = -(-int(length_B.max()) // chunk_size) * chunk_size
    tokens = prompt_BT.new_full((len(prompt_BT), num_tokens), pad_token_id)
    column = torch.arange(num_tokens, device=prompt_BT.device)
    is_token = column >= num_tokens - length_B.unsqueeze(-1)
    tokens[is_token] = prompt_BT[mask_BT.bool()]
    return tokens, is_token.unflatten(-1, (-1, chunk_size)).any(-1).long()


def as_id_tensor(ids: int | list[int] | None, device: torch.device) -> Tensor:
    """Token ids as configurations store them (one, several or none) as a 1-D tensor."""
    id_list = [] if ids is None else [ids] if isinstance(ids, int) else ids
    return torch.tensor(id_list, dtype=torch.long, device=device)
