"""Text -> token ids. Plain text never becomes a control token.

"<|eos|>" in a user's text is seven characters, not the end of a text. Control tokens come only from
the tokenizer itself (the tokens it starts a text with), a chat template, or explicit token ids.

There are three kinds of text:
  a document    starts with the tokenizer's initial tokens and has no end yet (`encode_documents`)
  words         continue other text (`encode_words`)
  a rendering   is the output of a chat template (`encode_rendering`): its own control tokens count, and the
                messages stay plain text, because they were marked (`marks_of`) before rendering
"""

import secrets
import weakref
from collections.abc import Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from calm.text.marks import Marks, is_marked, replace_all, split_at
from calm.text.twin import puts_space_in_front, twin_of

_PROBES = ("a", "0", ".", "é", "的")  # Every tokenizer knows at least one of these.


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts from their start: the tokenizer's initial tokens and the text, nothing after it.

    A tokenizer that ends every text (`<s> $A </s>`) does not end these: a prompt will be continued, and
    documents get their EOS when they are laid out in blocks.
    """
    begin = bos_ids(tokenizer)
    return [[*begin, *ids] for ids in _encode(tokenizer, texts)]


def encode_words(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that each continue other text.

    SentencePiece-like tokenizers put a space in front of their input; these texts get none.
    """
    control = _control_of(tokenizer)
    if not control.puts_space_in_front:
        return _encode(tokenizer, texts)
    return [control.encode_words(tokenizer, text, begins=False) for text in texts]


def encode_rendering(tokenizer: PreTrainedTokenizerBase, text: str, *, continues: bool = False) -> list[int]:
    """Token ids of a chat template's output for marked text.

    Args:
        tokenizer: The tokenizer.
        text: The rendering, or a part of it.
        continues: Whether it continues other text.
    """
    control = _control_of(tokenizer)
    if is_marked(text) or (continues and control.puts_space_in_front):
        return control.encode_rendering(tokenizer, text, begins=not continues)
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    return ids


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """The marks that keep plain text in a chat template from becoming control tokens."""
    return _control_of(tokenizer).marks


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token ids that the tokenizer puts in front of a text."""
    for probe in _PROBES:
        encoded = tokenizer(probe, return_special_tokens_mask=True)
        if 0 in encoded["special_tokens_mask"]:
            ids: list[int] = encoded["input_ids"][: encoded["special_tokens_mask"].index(0)]
            return ids
    return []


def control_tokens_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the control tokens by their text.

    The unknown token is not one of them unless it has another role: any text may contain it.
    """
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    unknown = None if tokenizer.unk_token in roles else tokenizer.unk_token
    return {token: i for token, i in (added | named).items() if token and token != unknown}


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts from their start, without the tokenizer's initial tokens."""
    if not texts:
        return []
    control = _control_of(tokenizer)
    # `split_special_tokens` only affects added tokens, which are matched in the text. Unigram and WordLevel
    # models also have the control tokens in their vocabulary.
    return [
        ids if control.ids.isdisjoint(ids) else control.encode_words(tokenizer, text, begins=True)
        for text, ids in zip(texts, _plain(tokenizer, texts), strict=True)
    ]


def _plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    return ids


class _Control:
    """The control tokens of a tokenizer, and encoders for text that looks like them."""

    def __init__(self, tokens: dict[str, int], backend: Tokenizer | None) -> None:
        self.ids = frozenset(tokens.values())
        self.marks = Marks(list(tokens))
        self.puts_space_in_front = backend is not None and puts_space_in_front(backend)
        self.tokens, self._backend = tokens, backend
        secret = secrets.token_hex(8)  # So that no text can contain a name.
        self._names = {token: f"\ue0f2{secret}.{i}\ue0f3" for token, i in tokens.items()}
        self._twins: dict[bool, Tokenizer] = {}

    def encode_words(self, tokenizer: PreTrainedTokenizerBase, text: str, begins: bool) -> list[int]:
        """Token ids of plain text that contains a control token's text, or continues other text."""
        if self._backend is not None:
            return self._by_twin(text, begins)
        # Without a fast backend, split each control token's text in two, so that it is not recognized.
        parts = split_at(text, self.tokens)
        halves = [(part[:1], part[1:]) if part in self.tokens else (part,) for part in parts]
        return [i for pair in halves for half in pair for i in _plain(tokenizer, [half])[0]]

    def encode_rendering(self, tokenizer: PreTrainedTokenizerBase, text: str, begins: bool) -> list[int]:
        """Token ids of a rendering of marked text."""
        if self._backend is not None:
            return self._by_twin(self.marks.unmark(replace_all(text, self._names)), begins)
        ids: list[int] = []
        for part in split_at(text, self.tokens):
            control = self.tokens.get(part)
            ids += [control] if control is not None else _encode(tokenizer, [self.marks.unmark(part)])[0]
        return ids

    def _by_twin(self, text: str, begins: bool) -> list[int]:
        if begins not in self._twins:
            assert self._backend is not None
            self._twins[begins] = twin_of(self._backend, self._names, begins)
        return list(self._twins[begins].encode(text, add_special_tokens=False).ids)


_CONTROLS: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, _Control] = weakref.WeakKeyDictionary()


def _control_of(tokenizer: PreTrainedTokenizerBase) -> _Control:
    """The cached `_Control` of a tokenizer, rebuilt if its control tokens changed."""
    cached, tokens = _CONTROLS.get(tokenizer), control_tokens_of(tokenizer)
    if cached is None or cached.tokens != tokens:
        cached = _Control(tokens, tokenizer.backend_tokenizer if tokenizer.is_fast else None)
        _CONTROLS[tokenizer] = cached
    return cached
