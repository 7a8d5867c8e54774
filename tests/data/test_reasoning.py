"""Rows of questions with steps: every token's place, for chunks of one, two and four."""

import pytest
import torch

from calm.core.chunks import IGNORED_LABEL, find_targets
from calm.data.examples import Example, read_examples
from calm.data.reasoning import Layout
from calm.data.tasks import write_items
from calm.data.tokenizer import train_tokenizer
from calm.errors import InputError
from calm.models.thoughts import THOUGHT, Thoughts

PAD, EOS, BOS, NOT = 0, 1, 2, IGNORED_LABEL
EXAMPLE = Example([BOS, 11, 12], [41, EOS], ([21, 22, 23, 24], [31, 32, 33, 34, 35]))
THOUGHTS = Thoughts(0, BOS, EOS)


def row(chunk_size, left_out, thoughts, context=64, example=EXAMPLE):
    layout = Layout(chunk_size, context, PAD, THOUGHT)
    between = [] if thoughts is None else THOUGHTS.tokens(chunk_size, thoughts)
    made = layout.row(example, left_out, between)
    return made.before, made.after, made.labels[len(made.before) :]


def test_tokens_are_not_padded():
    before, after, labels = row(1, 1, 2)
    assert before == [BOS, 11, 12, BOS, THOUGHT, THOUGHT, EOS]
    assert after == labels == [31, 32, 33, 34, 35, 41, EOS]


def test_chunks_of_two():
    before, after, labels = row(2, 1, 1)
    assert before == [PAD, BOS, 11, 12, BOS, BOS, THOUGHT, THOUGHT, EOS, EOS]
    assert after == [31, 32, 33, 34, 35, PAD, 41, EOS]
    assert labels == [31, 32, 33, 34, 35, NOT, 41, EOS]


