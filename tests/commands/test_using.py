"""Thoughts in `calm generate` and `calm flops`, and the vocabulary size in `calm flops`."""

import json

import pytest
from tiny import thinking_model
from toy import failure

from calm.cli import main
from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer
from calm.flops import cost_of_thoughts
from calm.models.loading import load_config, load_language_model_and_tokenizer
from calm.texts import continue_texts

TRAINED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    thinking_model(TRAINED, vocab_size=320).float().save_pretrained(folder)
    train_tokenizer(stories(0, 20), 320).save_pretrained(folder)
    return folder


def output_of(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_generate_takes_a_number_of_thoughts(folder, capsys):
    model, tokenizer = load_language_model_and_tokenizer(str(folder))
    texts = {}
    for number in (None, 0, TRAINED, 9):
        options = [] if number is None else ["--num_thoughts", number]
        arguments = ["generate", folder, "Once upon", "--max_new_tokens", 12, "--seed", 1, *options, "--json"]
        [sample] = json.loads(output_of(capsys, *arguments))["samples"]
        texts[number] = sample["text"]
        settings = {"max_new_tokens": 12, "seed": 1, "temperature": 0.5, "num_thoughts": number}
        assert [sample["text"]] == continue_texts(model, tokenizer, ["Once upon"], **settings)
    assert texts[None] == texts[TRAINED] and len(set(texts.values())) == 3


def test_flops_of_thoughts_are_reported(folder, capsys):
    """For the model's own number of thoughts, or another one."""
    for options, number in (([], TRAINED), (["--thoughts", 9], 9), (["--thoughts", 0], None)):
        out = output_of(capsys, "flops", folder, *options, "--positions", 16)
        assert (f"; {number} thoughts and 2 markers add " in out) == (number is not None)
        reported = json.loads(output_of(capsys, "flops", folder, *options, "--positions", 16, "--json"))
        if number is None:
            assert "thoughts" not in reported
            continue
        expected = cost_of_thoughts(load_config(folder), number, 16)
        assert reported["thoughts"] == {
            "number": number, "flops_of_one": expected.flops_of_one, "flops": expected.flops
        }  # fmt: skip
    out = output_of(capsys, "flops", "laptop", "--vocab_size", 4096, "--thoughts", 1)
    assert "1 thought and 2 markers add" in out
    assert "thought" not in output_of(capsys, "flops", "laptop", "--vocab_size", 4096)


def test_recipe_without_a_tokenizer_uses_its_vocab_size(folder, tmp_path, capsys):
    note = "the recipe names no tokenizer, so its data.vocab_size counts; see --vocab_size"
    out = output_of(capsys, "flops", "calm_m")
    assert "4,096 token ids" in out and note in out.splitlines()
    (tmp_path / "named.yaml").write_text(f"data: {{tokenizer: '{folder}'}}")
    for arguments in (["calm_m", "--vocab_size", 128256], [tmp_path / "named.yaml"], [folder]):
        assert "names no tokenizer" not in output_of(capsys, "flops", *arguments)


@pytest.mark.parametrize("number", ["-1", "10001", "1.5", "many"])
def test_number_out_of_range_is_refused_before_opening_a_model(number, capsys):
    for command, option in (("generate", "num_thoughts"), ("chat", "num_thoughts"), ("flops", "thoughts")):
        assert option in failure(capsys, command, "no/such/model", f"--{option}={number}")
