"""Tokens that arrive -> text that may be shown: whole characters, and nothing from a stop on."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"  # What a tokenizer makes of the first bytes of a character.


class TextBuilder:
    """The text of one answer as its tokens arrive.

    The parts together are what the tokenizer makes of all tokens at once, cut before the first stop.

    Args:
        tokenizer: The tokenizer.
        stops: Where the text ends, if one of them comes up in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.num_tokens = 0
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, tokens: Sequence[int], is_last: bool = False) -> str:
        """Take tokens, and give the text that has become certain.

        Args:
            tokens: New tokens.
            is_last: Whether no more will come: then nothing is held back.
        """
        if self.is_stopped:
            return ""
        self._tokens += tokens
        self.num_tokens += len(tokens)
        [text] = self._tokenizer.batch_decode([self._tokens], skip_special_tokens=True)
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            text = text[: min(found)]
        elif not is_last:
            text = text[: self._certain(text)]
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new

    def _certain(self, text: str) -> int:
        """How much of the text stays whatever follows: no half character, no beginning of a stop."""
        end = len(text.rstrip(_INCOMPLETE))
        held = max((_overlap(text[:end], stop) for stop in self._stops), default=0)
        return end - held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
