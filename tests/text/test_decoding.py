"""Text as tokens arrive: whole characters, stops, and in the end what the tokenizer makes of all tokens."""

import random

import pytest
from other_tokenizers import KINDS

from calm.text.decoding import TextBuilder, decode_after, spell_tokens
from calm.text.encoding import encode_documents, encode_words

TEXT = "Zoë said: “naïve 🐱 cats” — once, twice, thrice! STOP and more."


def in_parts(tokens, chance):
    parts, start = [], 0
    while start < len(tokens):
        size = chance.randrange(1, 5)
        parts.append(tokens[start : start + size])
        start += size
    return parts


@pytest.mark.parametrize("seed", range(10))
def test_parts_make_the_whole(seed, tokenizer):
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    builder, said = TextBuilder(tokenizer), []
    parts = in_parts(tokens, random.Random(seed))
    for number, part in enumerate(parts):
        said.append(builder.add(part, is_last=number == len(parts) - 1))
        assert "\ufffd" not in said[-1]
    assert "".join(said) == TEXT and builder.num_tokens == len(tokens)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("stops", [["STOP"], ["thrice", "twice"], ["🐱"], ["e", "naïve"]])
def test_nothing_of_a_stop_is_said(seed, stops, tokenizer):
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    builder, said = TextBuilder(tokenizer, stops), ""
    for part in in_parts(tokens, random.Random(seed)):
        said += builder.add(part)
        if builder.is_stopped:
            break
    assert builder.is_stopped
    assert said == TEXT[: min(TEXT.index(stop) for stop in stops)]
    assert builder.add(tokens) == ""


def test_what_only_began_like_a_stop_is_said_in_the_end(tokenizer):
    tokens = tokenizer("one two thr", add_special_tokens=False)["input_ids"]
    builder = TextBuilder(tokenizer, ["three"])
    said = builder.add(tokens)
    assert said == "one two "
    assert said + builder.add([], is_last=True) == "one two thr"


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer):
    tokens = tokenizer("a🐱", add_special_tokens=False)["input_ids"][:-1]
    builder = TextBuilder(tokenizer)
    assert builder.add(tokens) == "a"
    assert builder.add([], is_last=True) == "\ufffd"


AWKWARD = [
    "Zoë said: “naïve 🐱 cats” — once, twice, thrice!",
    "don't won 't, I 've . they 're ' s a n't ?",
    "日本語🐱🐱é\ufffd x",
    "👩‍👩‍👧‍👦 z̈\n\n   a\tb  ",
]


def awkward_tokens(other, chance):
    """Tokens of awkward texts with control tokens between them, or any tokens, or mostly bytes."""
    vocabulary = other.get_vocab()
    ids = sorted(vocabulary.values())
    octets = [i for token, i in vocabulary.items() if token.startswith("<0x")] or ids
    kind = chance.choice(["text", "any", "bytes"])
    if kind != "text":
        return [
            chance.choice(octets if kind == "bytes" and chance.random() < 0.8 else ids) for _ in range(60)
        ]
    tokens = encode_words(other, ["".join(chance.choices(AWKWARD, k=2))])[0]
    for _ in range(chance.randrange(4)):
        tokens.insert(chance.randrange(len(tokens)), chance.choice(other.all_special_ids))
    return tokens


@pytest.mark.parametrize("cleans_up", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_in_parts_are_the_text_of_all(kind, cleans_up):
    other = KINDS[kind]()
    other.clean_up_tokenization_spaces = cleans_up
    for seed in range(150):
        chance = random.Random(seed)
        tokens, prompt = awkward_tokens(other, chance), awkward_tokens(other, chance)
        prompt = prompt[: chance.choice([0, 1, 20])]
        builder = TextBuilder(other, prompt=prompt)
        said = "".join(builder.add(part) for part in in_parts(tokens, chance))
        assert said + builder.add([], is_last=True) == decode_after(other, prompt, tokens), (seed, said)


@pytest.mark.parametrize("kind", ["llama", "unigram", "byte-level"])
def test_tokens_are_not_decoded_again_and_again(kind, monkeypatch):
    other = KINDS[kind]()
    tokens = encode_words(other, [TEXT * 20])[0]
    decoded, batch_decode = [], other.batch_decode

    def counted(sequences, **options):
        decoded.append(sum(map(len, sequences)))
        return batch_decode(sequences, **options)

    monkeypatch.setattr(other, "batch_decode", counted)
    builder = TextBuilder(other)
    parts = in_parts(tokens, random.Random(0))
    said = "".join(builder.add(part) for part in parts) + builder.add([], is_last=True)
    assert said == decode_after(other, [], tokens)
    assert max(decoded[:-2]) < 200 and sum(decoded) < 60 * len(tokens)


@pytest.mark.parametrize("kind", ["llama", "unigram", "unigram, first", "byte-level", "slow"])
@pytest.mark.parametrize("prompt", ["A good morning, a", "Tom: “Zoë”"])
def test_the_space_behind_a_prompt_is_kept(kind, prompt):
    """Token by token, and all at once."""
    other = KINDS[kind]()
    new = encode_words(other, [" happy boy ran."])[0]
    [ids] = encode_documents(other, [prompt])
    assert decode_after(other, ids, new) == " happy boy ran."
    builder = TextBuilder(other, prompt=ids)
    assert "".join(builder.add([token]) for token in new) + builder.add([], is_last=True) == " happy boy ran."


def test_half_a_character_of_the_prompt_becomes_whole(tokenizer):
    ids = tokenizer("a 🐱!", add_special_tokens=False)["input_ids"]
    assert decode_after(tokenizer, ids[:3], ids[3:]) == "🐱!"
    assert decode_after(tokenizer, ids, []) == ""


@pytest.mark.parametrize("kind", ["llama", "unigram", "byte-level"])
def test_tokens_are_spelled_with_their_spaces(kind):
    other = KINDS[kind]()
    ids = [*encode_words(other, [" a happy boy"])[0], other.eos_token_id]
    spelled = spell_tokens(other, ids)
    assert "".join(spelled) == f" a happy boy{other.eos_token}"
    assert spelled[-1] == other.eos_token
