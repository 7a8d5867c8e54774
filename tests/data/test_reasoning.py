"""Rows of questions with steps: where every token goes, for chunks of one, two and four."""

import pytest
import torch

from calm.core.chunks import IGNORED_LABEL, find_targets
from calm.data.examples import Example, read_examples
from calm.data.reasoning import RowLayout
from calm.data.tasks import write_items
from calm.data.tokenizer import train_tokenizer
from calm.errors import InputError
from calm.models.thoughts import THOUGHT, Thoughts

PAD, EOS, BOS, X = 0, 1, 2, IGNORED_LABEL
EXAMPLE = Example([BOS, 11, 12], [41, EOS], ([21, 22, 23, 24], [31, 32, 33, 34, 35]))
THOUGHTS = Thoughts(0, BOS, EOS)


def lay_out(chunk_size, left_out, num_thoughts, context=64, example=EXAMPLE):
    """Tokens of the prompt and thoughts, written tokens, and the labels of the latter."""
    layout = RowLayout(chunk_size, context, PAD, THOUGHT)
    thoughts = [] if num_thoughts is None else THOUGHTS.tokens(chunk_size, num_thoughts)
    row = layout.row(example, left_out, thoughts)
    return row.before, row.after, row.labels[len(row.before) :]


def test_layout_with_chunks_of_one_token():
    before, after, labels = lay_out(1, 1, 2)
    assert before == [BOS, 11, 12, BOS, THOUGHT, THOUGHT, EOS]
    assert after == labels == [31, 32, 33, 34, 35, 41, EOS]


def test_layout_with_chunks_of_two_tokens():
    before, after, labels = lay_out(2, 1, 1)
    assert before == [PAD, BOS, 11, 12, BOS, BOS, THOUGHT, THOUGHT, EOS, EOS]
    assert after == [31, 32, 33, 34, 35, PAD, 41, EOS]
    assert labels == [31, 32, 33, 34, 35, X, 41, EOS]


