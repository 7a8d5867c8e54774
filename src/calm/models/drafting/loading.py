"""Loads the draft, and checks that its tokens are those of the target model."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.errors import InputError
from calm.models.calm import CalmForCausalLM
from calm.models.drafting.passes import check_model
from calm.models.loading import load_language_model_and_tokenizer
from calm.text.vocabulary import first_difference


def load_draft(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> CalmForCausalLM:
    """Load a CALM as the draft for a model, onto its device.

    Args:
        name: Folder or hub name of the CALM.
        model: The target model.
        tokenizer: Its tokenizer.

    Raises:
        InputError: If the draft is missing, not a CALM or has other tokens, or the model supports no drafts.
    """
    if isinstance(model, CalmForCausalLM):
        raise InputError("a CALM already generates whole chunks; a draft is only for token-level models.")
    try:
        check_model(model)
    except ValueError as error:
        raise InputError(str(error)) from error
    draft, draft_tokenizer = load_language_model_and_tokenizer(name)
    if not isinstance(draft, CalmForCausalLM):
        raise InputError(f"the draft must be a CALM, but '{name}' is a {type(draft).__name__}.")
    if (token_id := first_difference(tokenizer, draft_tokenizer)) is not None:
        in_model = tokenizer.convert_ids_to_tokens(token_id)
        in_draft = draft_tokenizer.convert_ids_to_tokens(token_id)
        raise InputError(
            f"'{name}' cannot draft for this model: their vocabularies differ, as id {token_id} is "
            f"{in_model!r} in the model and {in_draft!r} in the draft. Train it with the model's tokenizer "
            "(docs/drafting.md)."
        )
    torch.nn.Module.to(draft, model.device)
    return draft
