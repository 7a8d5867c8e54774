"""Text as tokens arrive: complete characters, stop strings, and the same text as decoding all at once."""

import random

import pytest
from other_tokenizers import KINDS

from calm.text.decoding import TextBuilder, decode_after, spell_tokens
from calm.text.encoding import encode_documents, encode_words

TEXT = "Zoë said: “naïve 🐱 cats” — once, twice, thrice! STOP and more."


def in_parts(tokens, rng):
    parts, start = [], 0
    while start < len(tokens):
        size = rng.randrange(1, 5)
        parts.append(tokens[start : start + size])
        start += size
    return parts


@pytest.mark.parametrize("seed", range(10))
def test_text_added_in_parts_joins_to_the_text(seed, tokenizer):
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    builder, texts = TextBuilder(tokenizer), []
    parts = in_parts(tokens, random.Random(seed))
    for number, part in enumerate(parts):
        texts.append(builder.add(part, is_last=number == len(parts) - 1))
        assert "\ufffd" not in texts[-1]
    assert "".join(texts) == TEXT and builder.num_tokens == len(tokens)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("stops", [["STOP"], ["thrice", "twice"], ["🐱"], ["e", "naïve"]])
def test_no_part_of_a_stop_string_is_returned(seed, stops, tokenizer):
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    builder, text = TextBuilder(tokenizer, stops), ""
    for part in in_parts(tokens, random.Random(seed)):
        text += builder.add(part)
        if builder.is_stopped:
            break
    assert builder.is_stopped
    assert text == TEXT[: min(TEXT.index(stop) for stop in stops)]
    assert builder.add(tokens) == ""


def test_unfinished_stop_string_is_returned_at_the_end(tokenizer):
    tokens = tokenizer("one two thr", add_special_tokens=False)["input_ids"]
    builder = TextBuilder(tokenizer, ["three"])
    text = builder.add(tokens)
    assert text == "one two "
    assert text + builder.add([], is_last=True) == "one two thr"


def test_incomplete_last_character_becomes_a_replacement_character(tokenizer):
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


def awkward_tokens(tokenizer, rng):
    """Tokens of awkward texts with some control tokens, or random tokens, or mostly byte tokens."""
    vocabulary = tokenizer.get_vocab()
    ids = sorted(vocabulary.values())
    byte_tokens = [i for token, i in vocabulary.items() if token.startswith("<0x")] or ids
    kind = rng.choice(["text", "any", "bytes"])
    if kind != "text":
        return [rng.choice(byte_tokens if kind == "bytes" and rng.random() < 0.8 else ids) for _ in range(60)]
    tokens = encode_words(tokenizer, ["".join(rng.choices(AWKWARD, k=2))])[0]
    for _ in range(rng.randrange(4)):
        tokens.insert(rng.randrange(len(tokens)), rng.choice(tokenizer.all_special_ids))
    return tokens


@pytest.mark.parametrize("cleans_up", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_in_parts_equals_decoding_all_tokens(kind, cleans_up):
    tokenizer = KINDS[kind]()
    tokenizer.clean_up_tokenization_spaces = cleans_up
    for seed in range(150):
        rng = random.Random(seed)
        tokens, prompt = awkward_tokens(tokenizer, rng), awkward_tokens(tokenizer, rng)
        prompt = prompt[: rng.choice([0, 1, 20])]
        builder = TextBuilder(tokenizer, prompt=prompt)
        text = "".join(builder.add(part) for part in in_parts(tokens, rng))
        assert text + builder.add([], is_last=True) == decode_after(tokenizer, prompt, tokens), (seed, text)


@pytest.mark.parametrize("kind", ["llama", "unigram", "byte-level"])
def test_decoding_takes_time_linear_in_the_tokens(kind, monkeypatch):
    tokenizer = KINDS[kind]()
    tokens = encode_words(tokenizer, [TEXT * 20])[0]
    num_decoded, batch_decode = [], tokenizer.batch_decode

    def counting_decode(sequences, **options):
        num_decoded.append(sum(map(len, sequences)))
        return batch_decode(sequences, **options)

    monkeypatch.setattr(tokenizer, "batch_decode", counting_decode)
    builder = TextBuilder(tokenizer)
    parts = in_parts(tokens, random.Random(0))
    text = "".join(builder.add(part) for part in parts) + builder.add([], is_last=True)
    assert text == decode_after(tokenizer, [], tokens)
    assert max(num_decoded[:-2]) < 200 and sum(num_decoded) < 60 * len(tokens)


@pytest.mark.parametrize("kind", ["llama", "unigram", "unigram, first", "byte-level", "slow"])
@pytest.mark.parametrize("prompt", ["A good morning, a", "Tom: “Zoë”"])
def test_space_after_a_prompt_is_kept(kind, prompt):
    """Both all at once and token by token."""
    tokenizer = KINDS[kind]()
    new = encode_words(tokenizer, [" happy boy ran."])[0]
    [ids] = encode_documents(tokenizer, [prompt])
    assert decode_after(tokenizer, ids, new) == " happy boy ran."
    builder = TextBuilder(tokenizer, prompt=ids)
    assert "".join(builder.add([token]) for token in new) + builder.add([], is_last=True) == " happy boy ran."


def test_character_begun_in_the_prompt_is_completed(tokenizer):
    ids = tokenizer("a 🐱!", add_special_tokens=False)["input_ids"]
    assert decode_after(tokenizer, ids[:3], ids[3:]) == "🐱!"
    assert decode_after(tokenizer, ids, []) == ""


@pytest.mark.parametrize("kind", ["llama", "unigram", "byte-level"])
def test_tokens_are_spelled_with_their_spaces(kind):
    tokenizer = KINDS[kind]()
    ids = [*encode_words(tokenizer, [" a happy boy"])[0], tokenizer.eos_token_id]
    spelled = spell_tokens(tokenizer, ids)
    assert "".join(spelled) == f" a happy boy{tokenizer.eos_token}"
    assert spelled[-1] == tokenizer.eos_token
