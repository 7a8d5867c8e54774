"""Forward passes over a draft and their rollback, against reading each path of the draft alone."""

import pytest
import torch
from drafts import deciding_model, drafting_model, some_prompts
from torch.testing import assert_close
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from calm.core.branches import TEXT, Branches
from calm.models.drafting.generate import Drafting
from calm.models.drafting.passes import TextPasses, check_model, takes_branches

pytestmark = pytest.mark.usefixtures("norms_in_double_precision")
BRANCHES = Branches([5, 6, 9, 7, 8, 11], [TEXT, 0, TEXT, 0, 2, 4])
ACCEPTED = [2, 4, 5]
TEXT_BEFORE = [1, 12, 30, 7, 12]
# Eager attention computes its softmax in single precision.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def tiny_opt():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OPTConfig(
        vocab_size=40, max_position_embeddings=128, word_embed_proj_dim=16, init_std=0.5, **sizes
    )
    return OPTForCausalLM(config).double().eval()


@torch.no_grad()
def read_alone(model, tokens):
    """The logits after a text that is read at once, and its keys and values."""
    output = model(torch.tensor([tokens]), use_cache=True)
    return output.logits[0, -1], [(layer.keys, layer.values) for layer in output.past_key_values.layers]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make_model", [deciding_model, tiny_opt])
@pytest.mark.parametrize("num_read", [0, 3, 4])
@torch.no_grad()
def test_each_path_is_read_as_if_it_were_alone(attention, make_model, num_read):
    model = make_model()
    model.set_attn_implementation(attention)
    passes = TextPasses(model)
    assert passes.takes_branches
    if num_read:
        passes.read(TEXT_BEFORE[:num_read])
    logits_SV = passes.read(TEXT_BEFORE[num_read:], BRANCHES)
    for node in range(TEXT, len(BRANCHES)):
        expected_V, _ = read_alone(model, [*TEXT_BEFORE, *BRANCHES.tokens_to(node)])
        assert_close(logits_SV[node + 1], expected_V, **CLOSE)
    # The text and the accepted path stay in the cache, as if nothing else had been read.
    passes.roll_back(len(BRANCHES), ACCEPTED)
    remaining = [*TEXT_BEFORE, *BRANCHES.tokens_to(ACCEPTED[-1])]
    _, expected = read_alone(model, remaining)
    for layer, states in zip(passes._cache.layers, expected, strict=True):
        assert_close((layer.keys, layer.values), states, **CLOSE)
    logits_SV = passes.read([13], Branches.line([14, 15]))
    assert len(passes) == len(remaining) + 3
    assert_close(logits_SV[-1], read_alone(model, [*remaining, 13, 14, 15])[0], **CLOSE)


@torch.no_grad()
def test_single_path_can_be_rolled_back_to_any_length():
    model = deciding_model()
    for num_kept in range(4):
        passes = TextPasses(model)
        passes.read(TEXT_BEFORE, Branches.line([5, 6, 7]))
        passes.roll_back(3, range(num_kept))
        assert len(passes) == len(TEXT_BEFORE) + num_kept
        expected_V, _ = read_alone(model, [*TEXT_BEFORE, *[5, 6, 7][:num_kept], 9])
        assert_close(passes.read([9])[-1], expected_V, **CLOSE)


def test_models_that_cannot_read_trees_get_drafts_of_a_single_path():
    # Local attention and linear biases count positions themselves, and flash attention takes no mask.
    torch.manual_seed(0)
    neo = GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=40,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            window_size=4,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 1]],
        )
    )
    bloom = BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2))
    flash = deciding_model()
    flash.config._attn_implementation = "flash_attention_2"
    assert not any(takes_branches(model) for model in (neo, bloom, flash))
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    [prompt_1T] = some_prompts([6])
    for model in (neo.double().eval(), bloom.double().eval()):
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.data.mul_(20)
        drafted = model.generate(prompt_1T, custom_generate=Drafting(drafting_model()), **settings)
        assert drafted.tolist() == model.generate(prompt_1T, **settings).tolist()


def test_models_without_a_cache_that_can_be_rolled_back_are_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    check_model(
        MistralForCausalLM(MistralConfig(vocab_size=40, num_key_value_heads=2, sliding_window=None, **sizes))
    )
    with pytest.raises(ValueError, match="discards old tokens"):
        check_model(
            MistralForCausalLM(MistralConfig(vocab_size=40, num_key_value_heads=2, sliding_window=8, **sizes))
        )
    with pytest.raises(ValueError, match="has no KV cache"):
        check_model(OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=40, n_embd=16, n_layer=1, n_head=2)))
    encoder_decoder = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    with pytest.raises(ValueError, match="causal language model"):
        check_model(encoder_decoder)
