"""Token ids -> text. New tokens are decoded after the tokens before them, never alone.

Decoded alone, the first new token of a SentencePiece-like tokenizer loses its space, and the first bytes of a
character are not yet text.
"""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from calm.text.encoding import encode_words

_INCOMPLETE = "\ufffd"  # What a tokenizer decodes an incomplete character to.
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_CONTEXT = 16  # Prompt tokens that new tokens are decoded after.


def decode_after(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that tokens add to a prompt, without control tokens.

    Args:
        tokenizer: The tokenizer.
        prompt: Tokens before them; may be empty.
        tokens: The tokens to decode.
    """
    return _decode_behind(tokenizer, _context_of(tokenizer, prompt), tokens)


def _context_of(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> list[int]:
    """The last plain-text tokens of a prompt."""
    control = set(tokenizer.all_special_ids)
    return [token for token in prompt[-2 * _CONTEXT :] if token not in control][-_CONTEXT:]


def _decode_behind(tokenizer: PreTrainedTokenizerBase, context: list[int], tokens: Sequence[int]) -> str:
    before, whole = tokenizer.batch_decode([context, [*context, *tokens]], skip_special_tokens=True)
    if whole.startswith(before):
        return whole[len(before) :]
    # An incomplete character at the end of the prompt was completed.
    pairs = enumerate(zip(before, whole, strict=False))
    return whole[next((place for place, (old, new) in pairs if old != new), len(whole)) :]


def spell_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Text of each token by itself, including its leading space; control tokens by name."""
    control, before = set(tokenizer.all_special_ids), encode_words(tokenizer, ["a"])[0]
    return [
        str(tokenizer.convert_ids_to_tokens(token))
        if token in control
        else decode_after(tokenizer, before, [token])
        for token in tokens
    ]


class TextBuilder:
    """Decodes one answer incrementally, as its tokens arrive.

    The concatenated parts equal `decode_after` of all tokens at once, cut before the first stop string.

    Args:
        tokenizer: The tokenizer.
        stops: Stop strings; the text ends before the first that occurs.
        prompt: Tokens before the answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        self.num_tokens = 0
        self.is_stopped = False
        self._tokenizer, self._context = tokenizer, _context_of(tokenizer, prompt)
        self._stops = [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, tokens: Sequence[int], is_last: bool = False) -> str:
        """Add tokens and return the new text that can no longer change.

        Args:
            tokens: New tokens.
            is_last: Whether these are the last tokens; then all remaining text is returned.
        """
        if self.is_stopped:
            return ""
        self._tokens += tokens
        self.num_tokens += len(tokens)
        text = _decode_behind(self._tokenizer, self._context, self._tokens)
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            text = text[: min(found)]
        elif not is_last:
            text = text[: self._certain(text)]
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new

    def _certain(self, text: str) -> int:
        """Length of the text that cannot change: no incomplete character, no prefix of a stop string."""
        end = len(text.rstrip(_INCOMPLETE))
        settled = len(self._tokens)
        while settled and self._is_byte(self._tokens[settled - 1]):
            settled -= 1
        if settled < len(self._tokens):
            before = _decode_behind(self._tokenizer, self._context, self._tokens[:settled])
            end = min(end, len(before))
        held = max((_overlap(text[:end], stop) for stop in self._stops), default=0)
        return end - held

    def _is_byte(self, token: int) -> bool:
        """Whether a token is a SentencePiece byte token; a run of these is only valid text as a whole."""
        return _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))) is not None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text that is a proper prefix of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
