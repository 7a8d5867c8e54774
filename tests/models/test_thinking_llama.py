"""A Llama with thoughts: which arguments of transformers' `generate` and `forward` work, and how."""

import peft
import pytest
import torch
import transformers
from tiny import tiny_llama
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from torch.testing import assert_close

from calm.models.caches import CACHE
from calm.models.thoughts import (
    THOUGHT,
    Thoughts,
)
from calm.models.tokens import LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("norms_in_double_precision")
# Two rows that think at different positions, the second less often and after padding.
IS_THOUGHT = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]]).bool()
MASK = torch.tensor([[1] * 8, [0, 1, 1, 1, 1, 1, 1, 1]])
POSITIONS = (MASK.cumsum(-1) - 1).clamp_min(0)


def thinker() -> LlamaForCausalLM:
    """A Llama whose texts vary, and depend on its thoughts."""
    model = tiny_llama()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight *= 15
    model.config.thoughts = Thoughts(3, 1, 2, scale=1.0).as_dict()
    model.generation_config.update(eos_token_id=39, do_sample=False)
    return model


def generate_uncached(model, ids, number, processor=lambda ids, logits: logits):
    """Generate greedily, and read the whole text again for every token."""
    row = torch.cat([ids, torch.tensor([Thoughts(3, 1, 2).tokens(1)])], dim=1)
    for _ in range(number):
        states = model.think(row, row == THOUGHT)
        token = processor(ids, model.lm_head(states[:, -1])).argmax(-1, keepdim=True)
        row, ids = torch.cat([row, token], dim=1), torch.cat([ids, token], dim=1)
    return ids


PROMPT = torch.tensor([[1, 5, 7, 9, 11]])


@torch.no_grad()
def test_text_depends_on_thoughts_and_equals_that_of_uncached_passes():
    model = thinker()
    text = generate_uncached(model, PROMPT, 8)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8), text)
    assert not torch.equal(model.generate(PROMPT, max_new_tokens=8, num_thoughts=0), text)


class OwnCache(transformers.cache_utils.DynamicCache):
    """A cache that the caller has made."""


REFUSED = {
    "past_key_values": OwnCache(),
    "cache": OwnCache(),
    "cache_implementation": "static",
    "prefill_chunk_size": 2,
    "assistant_model": tiny_llama(),
    "prompt_lookup_num_tokens": 2,
    "custom_generate": "somewhere/else",
    "position_ids": torch.arange(5)[None],
    "inputs_embeds": torch.zeros(1, 5, 16),
    "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[5], [5, 6]],
    "sequence_bias": [[[5, 6], 2.0]],
    "guidance_scale": 2.0,
    "forced_bos_token_id": 5,
    "token_healing": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_work_with_thoughts_are_refused(name):
    """As keywords, in a configuration, and in the model's own configuration."""
    message = f"{name} is not supported: .*; leave it out, or set num_thoughts=0"
    with pytest.raises(ValueError, match=message):
        thinker().generate(PROMPT, max_new_tokens=2, **{name: REFUSED[name]})
    if name in vars(transformers.GenerationConfig()):
        config = transformers.GenerationConfig(**{name: REFUSED[name]})
        with pytest.raises(ValueError, match=message):
            thinker().generate(PROMPT, config)
        model = thinker()
        model.generation_config.update(**{name: REFUSED[name]})
        with pytest.raises(ValueError, match=message):
            model.generate(PROMPT, max_new_tokens=2)


@pytest.mark.parametrize("number", [0, -1])
def test_num_return_sequences_below_one_are_refused(number):
    with pytest.raises(ValueError, match=f"num_return_sequences must be .* at least 1, got {number}"):
        thinker().generate(PROMPT, max_new_tokens=2, num_return_sequences=number)


def test_positional_arguments_are_refused_too():
    with pytest.raises(ValueError, match="assistant_model is not supported"):
        thinker().generate(PROMPT, None, None, None, None, None, tiny_llama(), max_new_tokens=2)


def test_arguments_without_effect_are_accepted():
    model = thinker()
    neutral = {"repetition_penalty": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0, "past_key_values": None}
    text = model.generate(PROMPT, max_new_tokens=8)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8, bad_words_ids=[[37]], **neutral), text)


@torch.no_grad()
def test_turning_the_cache_off_changes_nothing():
    ids = torch.randint(3, 38, (1, 6), generator=torch.Generator().manual_seed(0))
    text = generate_uncached(thinker(), ids, 10)
    assert torch.equal(thinker().generate(ids, max_new_tokens=10, use_cache=False), text)
    config = transformers.GenerationConfig(max_new_tokens=10, use_cache=False)
    assert torch.equal(thinker().generate(ids, config), text)
    model = thinker()
    model.generation_config.use_cache = False
    assert torch.equal(model.generate(ids, max_new_tokens=10), text)