def test_chunks_of_four():
    """The picture at the top of the module."""
    before, after, labels = row(4, 0, 0)
    assert before == [PAD, BOS, 11, 12, *[BOS] * 4, *[EOS] * 4]
    assert after == [21, 22, 23, 24, 31, 32, 33, 34, 35, PAD, PAD, PAD, 41, EOS, PAD, PAD]
    assert labels == [21, 22, 23, 24, 31, 32, 33, 34, 35, NOT, NOT, NOT, 41, EOS, NOT, NOT]


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_a_step_that_is_left_out_moves_no_chunk(chunk_size):
    whole = row(chunk_size, 0, None)[1]
    for left_out in (1, 2, 9):
        rest = row(chunk_size, left_out, None)[1]
        assert rest == whole[len(whole) - len(rest) :]
    assert row(chunk_size, 9, None)[1][:2] == [41, EOS]


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_what_is_written_begins_in_one_column(chunk_size):
    """Rows of any lengths and numbers of thoughts; only what is written is a target."""
    layout = Layout(chunk_size, 64, PAD, THOUGHT)
    longer = Example([BOS, *range(50, 59)], [42, EOS], EXAMPLE.steps)
    rows = [
        layout.row(example, left_out, THOUGHTS.tokens(chunk_size, thoughts))
        for example, left_out, thoughts in ((EXAMPLE, 0, 0), (longer, 2, 4), (EXAMPLE, 1, 2))
    ]
    batch = layout.batch(rows)
    assert {len(tensor) for tensor in batch.values()} == {3}
    column = max(len(one.before) for one in rows)
    for number, one in enumerate(rows):
        front, end = column - len(one.before), column + len(one.after)
        tokens = [PAD if token == THOUGHT else token for token in one.before + one.after]
        width = batch["input_ids"].shape[1]
        assert batch["input_ids"][number].tolist() == [PAD] * front + tokens + [PAD] * (width - end)
        assert batch["attention_mask"][number].tolist() == [
            int(front <= place < end) for place in range(width)
        ]
        assert batch["labels"][number].tolist() == [NOT] * front + one.labels + [NOT] * (width - end)
        thinks = batch["is_thought"][number].repeat_interleave(chunk_size).tolist()
        assert thinks[front:end] == [token == THOUGHT for token in one.before + one.after]
        assert not any(thinks[:front]) and not any(thinks[end:])
        positions = batch["position_ids"][number, front // chunk_size : end // chunk_size]
        assert positions.tolist() == list(range((end - front) // chunk_size))
    targets = find_targets(batch["labels"], batch["position_ids"], chunk_size).sum(-1).tolist()
    assert targets == [len([label for label in one.labels[::chunk_size] if label != NOT]) for one in rows]


def test_labels_of_the_question_are_none():
    """Whatever the question says, what is written and its labels stay."""
    other = Example([BOS, 60, 61], EXAMPLE.completion, EXAMPLE.steps)
    for chunk_size in (1, 2, 4):
        one, another = row(chunk_size, 1, 2), row(chunk_size, 1, 2, example=other)
        assert one[1:] == another[1:] and one[0] != another[0]
        layout = Layout(chunk_size, 64, PAD, THOUGHT)
        labels = layout.batch([layout.row(EXAMPLE, 1, THOUGHTS.tokens(chunk_size, 2))])["labels"]
        assert torch.all(labels[:, : len(one[0])] == NOT)


def test_of_a_long_prompt_the_end_is_kept():
    example = Example([BOS, *range(10, 40)], [41, EOS])
    before, after, _ = row(4, 0, 1, context=32, example=example)
    assert len(before) + len(after) == 32 and before[:16] == list(range(24, 40))
    with pytest.raises(InputError, match="leave no room"):
        row(4, 0, 6, context=32, example=example)


def test_steps_of_records(tmp_path):
    write_items(tmp_path / "chain.jsonl", "chain", 3, 1, 40, False)
    text = (tmp_path / "chain.jsonl").read_text()
    tokenizer = train_tokenizer([text.replace('"', " ").replace("\\n", " ")] * 3, 400)
    for [example] in read_examples([str(tmp_path / "chain.jsonl")], tokenizer, with_steps=True):
        assert len(example.steps) == 3
        spelled = [tokenizer.decode(step) for step in example.steps]
        assert all(step[0] == " " and step.endswith(" .") for step in spelled)
    [example] = read_examples([str(tmp_path / "chain.jsonl")], tokenizer)[0]
    assert example.steps == ()


@pytest.mark.parametrize(
    ("steps", "word"),
    [
        ('"a"', "list of texts"),
        ("[1]", "list of texts"),
        ('[""]', "none of them empty"),
        *((steps, "line 1: 'steps' must be a list of texts") for steps in ('""', "0", "false", "{}", "0.0")),
    ],
)
def test_steps_that_are_none(tmp_path, steps, word):
    file = tmp_path / "records.jsonl"
    file.write_text(f'{{"prompt": "a", "completion": "b", "steps": {steps}}}\n')
    with pytest.raises(InputError, match=word):
        read_examples([str(file)], train_tokenizer(["a b"], 300), with_steps=True)
    assert len(read_examples([str(file)], train_tokenizer(["a b"], 300))) == 1


def test_records_without_steps_are_read_as_such(tmp_path):
    file = tmp_path / "records.jsonl"
    rest = '"prompt": "a", "completion": "b"}\n'
    file.write_text("".join(f"{{{steps}{rest}" for steps in ("", '"steps": null, ', '"steps": [], ')))
    examples = read_examples([str(file)], train_tokenizer(["a b"], 300), with_steps=True)
    assert [one.steps for [one] in examples] == [(), (), ()]
    assert [one.where for [one] in examples] == [f"'{file}', line {number}" for number in (1, 2, 3)]


def test_steps_of_conversations_are_refused(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text('{"messages": [{"role": "assistant", "content": "b"}], "steps": ["a"]}\n')
    with pytest.raises(InputError, match="not with 'messages'"):
        read_examples([str(file)], train_tokenizer(["a b"], 300), with_steps=True)


@pytest.mark.parametrize(("chunk_size", "per_step"), [(1, 1), (1, 3), (2, 2), (4, 1), (4, 2)])
def test_thoughts_that_tell_their_steps(chunk_size, per_step):
    """The label of a thought is a chunk of its own step, and nothing else has one."""
    layout = Layout(chunk_size, 64, PAD, THOUGHT)
    for number in (0, 1, 2):
        between = THOUGHTS.tokens(chunk_size, number * per_step)
        told = layout.step_labels(EXAMPLE, between, per_step)
        chunks = [told[place : place + chunk_size] for place in range(0, len(told), chunk_size)]
        nothing = [NOT] * chunk_size
        assert len(told) == len(between) and chunks[0] == chunks[-1] == nothing
        for step in range(number):
            part = EXAMPLE.steps[step][: per_step * chunk_size]
            part += [NOT] * (per_step * chunk_size - len(part))
            expected = [part[place : place + chunk_size] for place in range(0, len(part), chunk_size)]
            assert chunks[1 + step * per_step :][:per_step] == expected
        made = layout.row(EXAMPLE, number, between, told)
        assert (
            made.labels == [NOT] * (len(made.before) - len(told)) + told + layout.answer(EXAMPLE, number)[1]
        )
        assert torch.equal(layout.batch([made])["input_ids"], layout.batch([made])["input_ids"].clamp_min(0))
