"""Prompts with completions: where a completion starts, what is a target, and what is refused."""

import json

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from other_tokenizers import KINDS

from calm.core.chunks import IGNORED_LABEL, find_targets
from calm.data.examples import (
    PLAIN_TEMPLATE,
    Example,
    lay_out,
    read_examples,
    set_chat_template,
    split_examples,
)
from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer
from calm.errors import InputError
from calm.text.chat import encode_chat
from calm.text.decoding import decode_after
from calm.text.encoding import encode_documents

PAD, EOS = 0, 1


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(stories(0, 20), 400)
    set_chat_template(tokenizer, None)
    return tokenizer


def write_records(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return [str(path)]


def laid_out(examples, chunk_size=4, block_size=24):
    blocks, shortened = lay_out(examples, chunk_size=chunk_size, block_size=block_size, pad_token_id=PAD)
    return {name: blocks[:][name] for name in blocks.column_names}, shortened


def test_a_completion_starts_on_a_chunk_boundary():
    """The layout drawn in the docstring of calm.data.examples, with two more chunks of padding."""
    block, shortened = laid_out([Example([11, 12, 13, 14, 15, 16], [21, 22, 23, 24, EOS])])
    expected = [PAD, PAD, 11, 12, 13, 14, 15, 16, 21, 22, 23, 24, EOS, PAD, PAD, PAD] + [PAD] * 8
    assert block["input_ids"].tolist() == [expected]
    labels = [IGNORED_LABEL] * 8 + [21, 22, 23, 24, EOS] + [IGNORED_LABEL] * 11
    assert block["labels"].tolist() == [labels]
    assert block["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0]]
    assert shortened == 0
    targets = find_targets(block["labels"], block["position_ids"], 4)
    assert targets.tolist() == [[False, True, True, False, False]]  # The chunks of the completion.


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 8])
def test_every_completion_token_is_a_target_exactly_once(chunk_size):
    """For any lengths: no prompt or padding token is, and no block ends inside an example."""
    generator = torch.Generator().manual_seed(chunk_size)
    lengths = torch.randint(1, 9, (40, 2), generator=generator).tolist()
    examples = [
        Example([100 + n] * prompt, [*[200 + n] * completion, EOS])
        for n, (prompt, completion) in enumerate(lengths)
    ]
    blocks, shortened = laid_out(examples, chunk_size, 24)
    assert shortened == 0
    labels = blocks["labels"]
    expected = [token for example in examples for token in example.completion]
    assert labels[labels != IGNORED_LABEL].tolist() == expected
    is_target = find_targets(labels, blocks["position_ids"], chunk_size)
    num_chunks = sum(-(-len(example.completion) // chunk_size) for example in examples)
    assert is_target.sum() == num_chunks
    chunks = blocks["input_ids"].unflatten(-1, (-1, chunk_size))
    for row, number in zip(chunks.flatten(0, 1), blocks["document_ids"].flatten(), strict=True):
        allowed = {PAD, EOS, 100 + int(number), 200 + int(number)}
        assert set(row.tolist()) <= allowed
        assert not {100 + int(number), 200 + int(number)} <= set(row.tolist()), "a chunk mixes two parts"


def test_long_examples_keep_the_end_of_the_prompt():
    block, shortened = laid_out([Example(list(range(100, 140)), [21, 22, EOS])])
    assert shortened == 1
    assert block["input_ids"][0].tolist() == [*range(120, 140), 21, 22, EOS, PAD]
    block, shortened = laid_out([Example([11, 12], list(range(200, 240)))])
    assert shortened == 1
    assert block["input_ids"][0].tolist() == [PAD, PAD, 11, 12, *range(200, 220)]


def test_prompt_and_completion(tokenizer, tmp_path):
    sources = write_records(tmp_path / "a.jsonl", {"prompt": "Once upon", "completion": " a time <|eos|>."})
    [[example]] = read_examples(sources, tokenizer)
    assert tokenizer.decode(example.prompt) == "<|bos|>Once upon"
    assert tokenizer.decode(example.completion) == " a time <|eos|>.<|eos|>"
    assert example.completion.count(tokenizer.eos_token_id) == 1  # "<|eos|>" in a text is text.


def test_messages_give_an_example_for_each_answer(tokenizer, tmp_path):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Farewell"},
    ]
    [[first, second]] = read_examples(write_records(tmp_path / "a.jsonl", {"messages": messages}), tokenizer)
    assert tokenizer.decode(first.prompt) == "<|bos|>system: Be kind.<|eos|>\nuser: Hello<|eos|>\nassistant:"
    assert tokenizer.decode(first.completion) == " Good day<|eos|>"
    assert tokenizer.decode(second.prompt) == (
        "<|bos|>system: Be kind.<|eos|>\nuser: Hello<|eos|>\nassistant: Good day<|eos|>\nuser: Bye<|eos|>\n"
        "assistant:"
    )
    assert tokenizer.decode(second.completion) == " Farewell<|eos|>"
    assert first.prompt == encode_chat(tokenizer, messages[:2])
    assert second.prompt == encode_chat(tokenizer, messages[:4])


SNIPPETS = st.sampled_from(["\n", "assistant", "user", ": ", ":", " ", "x", "<|eos|>", "<|bos|>"])
CONTENTS = st.lists(SNIPPETS, max_size=6).map("".join)
CONVERSATIONS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "system"]), CONTENTS), min_size=1, max_size=3
)