def ends_at_once(model) -> LlamaForCausalLM:
    """A model that ends its text as soon as it may."""

    def end(_, __, logits):
        return torch.full_like(logits, -1.0).index_fill(-1, torch.tensor([39]), 1.0)

    model.lm_head.register_forward_hook(end)
    return model


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("limit", [6, 9, 12])
def test_length_limits_do_not_count_thoughts(number, limit, tmp_path):
    def config(**settings):
        return transformers.GenerationConfig(eos_token_id=39, pad_token_id=0, do_sample=False, **settings)

    def length(model, *arguments, **settings):
        return model.generate(PROMPT, *arguments, num_thoughts=number, **settings).shape[1]

    model = thinker()
    model.generation_config.eos_token_id = None
    assert length(model, max_length=limit) == limit
    assert length(model, config(max_length=limit)) == limit
    assert length(model, config(max_length=limit, max_new_tokens=3)) == 8
    model.generation_config.max_length = limit
    model.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.double)
    assert length(model) == limit
    model = ends_at_once(thinker())
    assert length(model, max_new_tokens=20) == 6
    assert length(model, max_new_tokens=20, min_length=limit) == max(6, limit + 1)
    assert length(model, max_new_tokens=20, min_new_tokens=limit) == 5 + limit + 1
    assert length(model, config(max_new_tokens=20, min_length=limit)) == max(6, limit + 1)
    model.generation_config.min_length = limit
    assert length(model, max_new_tokens=20) == max(6, limit + 1)


def test_limits_that_leave_no_room_for_text_are_refused():
    with pytest.raises(ValueError, match="max_length is 5, but the prompt has 5 tokens; set max_new_tokens"):
        thinker().generate(PROMPT, max_length=5)
    with pytest.raises(ValueError, match="more than the context of 16"):
        tiny_llama(max_position_embeddings=16).generate(PROMPT, max_length=14, num_thoughts=6)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_logits_processors_do_not_see_thoughts(seed):
    ids = torch.randint(3, 38, (1, 6), generator=torch.Generator().manual_seed(seed))
    processor = transformers.RepetitionPenaltyLogitsProcessor(5.0)
    processors = transformers.LogitsProcessorList([processor])
    text = thinker().generate(ids, max_new_tokens=10, logits_processor=processors)
    assert torch.equal(text, generate_uncached(thinker(), ids, 10, processor))


def test_stopping_criteria_and_allowed_tokens_do_not_see_thoughts():
    model, padded = thinker(), torch.tensor([[0, 0, 1, 5, 7], [1, 5, 7, 9, 11]])
    seen, calls = [], []

    def criterion(ids, scores, **_):
        seen.append(ids)
        return torch.full((len(ids),), ids.shape[1] == 8)

    def allowed(row, ids):
        calls.append((row, ids))
        return list(range(40))

    text = model.generate(
        padded, max_new_tokens=9, stopping_criteria=[criterion], prefix_allowed_tokens_fn=allowed
    )
    assert text.shape == (2, 8)
    assert all(torch.equal(ids, text[:, : ids.shape[1]]) for ids in seen) and len(seen) == 3
    assert all(torch.equal(ids, text[row, : len(ids)]) for row, ids in calls) and len(calls) == 6
    criteria = transformers.generation.stopping_criteria
    for builtin, length in (
        (criteria.MaxLengthCriteria(7), 7),
        (criteria.EosTokenCriteria(int(text[1, 5])), 6),
    ):
        criteria_list = transformers.StoppingCriteriaList([builtin])
        assert model.generate(PROMPT, max_new_tokens=9, stopping_criteria=criteria_list).shape[1] == length


def test_stop_strings_are_not_matched_against_markers():
    """A stop string may begin in the prompt; markers are no part of the text."""
    # A character for each token, and the string that transformers tokenizes to look for a prefix.
    vocabulary = [*(chr(ord("A") + index) for index in range(39)), "abcdef"]
    word_level = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="A"))
    word_level.decoder = Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=word_level)
    model = thinker()
    text = model.generate(PROMPT, max_new_tokens=8)
    stop, with_marker = (
        "".join(vocabulary[token] for token in tokens) for tokens in (text[0, 4:6], (2, text[0, 5]))
    )
    config = transformers.GenerationConfig(max_new_tokens=8, stop_strings=[stop])
    assert model.generate(PROMPT, max_new_tokens=8, stop_strings=stop, tokenizer=tokenizer).shape[1] == 6
    assert model.generate(PROMPT, config, tokenizer=tokenizer).shape[1] == 6
    not_stopped = model.generate(PROMPT, max_new_tokens=8, stop_strings=with_marker, tokenizer=tokenizer)
    assert torch.equal(not_stopped, text)
    model.generation_config.stop_strings = [stop]
    assert model.generate(PROMPT, config, tokenizer=tokenizer).shape[1] == 6
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(PROMPT, max_new_tokens=8)


def test_padding_is_recognized_without_a_mask():
    model = thinker()
    alone = model.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=8)[:, 3:]
    padded = torch.tensor([[0, 0, 1, 5, 7]])
    assert torch.equal(model.generate(padded, max_new_tokens=8)[:, 5:], alone)
    # If padding is also an EOS token, it counts as text, as in transformers.
    text = model.generate(padded, max_new_tokens=8, eos_token_id=[39, 0])
    unmasked = model.generate(padded, attention_mask=torch.ones_like(padded), max_new_tokens=8)
    assert torch.equal(text[:, :9], unmasked[:, :9]) and not torch.equal(unmasked[:, 5:], alone)


