"""A twin of a tokenizer, in which control tokens have names that no text can contain."""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer


def twin_of(backend: Tokenizer, names: Mapping[str, str], begins: bool) -> Tokenizer:
    """A copy of a tokenizer with the same ids, in which some tokens are renamed.

    Args:
        backend: The tokenizer.
        names: Old name -> new name.
        begins: Whether its input starts a text; if not, no space is put in front of it.
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
        model["merges"] = [merge for merge in model["merges"] if not _involves_any(merge, names)]
    return Tokenizer.from_str(json.dumps(state))


def puts_space_in_front(backend: Tokenizer) -> bool:
    """Whether the tokenizer puts a space in front of its input."""
    parts = (backend.normalizer, backend.pre_tokenizer)
    states = [json.loads(part.__getstate__()) for part in parts if part is not None]
    return any(state != _without_prefix(state) for state in states)


def _without_prefix(part: Any) -> Any:
    """The state of a normalizer or pre-tokenizer, changed to put no space in front."""
    if not isinstance(part, dict):
        return part
    for key in ("normalizers", "pretokenizers"):  # Parts that are sequences of others.
        if key in part:
            changed = [_without_prefix(inner) for inner in part[key]]
            return part | {key: [inner for inner in changed if inner is not None]}
    if part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    return part | {"add_prefix_space": False} if part.get("add_prefix_space") else part


def _involves_any(merge: Any, names: Mapping[str, str]) -> bool:
    """Whether a merge produces or consumes a renamed token."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return not names.keys().isdisjoint((left, right, left + right))