def test_layout_with_chunks_of_four_tokens():
    """The layout drawn in the docstring of calm.data.reasoning, with another step and no thoughts."""
    before, after, labels = lay_out(4, 0, 0)
    assert before == [PAD, BOS, 11, 12, *[BOS] * 4, *[EOS] * 4]
    assert after == [21, 22, 23, 24, 31, 32, 33, 34, 35, PAD, PAD, PAD, 41, EOS, PAD, PAD]
    assert labels == [21, 22, 23, 24, 31, 32, 33, 34, 35, X, X, X, 41, EOS, X, X]


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_leaving_out_steps_keeps_the_remaining_chunks(chunk_size):
    full = lay_out(chunk_size, 0, None)[1]
    for left_out in (1, 2, 9):
        shorter = lay_out(chunk_size, left_out, None)[1]
        assert shorter == full[len(full) - len(shorter) :]
    assert lay_out(chunk_size, 9, None)[1][:2] == [41, EOS]


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_written_tokens_of_a_batch_start_in_the_same_column(chunk_size):
    """Whatever the lengths and numbers of thoughts; only written steps and answers are targets."""
    layout = RowLayout(chunk_size, 64, PAD, THOUGHT)
    longer = Example([BOS, *range(50, 59)], [42, EOS], EXAMPLE.steps)
    rows = [
        layout.row(example, left_out, THOUGHTS.tokens(chunk_size, thoughts))
        for example, left_out, thoughts in ((EXAMPLE, 0, 0), (longer, 2, 4), (EXAMPLE, 1, 2))
    ]
    batch = layout.batch(rows)
    assert {len(tensor) for tensor in batch.values()} == {3}
    column = max(len(row.before) for row in rows)
    for number, row in enumerate(rows):
        front, end = column - len(row.before), column + len(row.after)
        tokens = [PAD if token == THOUGHT else token for token in row.before + row.after]
        width = batch["input_ids"].shape[1]
        assert batch["input_ids"][number].tolist() == [PAD] * front + tokens + [PAD] * (width - end)
        assert batch["attention_mask"][number].tolist() == [int(front <= i < end) for i in range(width)]
        assert batch["labels"][number].tolist() == [X] * front + row.labels + [X] * (width - end)
        is_thought_token = batch["is_thought"][number].repeat_interleave(chunk_size).tolist()
        assert is_thought_token[front:end] == [token == THOUGHT for token in row.before + row.after]
        assert not any(is_thought_token[:front]) and not any(is_thought_token[end:])
        positions = batch["position_ids"][number, front // chunk_size : end // chunk_size]
        assert positions.tolist() == list(range((end - front) // chunk_size))
    targets = find_targets(batch["labels"], batch["position_ids"], chunk_size).sum(-1).tolist()
    assert targets == [len([label for label in row.labels[::chunk_size] if label != X]) for row in rows]


def test_question_tokens_have_no_labels():
    """Another question changes neither the written tokens nor their labels."""
    other = Example([BOS, 60, 61], EXAMPLE.completion, EXAMPLE.steps)
    for chunk_size in (1, 2, 4):
        first, second = lay_out(chunk_size, 1, 2), lay_out(chunk_size, 1, 2, example=other)
        assert first[1:] == second[1:] and first[0] != second[0]
        layout = RowLayout(chunk_size, 64, PAD, THOUGHT)
        labels = layout.batch([layout.row(EXAMPLE, 1, THOUGHTS.tokens(chunk_size, 2))])["labels"]
        assert torch.all(labels[:, : len(first[0])] == X)


def test_long_prompts_keep_their_end():
    example = Example([BOS, *range(10, 40)], [41, EOS])
    before, after, _ = lay_out(4, 0, 1, context=32, example=example)
    assert len(before) + len(after) == 32 and before[:16] == list(range(24, 40))
    with pytest.raises(InputError, match="leave no room"):
        lay_out(4, 0, 6, context=32, example=example)


def test_steps_are_read_from_records(tmp_path):
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
    ("steps", "message"),
    [
        ('"a"', "list of texts"),
        ("[1]", "list of texts"),
        ('[""]', "none of them empty"),
        *((steps, "line 1: 'steps' must be a list of texts") for steps in ('""', "0", "false", "{}", "0.0")),
    ],
)
def test_invalid_steps_are_refused_if_steps_are_read(tmp_path, steps, message):
    file = tmp_path / "records.jsonl"
    file.write_text(f'{{"prompt": "a", "completion": "b", "steps": {steps}}}\n')
    with pytest.raises(InputError, match=message):
        read_examples([str(file)], train_tokenizer(["a b"], 300), with_steps=True)
    assert len(read_examples([str(file)], train_tokenizer(["a b"], 300))) == 1


def test_records_may_lack_steps(tmp_path):
    file = tmp_path / "records.jsonl"
    fields = '"prompt": "a", "completion": "b"}\n'
    file.write_text("".join(f"{{{steps}{fields}" for steps in ("", '"steps": null, ', '"steps": [], ')))
    examples = read_examples([str(file)], train_tokenizer(["a b"], 300), with_steps=True)
    assert [example.steps for [example] in examples] == [(), (), ()]
    assert [example.where for [example] in examples] == [f"'{file}', line {number}" for number in (1, 2, 3)]


def test_steps_of_conversations_are_refused(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text('{"messages": [{"role": "assistant", "content": "b"}], "steps": ["a"]}\n')
    with pytest.raises(InputError, match="not with 'messages'"):
        read_examples([str(file)], train_tokenizer(["a b"], 300), with_steps=True)


@pytest.mark.parametrize(("chunk_size", "per_step"), [(1, 1), (1, 3), (2, 2), (4, 1), (4, 2)])
def test_thoughts_are_labelled_with_their_steps(chunk_size, per_step):
    """A thought is labelled with a chunk of the step that it replaces; markers have no labels."""
    layout = RowLayout(chunk_size, 64, PAD, THOUGHT)
    for num_steps in (0, 1, 2):
        thoughts = THOUGHTS.tokens(chunk_size, num_steps * per_step)
        step_labels = layout.step_labels(EXAMPLE, thoughts, per_step)
        chunks = [step_labels[start : start + chunk_size] for start in range(0, len(step_labels), chunk_size)]
        ignored_chunk = [X] * chunk_size
        assert len(step_labels) == len(thoughts) and chunks[0] == chunks[-1] == ignored_chunk
        for step in range(num_steps):
            part = EXAMPLE.steps[step][: per_step * chunk_size]
            part += [X] * (per_step * chunk_size - len(part))
            expected = [part[start : start + chunk_size] for start in range(0, len(part), chunk_size)]
            assert chunks[1 + step * per_step :][:per_step] == expected
        row = layout.row(EXAMPLE, num_steps, thoughts, step_labels)
        assert (
            row.labels
            == [X] * (len(row.before) - len(step_labels)) + step_labels + layout.answer(EXAMPLE, num_steps)[1]
        )
        assert torch.equal(layout.batch([row])["input_ids"], layout.batch([row])["input_ids"].clamp_min(0))