def test_logits_of_a_row_do_not_depend_on_the_other_rows():
    """Rows are padded in front, and between tokens."""
    rows = torch.tensor([[1, 5, 7, 9, 11], [0, 0, 1, 5, 7], [1, 0, 30, 0, 8]])
    model, settings = thinker(), {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    model.generation_config.eos_token_id = None
    together = model.generate(rows, attention_mask=(rows > 0).long(), **settings)
    for index, row in enumerate(rows):
        alone = model.generate(row[row > 0].unsqueeze(0), **settings)
        for logits, expected in zip(together.logits, alone.logits, strict=True):
            assert_close(logits[index], expected[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 5, -1]], None, "between 0 and 39, got -1 to 5; is this the model's own tokenizer"),
        ([[1, 40]], None, "between 0 and 39, got 1 to 40"),
        ([1, 5], None, "must have a non-empty shape .batch, tokens."),
        ([[1, 5]], [[1]], "attention_mask has shape .1, 1., input_ids .1, 2."),
        ([[1, 5], [0, 0]], None, "a prompt is empty"),
    ],
)
def test_invalid_prompts_are_refused(ids, mask, message):
    mask = None if mask is None else torch.tensor(mask)
    with pytest.raises(ValueError, match=message):
        thinker().generate(torch.tensor(ids), attention_mask=mask, max_new_tokens=2)


# Forward passes with thoughts.

ROW = torch.full((2, 8), 5)


def test_forward_returns_its_cache_on_request():
    model = tiny_llama()
    cache = model(ROW, is_thought=IS_THOUGHT, use_cache=True)[CACHE]
    assert cache.get_seq_length() == 8
    next_logits = model(ROW[:, :1], **{CACHE: cache}).logits[:, -1]
    longer = torch.nn.functional.pad(IS_THOUGHT, (0, 1))
    assert_close(next_logits, model(torch.full((2, 9), 5), is_thought=longer).logits[:, -1])
    assert model(ROW, is_thought=IS_THOUGHT, use_cache=False).get(CACHE) is None
    assert model(ROW, is_thought=IS_THOUGHT)[CACHE].get_seq_length() == 8  # The configuration's default.
    assert model.train()(ROW, labels=ROW, is_thought=IS_THOUGHT).get(CACHE) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"return_dict": False},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"logits_to_keep": 1},
        {"logits_to_keep": torch.arange(2)},
        {"shift_labels": ROW},
        {"inputs_embeds": torch.zeros(2, 8, 16)},
        {"inputs_embeds": torch.zeros(2, 8, 16), "input_ids": None},
        {"color": "red"},
    ],
)
def test_unsupported_arguments_of_forward_are_refused(arguments):
    [name, *_] = arguments
    with pytest.raises(ValueError, match=rf"{name}.*[.]$"):
        tiny_llama()(**{"input_ids": ROW, "is_thought": IS_THOUGHT} | arguments)


def test_neutral_arguments_of_forward_are_accepted():
    neutral = {
        "output_hidden_states": None,
        "output_attentions": False,
        "logits_to_keep": 0,
        "return_dict": True,
    }
    model = tiny_llama()
    expected = model(ROW, is_thought=IS_THOUGHT).logits
    assert torch.equal(model(ROW, is_thought=IS_THOUGHT, inputs_embeds=None, **neutral).logits, expected)


def test_rows_with_thoughts_hold_one_document():
    model, packed = tiny_llama(), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]] * 2)
    with pytest.raises(ValueError, match="rows with thoughts must hold one document each"):
        model(ROW, position_ids=packed, is_thought=IS_THOUGHT)
    model(ROW, position_ids=torch.arange(8)[None], is_thought=IS_THOUGHT)
    model(ROW, position_ids=POSITIONS, attention_mask=MASK, is_thought=IS_THOUGHT)
    # Without thoughts this is an ordinary pass, in which documents do not see each other.
    no_thoughts = torch.zeros_like(IS_THOUGHT)
    separate = {"position_ids": packed, "use_cache": False}
    outputs = model(ROW, is_thought=no_thoughts, output_hidden_states=True, **separate)
    assert torch.equal(outputs.logits, model(ROW, **separate).logits) and len(outputs.hidden_states) == 3
    assert_close(outputs.logits[:, 5:], model(ROW[:, 5:]).logits)


def test_adapter_of_the_output_layer_is_part_of_the_loss():
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama(), config)
    ids = torch.arange(16).view(2, 8)
    for is_thought in (IS_THOUGHT, None):
        logits = model.eval()(input_ids=ids, is_thought=is_thought).logits
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for mode in (model.train(), model.eval()):
            model.zero_grad()
            loss = mode(input_ids=ids, labels=ids, is_thought=is_thought).loss
            assert_close(float(loss.detach()), float(expected.detach()), rtol=1e-5, atol=0)
            loss.backward()
            adapters = [weight.grad for name, weight in model.named_parameters() if "lora_" in name]
            assert len(adapters) == 2 and all((gradient != 0).any() for gradient in adapters)
