"""`calm compile`: what it prints, and what it refuses."""

import json

import pytest
import torch
from tiny import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from calm import compiling
from calm.cli import main
from calm.compiling import compile_model
from calm.errors import InputError


def test_speeds_are_measured_with_and_without_compiled_steps(monkeypatch, tmp_path):
    monkeypatch.setenv("CALM_CACHE", str(tmp_path))
    model, calls = tiny_model(), []
    monkeypatch.setattr(compiling, "compile_steps", lambda *arguments: calls.append(arguments[1:3]))
    folder, [single, batch] = compile_model(model, [1, 8], [1.0])
    assert calls == [([1, 8], [1.0])] and folder.is_relative_to(tmp_path)
    assert (single.rows, batch.rows) == (1, 8)
    assert min(single.eager, single.compiled, batch.eager, batch.compiled) > 0


@pytest.mark.parametrize(
    ("temperature", "message"),
    [(0.5, "does not take a temperature"), (2.0, "does not take a temperature")],
)
def test_head_without_temperature_is_compiled_only_at_1(temperature, message):
    with pytest.raises(InputError, match=message):
        compile_model(tiny_model(), [1], [temperature])


def test_token_level_model_is_refused():
    config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=20)
    with pytest.raises(InputError, match="only a CALM's steps can be compiled, not those of a llama model"):
        compile_model(LlamaForCausalLM(config))


def test_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler, but none was found \(no-such-compiler\)"):
        compile_model(tiny_model())


def test_command_prints_speeds_and_the_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CALM_CACHE", str(tmp_path))
    monkeypatch.setattr(compiling, "compile_steps", lambda *arguments: arguments[3]("advance-one"))
    main(["compile", "stories", "--rows", "one"])
    printed = capsys.readouterr()
    assert "1 text at once:" in printed.out and f"saved in {tmp_path}" in printed.out
    main(["compile", "stories", "--rows", "one", "--json"])
    [figures] = json.loads(capsys.readouterr().out)["tokens_per_second"]
    assert figures["rows"] == 1 and figures["compiled"] > 0
    with pytest.raises(SystemExit) as raised:
        main(["compile", "stories", "--temperature", "3"])
    assert raised.value.code == 2 and "temperatures from 0 to 1, got 3" in capsys.readouterr().err
    assert torch.get_num_threads() == 1
