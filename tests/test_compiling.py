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


def test_speeds_are_of_texts_with_and_without(monkeypatch, tmp_path):
    monkeypatch.setenv("CALM_CACHE", str(tmp_path))
    model, asked = tiny_model(), []
    monkeypatch.setattr(compiling, "compile_steps", lambda *own: asked.append(own[1:3]))
    folder, [one, many] = compile_model(model, [1, 8], [1.0])
    assert asked == [([1, 8], [1.0])] and folder.is_relative_to(tmp_path)
    assert (one.rows, many.rows) == (1, 8)
    assert min(one.eager, one.compiled, many.eager, many.compiled) > 0


@pytest.mark.parametrize(
    ("temperature", "message"),
    [(0.5, "does not take a temperature"), (2.0, "does not take a temperature")],
)
def test_a_head_without_temperatures_is_compiled_at_1(temperature, message):
    with pytest.raises(InputError, match=message):
        compile_model(tiny_model(), [1], [temperature])


def test_models_of_tokens_are_refused():
    config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=20)
    with pytest.raises(InputError, match="only a CALM's steps can be compiled, not those of a llama model"):
        compile_model(LlamaForCausalLM(config))


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler, but none was found \(no-such-compiler\)"):
        compile_model(tiny_model())


def test_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CALM_CACHE", str(tmp_path))
    monkeypatch.setattr(compiling, "compile_steps", lambda *own: own[3]("advance-one"))
    main(["compile", "stories", "--rows", "one"])
    printed = capsys.readouterr()
    assert "1 text at once:" in printed.out and f"saved in {tmp_path}" in printed.out
    main(["compile", "stories", "--rows", "one", "--json"])
    [figures] = json.loads(capsys.readouterr().out)["tokens_per_second"]
    assert figures["rows"] == 1 and figures["compiled"] > 0
    with pytest.raises(SystemExit) as ended:
        main(["compile", "stories", "--temperature", "3"])
    assert ended.value.code == 2 and "temperatures from 0 to 1, got 3" in capsys.readouterr().err
    assert torch.get_num_threads() == 1
