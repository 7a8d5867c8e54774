"""Token ids: how many a tokenizer has, and whether a model or another tokenizer has the same."""

from transformers import PreTrainedTokenizerBase

from calm.errors import InputError


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of token ids, from 0 to the highest; some may have no token, so there may be fewer tokens."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def check_ids(tokenizer: PreTrainedTokenizerBase, size: int, name: str) -> None:
    """Raise InputError if a tokenizer has more ids than its model.

    Args:
        tokenizer: The tokenizer.
        size: Number of the model's ids.
        name: Where the tokenizer is.
    """
    if (number := num_ids(tokenizer)) <= size:
        return
    if number > len(tokenizer):
        raise InputError(
            f"the tokenizer in '{name}' has token id {number - 1}, but the model has only {size} ids; use "
            "the model's own tokenizer."
        )
    raise InputError(
        f"the tokenizer in '{name}' has {number} tokens, more than the model's {size}; use the model's own "
        "tokenizer."
    )


def first_difference(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> int | None:
    """The lowest id that stands for different tokens in two tokenizers; None if all shared ids agree.

    Ids that only one of the tokenizers has are not compared.
    """
    first_tokens, second_tokens = (
        {i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (first, second)
    )
    shared = sorted(first_tokens.keys() & second_tokens.keys())
    return next((i for i in shared if first_tokens[i] != second_tokens[i]), None)
