"""Tokenizers: trained ones are lossless; loaded ones have separate EOS and padding tokens."""

import json
import random
from functools import cache

import datasets
import huggingface_hub.constants
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from other_tokenizers import llama
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from calm.data.stories import stories
from calm.data.tokenizer import BOS, EOS, PAD, load_tokenizer, train_tokenizer
from calm.errors import InputError
from calm.text.encoding import encode_documents

TEXTS = ["", "Tom ran.", " two  spaces ", "Größe 日本 🎈\n\ttab", "a" * 3000]


@cache
def trained(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    return train_tokenizer(stories(0, 100), vocab_size)


def word_tokenizer(*specials: str, appends: str | None = None, **roles: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words, as someone else may have made it."""
    words = ["one", "two", "three", "[UNK]", *specials]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if appends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {appends}", special_tokens=[(appends, words.index(appends))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **roles)


@settings(max_examples=150, deadline=None, database=None)
@given(st.text(max_size=60))
@example("\ufeff\u200b\x00")
@example(" leading, trailing and  double spaces .\r\n")
@example("don't do n't ' s")
@example("e\u0301 \u00e9 ﬁ")
@example("😀👩‍👩‍👧🏽")
def test_any_text_round_trips(text):
    assume(not any(special in text for special in (PAD, EOS, BOS)))
    tokenizer = trained()
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert not {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id} & set(ids[1:])


def test_each_text_begins_with_one_bos_and_has_no_eos():
    tokenizer = trained()
    for ids in encode_documents(tokenizer, TEXTS):
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in ids


def test_vocabulary_of_a_trained_tokenizer():
    tokenizer = trained()
    assert len(tokenizer) == 400
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == (PAD, EOS, BOS)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    assert len(train_tokenizer(["tiny"], 100_000)) < 300  # A small text has no more merges to learn.


def test_training_is_repeatable_and_makes_text_shorter():
    again = train_tokenizer(stories(0, 100), 400)
    assert again.get_vocab() == trained().get_vocab()
    story = next(stories(7))
    assert len(trained()(story)["input_ids"]) < 0.75 * len(story)


def test_training_cuts_text_into_pieces_of_a_thousand_bytes():
    """Learning merges in a run of 300,000 characters without spaces would take minutes."""
    run = "".join(random.Random(0).choices("abcdefg", k=5000))
    cut = [run[start : start + 1000] for start in range(0, 5000, 1000)]
    trained_on_it = train_tokenizer([run], 600).backend_tokenizer.to_str()
    assert trained_on_it == train_tokenizer(cut, 600).backend_tokenizer.to_str()
    assert max(map(len, train_tokenizer(["a" * 3000], 300).get_vocab())) == 1000


def test_training_on_ordinary_text_equals_the_tokenizers_library():
    texts = [*stories(0, 50), "=" * 200 + " " * 400 + "\n" * 100, "https://example.org/" + "ab12" * 200]
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[PAD, EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(texts, trainer)
    ours = json.loads(train_tokenizer(texts, 500).backend_tokenizer.to_str())
    expected = json.loads(theirs.to_str())
    for part in ("model", "pre_tokenizer", "normalizer", "added_tokens"):
        assert ours[part] == expected[part]


def test_padding_is_on_the_left():
    batch = trained()(["Tom", "Tom ran far away"], padding=True)["input_ids"]
    assert batch[0][0] == trained().pad_token_id and batch[0][-1] != trained().pad_token_id


@pytest.mark.parametrize("load", [AutoTokenizer.from_pretrained, load_tokenizer])
def test_saved_tokenizer_loads_unchanged(load, tmp_path):
    tokenizer = trained()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = load(str(tmp_path / "tokenizer"))
    assert loaded.get_vocab() == tokenizer.get_vocab() and len(loaded) == len(tokenizer)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "padding_side"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    ids = loaded(TEXTS)["input_ids"]
    assert ids == tokenizer(TEXTS)["input_ids"]
    assert loaded.batch_decode(ids, skip_special_tokens=True) == TEXTS


def test_a_tokenizer_file_is_enough(tmp_path):
    """`tokenizer.json` does not say which token is EOS; the usual names are recognized."""
    tokenizer = trained()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(loaded) == len(tokenizer)
    assert encode_documents(loaded, TEXTS) == encode_documents(tokenizer, TEXTS)


def test_length_limit_of_a_loaded_tokenizer_is_lifted(tmp_path):
    """Documents are longer than any model's context; that is no reason to warn or to cut."""
    word_tokenizer("</s>", eos_token="</s>", model_max_length=4).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.model_max_length > 1e9
    assert len(encode_documents(loaded, ["one two three " * 10])[0]) == 30


@pytest.mark.parametrize("vocab_size", [0, 256, 258])
def test_too_small_vocabulary_is_refused(vocab_size):
    with pytest.raises(InputError, match=f"vocab_size must be at least 259 .*got {vocab_size}"):
        train_tokenizer(["a"], vocab_size)


def test_smallest_vocabulary_is_lossless():
    tokenizer = train_tokenizer(["a"], 259)
    assert len(tokenizer) == 259
    assert tokenizer.decode(tokenizer("日本")["input_ids"], skip_special_tokens=True) == "日本"


def test_tokenizer_without_eos_is_refused(tmp_path):
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no EOS token; set its eos_token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("eos", ["</s>", "<|endoftext|>"])
def test_well_known_eos_token_is_recognized(eos, tmp_path):
    word_tokenizer(eos).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.eos_token == eos and loaded.eos_token_id == 4


@pytest.mark.parametrize("roles", [{"pad_token": "</s>"}, {}])
def test_padding_is_never_eos(roles, tmp_path):
    """A tokenizer that pads with EOS, or not at all, gets one more token."""
    word_tokenizer("</s>", eos_token="</s>", **roles).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.eos_token_id == 4
    assert loaded.pad_token_id == 5 and len(loaded) == 6
    assert loaded(["one", "one two"], padding=True)["input_ids"] == [[5, 0], [0, 1]]
    loaded.save_pretrained(tmp_path / "again")
    reloaded = load_tokenizer(str(tmp_path / "again"))
    assert reloaded.pad_token_id == 5 and len(reloaded) == 6


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        (["<|repo|>", "<|file|>"], "<|file|>"),
        (["<|right_pad|>", "<|file|>"], "<|right_pad|>"),
        (["<|reserved_0|>", "<|reserved_1|>", "<|file|>"], "<|reserved_0|>"),
        (["<|repo|>", "<|user|>"], "<|repo|>"),
        (["<|user|>"], PAD),
        (["<|repo|>", "<|assistant|>", "[SYSTEM]"], "<|repo|>"),  # Templates can build these from roles.
        ([], PAD),
    ],
)
def test_padding_is_a_spare_control_token_if_there_is_one(others, chosen, tmp_path):
    # The model has an embedding for it; for a new token, one would have to be added.
    tokenizer = word_tokenizer("</s>", *others, eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["</s>", *others]})
    tokenizer.chat_template = "{% for message in messages %}<|user|>{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token == chosen
    assert len(loaded) == len(tokenizer) + (chosen == PAD)


