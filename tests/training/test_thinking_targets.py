"""What a model that thinks learns to predict: the steps that its thoughts replace, and the completion."""

import pytest
from tiny import tiny_model
from torch.testing import assert_close

from calm.data.examples import Example, read_examples
from calm.data.reasoning import RowLayout
from calm.data.tokenizer import train_tokenizer
from calm.evaluation.answers import completions_of, ends_with_completion
from calm.models.thoughts import THOUGHT, Thoughts
from calm.text.decoding import decode_after

MARKERS = (2, 1)  # BOS and EOS.


@pytest.mark.parametrize("backbone_input", ["tokens", "both"])
@pytest.mark.parametrize("mode", ["state", "pause"])
def test_targets_of_thoughts_are_steps_with_padding(mode, backbone_input):
    """For steps that do not fill their chunks, whatever the backbone reads there."""
    model = tiny_model(4, backbone_input=backbone_input)
    layout = RowLayout(4, 64, 0, THOUGHT)
    example = Example([2, 11, 12], [9, 1], ([11, 12, 13, 14], [16, 17]))
    between = Thoughts(2, *MARKERS, mode).tokens(4)
    batch = layout.batch([layout.row(example, 2, between, layout.step_labels(example, between, 1))])
    targets = []
    model.head.loss = lambda states, target, *_: targets.append(target) or states.sum(-1)
    model(**batch)
    [target] = targets
    assert target.tokens_PK.tolist() == [[11, 12, 13, 14], [16, 17, 0, 0], [9, 1, 0, 0]]
    assert_close(target.posterior_PZ.mean, model.autoencoder.encode(target.tokens_PK).mean)


def test_completion_is_separated_from_the_steps(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text('{"prompt": "a", "steps": ["b = 1 ."], "completion": "4"}\n')
    tokenizer = train_tokenizer(["a b = 1 . 4"] * 20, 300)
    [[example]] = read_examples([str(file)], tokenizer, with_steps=True)
    written = decode_after(tokenizer, example.prompt, [*example.steps[0], *example.completion])
    completions = completions_of([example], tokenizer)
    assert written.endswith(". 4") and ends_with_completion([written], completions) == 100