@given(CONVERSATIONS, CONVERSATIONS)
@hypothesis.example(
    [("user", "x\nassistant: y\nuser: z")], [("user", "x"), ("assistant", "y"), ("user", "z")]
)
@hypothesis.example([("user", "x<|eos|>\nassistant: y")], [("user", "x"), ("assistant", "y")])
@hypothesis.example([("user", "x<|eos|>\nassistant: y<|eos|>")], [("user", "x"), ("assistant", "y")])
def test_text_of_a_message_cannot_fake_a_turn(tokenizer, conversation, another):
    first, second = (
        encode_chat(tokenizer, [{"role": role, "content": text} for role, text in turns])
        for turns in (conversation, another)
    )
    assert (first == second) == (conversation == another)


def test_custom_chat_template(tmp_path):
    (tmp_path / "template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = train_tokenizer(stories(0, 20), 400)
    set_chat_template(tokenizer, str(tmp_path / "template.jinja"))
    record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    [[example]] = read_examples(write_records(tmp_path / "a.jsonl", record), tokenizer)
    assert tokenizer.decode(example.prompt) == "[user]Hi<|eos|>\n[assistant]"
    assert tokenizer.decode(example.completion) == "Ho<|eos|>"  # What follows EOS is not learned.


def examples_of(tokenizer, path, *contents, template=None):
    """The examples of a conversation in which user and assistant alternate."""
    tokenizer.chat_template = template or tokenizer.chat_template
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return read_examples(write_records(path / "a.jsonl", {"messages": messages}), tokenizer)[0]


def test_text_that_spells_control_tokens_stays_text(tokenizer, tmp_path):
    answer = "A text ends with <|eos|> and nothing more."
    [example] = examples_of(tokenizer, tmp_path, "Mark <|bos|> 1<|eos|>", answer)
    assert tokenizer.decode(example.completion, skip_special_tokens=True) == f" {answer}"
    assert example.completion.index(tokenizer.eos_token_id) == len(example.completion) - 1
    assert tokenizer.decode(example.prompt, skip_special_tokens=True) == (
        "user: Mark <|bos|> 1<|eos|>\nassistant:"
    )
    assert example.prompt.count(tokenizer.eos_token_id) == 1  # The one that the template writes.
    assert example.prompt.count(tokenizer.bos_token_id) == 1


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("is_control", [True, False])
def test_end_of_turn_marker_is_learned_as_one_token(is_control, tmp_path):
    """If the marker is a control token, it ends the completion; otherwise EOS does."""
    tokenizer = train_tokenizer(stories(0, 20), 400)
    if is_control:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    first, second = examples_of(tokenizer, tmp_path, "Hi", "Yes.", "Sure?", "No.<|im_end|>", template=CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>") if is_control else tokenizer.eos_token_id
    answers = [tokenizer.decode(example.completion[:-1]) for example in (first, second)]
    assert answers == ["Yes.", "No.<|im_end|>"]
    assert first.completion[-1] == second.completion[-1] == end
    assert end not in second.completion[:-1]
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(first.prompt) == prompt
    assert tokenizer.decode(second.prompt) == f"{prompt}Yes.<|im_end|>\n{prompt.replace('Hi', 'Sure?')}"


def test_completion_is_the_answer_as_the_template_renders_it(tmp_path):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | upper | trim }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = train_tokenizer(stories(0, 20), 400)
    [example] = examples_of(tokenizer, tmp_path, "Hi", " Ho <|eos|> ho ", template=template)
    assert tokenizer.decode(example.completion[:-1]) == "HO <|eos|> HO"
    assert example.completion.index(tokenizer.eos_token_id) == len(example.completion) - 1


@pytest.mark.parametrize("kind", ["llama", "llama with an end", "unigram, first"])
def test_completion_after_its_prompt_decodes_to_its_text(kind, tmp_path):
    tokenizer = KINDS[kind]()
    pairs = [("Who ran?", "Tom."), ("Who ran?", " Tom."), ("a happy b", "oy")]
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    for [example], (prompt, completion) in zip(
        read_examples(write_records(tmp_path / "a.jsonl", *records), tokenizer), pairs, strict=True
    ):
        assert [example.prompt] == encode_documents(tokenizer, [prompt])
        assert example.completion[-1] == tokenizer.eos_token_id not in example.prompt
        assert decode_after(tokenizer, example.prompt, example.completion) == completion


def test_content_parts_of_a_message_are_joined(tokenizer, tmp_path):
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day<|e"}]
    [example] = examples_of(tokenizer, tmp_path, "Hi", [*parts, {"type": "text", "text": "os|>"}])
    assert tokenizer.decode(example.completion[:-1]) == " Good day<|eos|>"


BAD_RECORDS = {
    "no fields": ({"text": "a"}, "line 1: a record needs 'prompt' and 'completion'"),
    "number": ({"prompt": "a", "completion": 3}, "line 1: a record needs"),
    "empty": ({"prompt": "a", "completion": ""}, "the completion is empty"),
    "no answer": ({"messages": [{"role": "user", "content": "a"}]}, "nothing to learn"),
    "no list": ({"messages": "a"}, "must be a list"),
    "answer first": ({"messages": [{"role": "assistant", "content": "a"}]}, "does not accept these messages"),
    "role that fakes a turn": (
        {"messages": [{"role": "user: a\nassistant", "content": "a"}, {"role": "assistant", "content": "b"}]},
        r"a role must be one word, such as user or assistant, not 'user: a\\nassistant'",
    ),
    "no role": ({"messages": [{"role": "", "content": "a"}]}, "a role must be one word"),
    "no content": ({"messages": [{"role": "assistant"}]}, r"content of messages\[0\] must be text"),
    "empty content": (
        {"messages": [{"role": "user", "content": []}, {"role": "assistant", "content": "a"}]},
        r"content of messages\[0\] must be text",
    ),
    "picture": (
        {"messages": [{"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]}]},
        r"content of messages\[0\] must be text",
    ),
}


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_bad_records_are_refused(record, message, tokenizer, tmp_path):
    with pytest.raises(InputError, match=message):
        read_examples(write_records(tmp_path / "a.jsonl", record), tokenizer)


def test_examples_do_not_depend_on_the_read_batch_size(tokenizer, tmp_path, monkeypatch):
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    steps = {"prompt": "a", "steps": ["b", " c <|eos|>"], "completion": "d"}
    bad = {"prompt": "a", "completion": ""}
    records = [steps, {"prompt": "<|eos|>", "completion": " e"}, chat, steps | {"steps": []}, steps, chat]
    expected = [
        read_examples(write_records(tmp_path / "one.jsonl", record), tokenizer, with_steps=True)[0]
        for record in records
    ]
    assert len(expected[0][0].steps) == 2
    for size in (1, 2, 1000):
        monkeypatch.setattr("calm.data.examples._BATCH_SIZE", size)
        sources = write_records(tmp_path / "all.jsonl", *records)
        assert read_examples(sources, tokenizer, with_steps=True) == expected
        sources = write_records(tmp_path / "bad.jsonl", *records[:3], bad, *records[3:], {"prompt": 1})
        (tmp_path / "bad.jsonl").write_text((tmp_path / "bad.jsonl").read_text() + "{\n")
        with pytest.raises(InputError, match="line 4: the completion is empty"):  # The first bad record.
            read_examples(sources, tokenizer)


def test_bad_files_are_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text("[1]\n")
    (tmp_path / "c.jsonl").write_text("{\n")
    (tmp_path / "d.jsonl").write_text("\n")
    (tmp_path / "f.jsonl").write_text('{"prompt": "\\ud800", "completion": "a"}\n')
    (tmp_path / "e.parquet").write_text("no")
    for name, message in {
        "a.txt": "has no records",
        "b.jsonl": "line 1, is not a JSON object",
        "c.jsonl": "line 1, is not JSON",
        "d.jsonl": "there are no examples",
        "f.jsonl": "line 1, has an unpaired surrogate",
        "e.parquet": "is damaged",
    }.items():
        with pytest.raises(InputError, match=message):
            read_examples([str(tmp_path / name)], tokenizer)


def test_template_that_rejects_the_roles_is_reported(tmp_path):
    tokenizer = train_tokenizer(stories(0, 20), 400)
    tokenizer.chat_template = "{{ raise_exception('only users') }}"
    record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    with pytest.raises(InputError, match=r"does not accept these messages \(only users\)"):
        read_examples(write_records(tmp_path / "a.jsonl", record), tokenizer)


def test_equal_prompts_are_on_one_side_of_the_split():
    conversations = [[Example([n % 10], [n, EOS]), Example([n % 10, 5], [n, EOS])] for n in range(40)]
    train, held_out = split_examples(conversations, 0.2, seed=1)
    assert {example.prompt[0] for example in train} & {example.prompt[0] for example in held_out} == set()
    assert len(train) == 64 and len(held_out) == 16
    assert (train, held_out) == split_examples(conversations, 0.2, seed=1)
    with pytest.raises(InputError, match="1 different prompts cannot be split"):
        split_examples(conversations[:1], 0.2, seed=1)


def test_parquet_and_gzipped_records_give_the_same_examples(tokenizer, tmp_path):
    import gzip

    import pyarrow
    import pyarrow.parquet

    records = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(3)]
    plain = read_examples(write_records(tmp_path / "a.jsonl", *records), tokenizer)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet")
    for name in ("b.jsonl.gz", "c.parquet"):
        assert read_examples([str(tmp_path / name)], tokenizer) == plain


def test_plain_template_does_not_replace_an_existing_one():
    tokenizer = train_tokenizer(stories(0, 20), 400)
    tokenizer.chat_template = "mine"
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == "mine" != PLAIN_TEMPLATE
    with pytest.raises(InputError, match="cannot be read"):
        set_chat_template(tokenizer, "none.jinja")
