"""`calm generate --draft`."""

import json

import pytest
import torch
from drafts import deciding_model, drafting_model
from toy import failure
from transformers import MistralConfig, MistralForCausalLM

from calm.cli import main
from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A token-level model and a CALM that can draft for it, and models that do not fit together."""
    root, tokenizer = tmp_path_factory.mktemp("models"), train_tokenizer(stories(0, 20), 320)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sliding = MistralConfig(vocab_size=320, num_key_value_heads=2, sliding_window=8, **sizes)
    models = {
        "model": deciding_model(320),
        "draft": drafting_model(vocab_size=320),
        "sliding": MistralForCausalLM(sliding),
    }
    for name, model in models.items():
        model.float().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    models["draft"].save_pretrained(root / "foreign")
    train_tokenizer(stories(50, 60), 320).save_pretrained(root / "foreign")
    return root


def output_of(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_greedy_text_is_the_same_with_a_draft(folders, capsys):
    arguments = ["generate", folders / "model", "Once upon", "A dog", "--max_new_tokens", 9]
    arguments += ["--temperature", 0, "--json"]
    expected = json.loads(output_of(capsys, *arguments))
    for options in ([], ["--draft_chunks", 2]):
        assert json.loads(output_of(capsys, *arguments, "--draft", folders / "draft", *options)) == expected


def test_drafted_text_is_repeatable_and_can_be_streamed(folders, capsys):
    arguments = ["generate", folders / "model", "Once upon", "--draft", folders / "draft", "--seed", 1]
    arguments += ["--max_new_tokens", 9, "--temperature", 1]
    once, again, streamed = (output_of(capsys, *arguments, *more) for more in ([], [], ["--stream"]))
    assert once == again == streamed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("model x --draft_chunks 2", "--draft_chunks requires a draft model; name one with --draft."),
        ("model x --draft draft --draft_chunks 0", "draft_chunks must be at least 1 and at most 64, got 0."),
        ("model x --draft nowhere", "nowhere"),
        ("model x --draft model", "the draft must be a CALM, but 'model' is a LlamaForCausalLM"),
        (
            "draft x --draft draft",
            "a CALM already generates whole chunks; a draft is only for token-level models.",
        ),
        (
            "model x --draft foreign",
            "'foreign' cannot draft for this model: their vocabularies differ, as id",
        ),
        ("sliding x --draft draft", "discards old tokens, so its cache cannot be rolled back"),
        ("model x --draft draft --sampler pool", "the pool sampler is only for models without probabilities"),
    ],
)
def test_unsuitable_drafts_are_refused_in_one_sentence(folders, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    assert message in failure(capsys, "generate", *arguments.split())


def test_draft_may_have_another_precision(folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    drafting_model(vocab_size=320).to(torch.bfloat16).save_pretrained(folders / "half")
    train_tokenizer(stories(0, 20), 320).save_pretrained(folders / "half")
    arguments = ["generate", "model", "Once upon", "--max_new_tokens", 9, "--temperature", 0]
    assert output_of(capsys, *arguments) == output_of(capsys, *arguments, "--draft", "half")
