"""Whether two tokenizers agree on the meaning of token ids."""

from transformers import PreTrainedTokenizerBase


def first_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> int | None:
    """The lowest id that means different tokens in the two; None if they agree on all shared ids.

    One may have more ids than the other: ids that only one of them has are not compared.
    """
    names, others = ({token: name for name, token in each.get_vocab().items()} for each in (one, other))
    both = sorted(names.keys() & others.keys())
    return next((token for token in both if names[token] != others[token]), None)
