"""A twin of a tokenizer, in which control tokens have names that no text can spell."""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer


def twin_of(backend: Tokenizer, names: Mapping[str, str], begins: bool) -> Tokenizer:
    """The same tokenizer, ids included, but for the spelling of some tokens.

    Args:
        backend: The tokenizer.
        names: New spellings by old ones.
        begins: Whether what it reads begins a text. Elsewhere no space is put in front of it.
    """
    state = json.loads(backend.to_str())
    state |= {"post_processor": None, "truncation": None, "padding": None}
    if not begins:
        state["normalizer"] = _without_prefix(state["normalizer"])
        state["pre_tokenizer"] = _without_prefix(state["pre_tokenizer"])
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): i for token, i in vocabulary.items()}
    else:  # Unigram: pairs of a token and its score.
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes_any(merge, names)]
    return Tokenizer.from_str(json.dumps(state))


def puts_space_in_front(backend: Tokenizer) -> bool:
    """Whether the tokenizer puts a space in front of what it reads."""
    parts = (backend.normalizer, backend.pre_tokenizer)
    states = [json.loads(part.__getstate__()) for part in parts if part is not None]
    return any(state != _without_prefix(state) for state in states)


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space in front."""
    if not isinstance(part, dict):
        return part
    for several in ("normalizers", "pretokenizers"):
        if several in part:
            left = [_without_prefix(one) for one in part[several]]
            return part | {several: [one for one in left if one is not None]}
    if part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    return part | {"add_prefix_space": False} if part.get("add_prefix_space") else part


def _makes_any(merge: Any, names: Mapping[str, str]) -> bool:
    """Whether a merge makes a token with a new name, or takes one."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return not names.keys().isdisjoint((left, right, left + right))
