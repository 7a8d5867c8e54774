"""Commands on token-level models: the baseline, and models such as GPT-2."""

import json

import pytest
import torch
from toy import failure
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from calm.cli import main


def test_the_baseline_is_a_plain_llama_with_its_tokenizer(baseline, root):
    model = AutoModelForCausalLM.from_pretrained(baseline)
    assert type(model) is LlamaForCausalLM and model.config.use_cache
    assert AutoTokenizer.from_pretrained(baseline).eos_token_id == model.config.eos_token_id
    history = json.loads((root / "baseline/history.json").read_text())
    assert list(history) == ["language_model"]
    assert any(
        "eval_cross_entropy" in entry and "eval_brier_4" in entry for entry in history["language_model"]
    )


@pytest.mark.parametrize("estimator", ["best", "draws"])
def test_evaluate_prints_the_perplexity_of_a_baseline(baseline, root, capsys, estimator):
    main(["evaluate", str(baseline), str(root / "run/data"), "--context", "64", "--ngrams", "2",
          "--estimator", estimator, "--num_draws", "3"])  # fmt: skip
    out = capsys.readouterr().out
    for word in ("perplexity", "2-gram", "autoregressive", "Brier-4", "blocks of 64 tokens", "±"):
        assert word in out
    assert "reconstruction" not in out and "CALM" not in out


def test_evaluate_and_generate_with_gpt2(root, tmp_path, capsys):
    """As published: no padding token, learned positions, no EOS in its configuration."""
    tokenizer = AutoTokenizer.from_pretrained(root / "run/model")
    tokenizer.pad_token = None
    config = GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=None)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    main(["evaluate", str(tmp_path), str(root / "text.jsonl"), "--context", "64", "--max_blocks", "3"])
    assert "perplexity" in capsys.readouterr().out
    main(["generate", str(tmp_path), "Once", "There was a", "--max_new_tokens", "5", "--seed", "0"])
    assert capsys.readouterr().out.startswith("Once")
    longer = ["--context", "128"]
    assert "reads at most 64 tokens" in failure(capsys, "evaluate", tmp_path, root / "text.jsonl", *longer)


def test_a_sliding_window_limits_the_context(root, tmp_path, capsys):
    config = MistralConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=2, sliding_window=64)  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(root / "run/model").save_pretrained(tmp_path)
    arguments = [tmp_path, root / "text.jsonl", "--max_blocks", "2", "--context"]
    main(["evaluate", *map(str, arguments), "64"])
    assert "perplexity" in capsys.readouterr().out
    assert "reads at most 64 tokens" in failure(capsys, "evaluate", *arguments, "128")


def test_models_that_cannot_be_scored_are_refused(root, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(root / "run/model")
    for name, model in {
        "mamba": MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1)),
        "bloom": BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2)),
    }.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        error = failure(capsys, "evaluate", tmp_path / name, root / "text.jsonl", "--context", "64")
        assert f"'{name}' models cannot be scored" in error
    assert "holds an autoencoder" in failure(
        capsys, "evaluate", root / "run/autoencoder", root / "text.jsonl", "--context", "64"
    )


def test_generate_with_a_baseline(baseline, capsys):
    arguments = ["generate", str(baseline), "Once upon a time", "There was", "--max_new_tokens", "8"]
    for options in (["--seed", "1"], ["--temperature", "0"], ["--seed", "1", "--temperature", "1"]):
        main([*arguments, *options])
        first = capsys.readouterr().out
        main([*arguments, *options])
        assert capsys.readouterr().out == first and first.startswith("Once upon a time")
    assert "pool sampler is only for models without" in failure(capsys, *arguments, "--sampler", "pool")
    assert "temperature must lie between 0 and 1" in failure(capsys, *arguments, "--temperature", "7")
