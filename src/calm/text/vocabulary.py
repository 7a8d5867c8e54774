"""Whether two tokenizers mean the same by a token id."""

from transformers import PreTrainedTokenizerBase


def first_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> int | None:
    """The lowest id that stands for another token in each; None where all that both have are the same.

    One may have more tokens than the other: those behind the last that both have are not compared.
    """
    names, others = ({token: name for name, token in each.get_vocab().items()} for each in (one, other))
    both = sorted(names.keys() & others.keys())
    return next((token for token in both if names[token] != others[token]), None)