@pytest.mark.parametrize("fault", [None, "a byte", "all bytes"])
def test_padding_is_the_unknown_token_if_no_text_needs_it(fault, tmp_path):
    """As in Llama 2: no control token is unused, and the model has no embedding for a new one."""
    tokenizer = llama()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "<pad>"]
    if fault == "a byte":
        state["model"]["vocab"]["a byte"] = state["model"]["vocab"].pop("<0xE6>")
    if fault == "all bytes":
        state["model"]["byte_fallback"] = False
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **roles).save_pretrained(
        tmp_path
    )
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token == ("<unk>" if fault is None else PAD)
    assert len(loaded) == len(tokenizer) + (fault is not None)
    # No text encodes to the padding, whatever it says.
    text = "Größe 日本 \x00 <unk> <pad> 😀"
    [ids] = encode_documents(loaded, [text])
    assert fault is not None or loaded.pad_token_id not in ids
    assert fault is not None or text in loaded.decode(ids)


def test_existing_padding_token_is_kept(tmp_path):
    word_tokenizer("</s>", "[PAD]", eos_token="</s>", pad_token="[PAD]").save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == 5 and len(loaded) == 6


def test_eos_that_the_tokenizer_appends_is_dropped(tmp_path):
    word_tokenizer("</s>", eos_token="</s>", appends="</s>").save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded("one two")["input_ids"] == [0, 1, 4]
    assert encode_documents(loaded, ["one two", "", "three </s> one"]) == [[0, 1], [], [2, 3, 0]]


@pytest.mark.timeout(60)
def test_missing_or_broken_tokenizers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    for name in (
        str(tmp_path / "none.json"),
        str(tmp_path),
        str(tmp_path / "none"),
        str(broken),
        "nobody/nothing",
    ):
        with pytest.raises(InputError, match="tokenizer") as caught:
            load_tokenizer(name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
