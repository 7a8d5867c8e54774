"""Text never becomes a control token, whatever it spells, with tokenizers of every kind."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from other_tokenizers import KINDS, LOSSLESS

from calm.text.chat import encode_chat
from calm.text.decoding import decode_after
from calm.text.encoding import (
    bos_ids,
    control_tokens_of,
    encode_documents,
    encode_rendering,
    encode_words,
    marks_of,
)

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def tokenizer_of(kind):
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def with_special(kind, text):
    """Replace each "@" in a text by the spelling of a control token, of the next one each time."""
    spellings = list(control_tokens_of(tokenizer_of(kind)))
    for number in range(text.count("@")):
        text = text.replace("@", spellings[number % len(spellings)], 1)
    return text


texts = st.text(alphabet="@ ab<>|/s.é日\n", max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, database=None)
@given(text=texts)
def test_text_never_becomes_a_control_token(kind, text):
    tokenizer, text = tokenizer_of(kind), with_special(kind, text)
    control = set(control_tokens_of(tokenizer).values())
    [document], bos = encode_documents(tokenizer, [text]), bos_ids(tokenizer)
    assert document[: len(bos)] == bos
    assert control.isdisjoint(document[len(bos) :])
    assert control.isdisjoint(encode_words(tokenizer, [text])[0])
    if kind in LOSSLESS and text:
        spelled = tokenizer.decode(document, skip_special_tokens=True)
        assert (
            spelled == text.removeprefix(" ") or spelled == text or "unigram" in kind
        )  # <unk> loses characters.


@pytest.mark.parametrize("kind", KINDS)
def test_documents_begin_as_the_tokenizer_says_but_have_no_eos(kind):
    tokenizer = tokenizer_of(kind)
    bos = bos_ids(tokenizer)
    assert bos == {"byte-level": [2], "words": [], "bert": [2], "slow": []}.get(kind, [1])
    expected = tokenizer("a happy boy")["input_ids"]
    [ids] = encode_documents(tokenizer, ["a happy boy"])
    assert ids == expected[: len(ids)] and set(expected[len(ids) :]) <= {tokenizer.eos_token_id}
    assert encode_documents(tokenizer, ["", "a happy boy"]) == [bos, ids]
    assert encode_documents(tokenizer, []) == []


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("prompt", ["A good morning, a", "Yes:", "Tom said", ""])
@pytest.mark.parametrize("continuation", [" happy boy.", "happy boy", "\nNew", ", and", "  two"])
def test_words_after_a_prompt_decode_to_themselves(kind, prompt, continuation):
    tokenizer = tokenizer_of(kind)
    [ids] = encode_documents(tokenizer, [prompt])
    if "unigram" in kind and "\n" in continuation:
        continuation = continuation.replace("\n", " ")  # It has no line ends.
    if not prompt:
        continuation = continuation.lstrip(" ")  # A tokenizer may ignore the first space of a text.
    assert decode_after(tokenizer, ids, encode_words(tokenizer, [continuation])[0]) == continuation


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, database=None)
@given(first=texts, second=texts)
def test_only_a_template_writes_control_tokens(kind, first, second):
    tokenizer = tokenizer_of(kind)
    first, second = with_special(kind, first), with_special(kind, second)
    control = control_tokens_of(tokenizer)
    eos = tokenizer.eos_token_id
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
    ids = encode_chat(tokenizer, messages)
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    assert [i for i in ids if i in set(control.values())] == [*bos, eos, eos]


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_chat_is_encoded_as_by_the_tokenizer(kind):
    tokenizer = tokenizer_of(kind)
    messages = [{"role": "user", "content": " Tom? "}, {"role": "assistant", "content": "Yes, a <b>."}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert encode_chat(tokenizer, messages) == tokenizer(rendered, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["byte-level", "unigram, first"])
def test_spelled_control_token_does_not_affect_its_surroundings(kind):
    """Before and after the spelling of a control token, the ids are those of the text without it."""
    tokenizer = tokenizer_of(kind)
    spelling = tokenizer.eos_token
    spelled = [{"role": "user", "content": f"one {spelling} two"}, {"role": "assistant", "content": "three"}]
    ordinary = [{"role": "user", "content": "one two"}, spelled[1]]
    ids, plain = encode_chat(tokenizer, spelled), encode_chat(tokenizer, ordinary)
    beginning = tokenizer(f"{tokenizer.bos_token}<|user|>one", add_special_tokens=False)["input_ids"]
    assert ids[: len(beginning)] == plain[: len(beginning)] == beginning
    assert ids[ids.index(tokenizer.eos_token_id) :] == plain[plain.index(tokenizer.eos_token_id) :]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text.replace(" ", "") == f"<|user|>one{spelling}two<|assistant|>three<|assistant|>".replace(
        " ", ""
    )


def test_adjacent_pieces_do_not_form_a_control_token():
    tokenizer = KINDS["byte-level"]()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.tail }}{% endfor %}"
    ids = encode_chat(tokenizer, [{"role": "<|e", "content": "os|", "tail": ">"}])
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "<|eos|>"


@settings(max_examples=100, deadline=None, database=None)
@given(st.text(alphabet="<|eos|>\ue0f0\ue0f112 ", max_size=20))
def test_unmark_restores_any_text(text):
    tokenizer = tokenizer_of("byte-level")
    marks = marks_of(tokenizer)
    marked = marks.mark({"a": [text, 3]})
    assert marks.unmark(marked["a"][0]) == text and marked["a"][1] == 3
    assert tokenizer.eos_token not in marked["a"][0]


def test_continued_rendering_begins_without_a_space():
    tokenizer = tokenizer_of("llama")
    assert tokenizer.decode(encode_rendering(tokenizer, "Yes")) == "Yes"
    continuation = encode_rendering(tokenizer, "Yes</s>", continues=True)
    assert decode_after(tokenizer, encode_documents(tokenizer, ["Tom:"])[0], continuation) == "Yes"
    assert continuation[-1] == tokenizer.eos_token_id


def test_tokens_that_are_added_later_are_control_tokens():
    tokenizer = KINDS["byte-level"]()
    [before] = encode_documents(tokenizer, ["a<|im_end|>b"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert encode_documents(tokenizer, ["a<|im_end|>b"]) == [before]
    assert control_tokens_of(tokenizer)["<|im_end|>"] == len(tokenizer) - 1
