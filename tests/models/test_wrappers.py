"""What users of transformers and peft do with a model works, or is refused with one sentence."""

import copy
import pickle

import peft
import pytest
import torch
from tiny import HEADS, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

TOKENS = torch.randint(3, 40, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("head_type", HEADS)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_low_rank_adapters_of_peft(head_type, targets, tmp_path):
    model = tiny_model(head_config={"head_type": head_type})
    base = copy.deepcopy(model)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=2)
    adapted = peft.get_peft_model(model, config).train()
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = [name for name, weight in adapted.named_parameters() if weight.grad is not None]
    assert trained and all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    adapted.eval()
    prompt, settings = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 12, "seed": 1, "temperature": 1.0}
    text = adapted.generate(input_ids=prompt, **settings)
    assert text.shape[1] > 3
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert (loaded.generate(input_ids=prompt, **settings) == text).all()
    states = adapted(input_ids=TOKENS).last_hidden_state
    merged = loaded.merge_and_unload()(input_ids=TOKENS).last_hidden_state
    torch.testing.assert_close(merged, states, rtol=1e-4, atol=1e-4)


def test_unsupported_inputs_and_adapters_are_refused():
    """Prompt tuning would replace tokens by vectors."""
    with pytest.raises(
        ValueError, match="a CALM does not accept inputs_embeds, because it reads whole chunks"
    ):
        tiny_model()(None, inputs_embeds=torch.zeros(1, 8, 32))
    sizes = {"num_virtual_tokens": 4, "token_dim": 32, "num_layers": 2, "num_attention_heads": 4}
    for kind in (peft.PromptTuningConfig, peft.PromptEncoderConfig, peft.PrefixTuningConfig):
        with pytest.raises(
            ValueError, match="Prompt and prefix tuning therefore do not work, but low-rank adapters do"
        ):
            peft.get_peft_model(tiny_model(), kind(task_type="CAUSAL_LM", **sizes))
    with pytest.raises(ValueError, match=r"forward\(\) does not support the argument\(s\): color"):
        tiny_model()(TOKENS, color="red")


def test_vocabulary_cannot_be_resized():
    model = tiny_model()
    for size in (None, 40):
        assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    assert model.resize_token_embeddings(40, pad_to_multiple_of=8) is model.get_input_embeddings()
    for arguments in ((50,), (30,), (40, 64)):
        with pytest.raises(ValueError, match="the vocabulary cannot be resized from 40 to"):
            model.resize_token_embeddings(*arguments)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == 40
    assert model.get_output_embeddings() is None
    model.tie_weights()


def test_copies_shards_and_dtypes(tmp_path):
    model = tiny_model()
    states = model(TOKENS).last_hidden_state
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (other(TOKENS).last_hidden_state == states).all()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert (loaded(TOKENS).last_hidden_state == states).all()
    for dtype in (torch.bfloat16, torch.float16):
        narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        with torch.inference_mode():
            assert narrow.generate(TOKENS[:, :8], max_new_tokens=8, seed=0).dtype == torch.long
    assert model.num_parameters() > 1000 and "CalmForCausalLM" in repr(model)
    assert '"model_type": "calm"' in model.config.to_json_string() and model.config.to_diff_dict()


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "chunk_size"])
def test_sizes_cannot_be_changed_while_loading(name, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for kind in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=f"{name} is set in"):
            kind.from_pretrained(tmp_path, **{name: 96})


def test_transformers_trainer_trains_the_model(tmp_path):
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    before = model.backbone.norm.weight.detach().clone()
    rows = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(2, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.1,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert not torch.equal(model.backbone.norm.weight, before)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    ],
    ids=lambda config: str(config.peft_type),
)
def test_other_adapters_of_peft(config):
    adapted = peft.get_peft_model(tiny_model(), config).train()
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in trained)
    assert adapted.eval().generate(input_ids=TOKENS, max_new_tokens=4, seed=1).shape[1] > 16


@pytest.mark.parametrize("accumulation", [1, 2])
def test_transformers_trainer_logs_the_loss_of_the_model(tmp_path, accumulation):
    """It would divide a loss that takes `num_items_in_batch` by the number of tokens, K times too many."""
    model = tiny_model(head_config={"head_type": "sequential"})
    ids = torch.randint(3, 40, (4, 16), generator=torch.Generator().manual_seed(2))
    expected = model(ids, labels=ids).loss.item()
    settings = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, learning_rate=0.0, logging_steps=1, report_to="none",
        disable_tqdm=True, **settings,
    )  # fmt: skip
    blocks = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=arguments, train_dataset=blocks)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-3)
