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
_CONTEXT = 16  # Number of earlier tokens that new tokens are decoded after.
# transformers' `clean_up_tokenization` removes spaces from sequences such as " n't" and " 've"; these are the
# characters that can occur in one of them before its last.
_BEFORE_CLEANED = " 'nvr"


def decode_after(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that tokens add to a prompt, without control tokens.

    Args:
        tokenizer: The tokenizer.
        prompt: Tokens before them; may be empty.
        tokens: The tokens to decode.
    """
    return _decode_after_context(tokenizer, _context_of(tokenizer, prompt), tokens)


def _context_of(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> list[int]:
    """The last plain-text tokens of a prompt, at most `_CONTEXT`."""
    control = set(tokenizer.all_special_ids)
    return [token for token in prompt[-2 * _CONTEXT :] if token not in control][-_CONTEXT:]


def _decode_after_context(
    tokenizer: PreTrainedTokenizerBase, context: list[int], tokens: Sequence[int]
) -> str:
    before, text = tokenizer.batch_decode([context, [*context, *tokens]], skip_special_tokens=True)
    if text.startswith(before):
        return text[len(before) :]
    # An incomplete character at the end of the context was completed.
    pairs = enumerate(zip(before, text, strict=False))
    return text[next((index for index, (old, new) in pairs if old != new), len(text)) :]


def spell_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Text of each token by itself, including its leading space; control tokens by name."""
    control, context = set(tokenizer.all_special_ids), encode_words(tokenizer, ["a"])[0]
    return [
        str(tokenizer.convert_ids_to_tokens(token))
        if token in control
        else decode_after(tokenizer, context, [token])
        for token in tokens
    ]


class TextBuilder:
    """Decodes one answer incrementally, as its tokens arrive.

    The concatenated parts equal `decode_after` of all tokens at once, cut before the first stop string.

    Text that can no longer change is not decoded again: its last tokens become the context of those that
    follow. The text is the same, because the decoder of a fast tokenizer treats tokens independently, except
    for the first, which may lose its space, and for characters of several tokens, which are never split.
    With other tokenizers all tokens are decoded every time: some drop an incomplete character, and so do not
    show that there is one.

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
        self._skipped = _skipped_ids(tokenizer)
        self._unsettled = _INCOMPLETE + (_BEFORE_CLEANED if _cleans_up(tokenizer) else "")
        self._tokens: list[int] = []  # Tokens after the context.
        self._withheld = ""  # Text of the context that may be the start of a stop string.
        self._shown = 0  # Characters returned of the withheld text and the text of the tokens.

    def add(self, tokens: Sequence[int], is_last: bool = False) -> str:
        """Add tokens and return the new text that can no longer change.

        Args:
            tokens: New tokens.
            is_last: Whether these are the last tokens; then all remaining text is returned.
        """
        if self.is_stopped:
            return ""
        self._tokens += [token for token in tokens if token not in self._skipped]
        self.num_tokens += len(tokens)
        decoded = _decode_after_context(self._tokenizer, self._context, self._tokens)
        text, end = self._withheld + decoded, len(self._withheld) + self._settled(decoded)
        is_settled = bool(decoded) and end == len(text)
        if positions := [start for stop in self._stops if (start := text.find(stop)) >= 0]:
            self.is_stopped = True
            end = min(positions)
        elif is_last:
            end = len(text)
        else:
            end -= max((_overlap(text[:end], stop) for stop in self._stops), default=0)
        new, self._shown = text[self._shown : end], max(self._shown, end)
        if is_settled and self._tokenizer.is_fast:
            self._context, self._tokens = [*self._context, *self._tokens][-_CONTEXT:], []
            self._withheld, self._shown = text[self._shown :], 0
        return new

    def _settled(self, text: str) -> int:
        """Length of the decoded text that no further token can change."""
        before_bytes = len(self._tokens)
        while before_bytes and self._is_byte(self._tokens[before_bytes - 1]):
            before_bytes -= 1
        if before_bytes < len(self._tokens):
            text = _decode_after_context(self._tokenizer, self._context, self._tokens[:before_bytes])
        return len(text.rstrip(self._unsettled))

    def _is_byte(self, token: int) -> bool:
        """Whether a token is a SentencePiece byte token; a run of these is only valid text as a whole."""
        return _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))) is not None


def _skipped_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that `skip_special_tokens` skips."""
    if not tokenizer.is_fast:
        return set(tokenizer.all_special_ids)
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _cleans_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether decoding removes spaces from the text; `clean_up_tokenization_spaces` is ignored for BPE."""
    if not tokenizer.clean_up_tokenization_spaces:
        return False
    ids = tokenizer("a . ' a", add_special_tokens=False)["input_ids"]
    return bool(tokenizer.decode(ids) != tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text that is a proper prefix of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
