"""Drafting inside transformers' `generate`: processors, stopping criteria, lengths, seeds, refusals."""

import numpy as np
import pytest
import torch
from drafts import deciding_model, drafting_model, some_prompts
from recorders import RecordingStreamer
from tiny import thinking_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    StoppingCriteriaList,
)

from calm.models.drafting.batching import DraftedBatch, TokenSampler
from calm.models.drafting.generate import DraftedOutput, Drafting, generate_drafted
from calm.models.language_model import language_model
from calm.models.thoughts import Thoughts
from calm.models.uptraining import Cut, calm_from_transformer

pytestmark = pytest.mark.usefixtures("norms_in_double_precision")
# Arguments of `generate` that change a greedy text.
GREEDY_ARGUMENTS = [
    {},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 9, "eos_token_id": 12},
    {"bad_words_ids": [[5], [12, 36]]},
    {"suppress_tokens": [9, 12]},
    {"max_new_tokens": 1},
    {"max_length": 9},
    {"eos_token_id": [9, 12]},
]


class StubTokenizer:
    """The part of a tokenizer that `calm_from_transformer` uses."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __len__(self):
        return 40


@pytest.mark.parametrize("arguments", GREEDY_ARGUMENTS, ids=str)
def test_greedy_text_is_the_same_with_and_without_a_draft(arguments):
    model, draft = deciding_model(), drafting_model()
    arguments = (
        {"do_sample": False} | ({} if "max_length" in arguments else {"max_new_tokens": 20}) | arguments
    )
    for prompt_1T in some_prompts([1, 6]):
        undrafted = model.generate(prompt_1T, **arguments)
        for num_chunks in (1, 3):
            drafted = model.generate(prompt_1T, custom_generate=Drafting(draft, num_chunks), **arguments)
            assert drafted.tolist() == undrafted.tolist()


def test_plain_transformers_model_takes_a_draft():
    plain = LlamaForCausalLM(deciding_model().config).double().eval()
    plain.load_state_dict(deciding_model().state_dict())
    [prompt_1T] = some_prompts([6])
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    drafted = plain.generate(prompt_1T, custom_generate=Drafting(drafting_model()), **settings)
    assert drafted.tolist() == plain.generate(prompt_1T, **settings).tolist()


def test_stopping_criteria_are_checked_after_every_token():
    model, [prompt_1T], lengths = deciding_model(), some_prompts([6]), []

    def at_length_17(ids_1T, scores, **_):
        lengths.append(ids_1T.shape[1])
        return torch.tensor([ids_1T.shape[1] >= 17])

    drafted = model.generate(
        prompt_1T,
        custom_generate=Drafting(drafting_model(), num_chunks=3),
        stopping_criteria=StoppingCriteriaList([at_length_17]),
        max_new_tokens=50,
        do_sample=False,
    )
    assert drafted.shape == (1, 17) and lengths == list(range(7, 18))


def test_sampled_text_depends_only_on_the_seed():
    model, draft, [prompt_1T] = deciding_model(), drafting_model(), some_prompts([6])
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(
            model.generate(prompt_1T, custom_generate=Drafting(draft), max_new_tokens=20, do_sample=True)
        )
    assert texts[0].tolist() == texts[1].tolist() != texts[2].tolist()


def test_output_reports_rounds_and_accepted_tokens():
    model, [prompt_1T] = deciding_model(), some_prompts([6])
    output = model.generate(
        prompt_1T,
        custom_generate=Drafting(drafting_model()),
        max_new_tokens=20,
        do_sample=True,
        return_dict_in_generate=True,
    )
    assert isinstance(output, DraftedOutput)
    assert output.sequences.shape[1] <= 26 <= 6 + output.num_rounds + output.num_accepted
    assert 0 < output.num_accepted < output.num_drafted


def test_a_streamer_gets_the_prompt_and_every_token():
    model, [prompt_1T], streamer = deciding_model(), some_prompts([6]), RecordingStreamer()
    drafting = Drafting(drafting_model(), num_chunks=3, streamer=streamer)
    written = model.generate(prompt_1T, custom_generate=drafting, max_new_tokens=13, do_sample=True)
    assert streamer.tokens == written[0].tolist() and streamer.has_ended


@pytest.mark.parametrize("temperature", [0.4, 1.0, None])
def test_draft_with_the_models_own_distributions_is_fully_accepted(temperature, monkeypatch):
    # This needs drafts at the temperature at which the target model is sampled.
    model, [prompt_1T] = deciding_model(max_position_embeddings=256), some_prompts([6])
    identical = calm_from_transformer(model, StubTokenizer(), 1, Cut(0, 0))
    drafting = Drafting(identical, num_chunks=4, lookup=0, generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 100, "return_dict_in_generate": True, "top_k": 0}
    settings |= (
        {"do_sample": False} if temperature is None else {"do_sample": True, "temperature": temperature}
    )
    output = model.generate(prompt_1T, custom_generate=drafting, **settings)
    assert output.num_accepted == output.num_drafted > 60
    if temperature is not None:
        monkeypatch.setattr(Drafting, "lookup", 0)
        batch, agreements = DraftedBatch(model, identical, 4), []
        row = batch.join(prompt_1T[0].tolist(), TokenSampler(temperature=temperature), 100, seed=1)
        while not row.has_ended:
            agreements += [written.agreement for written in batch.step()]
        assert set(agreements) == {1.0} and len(agreements) < 40


def test_batch_matches_prompts_generated_one_by_one():
    model, draft = deciding_model(), drafting_model()
    model.generation_config.pad_token_id = 0
    prompts = some_prompts([6, 6])
    settings = {"max_new_tokens": 9, "do_sample": False}
    together = generate_drafted(
        model, Drafting(draft), torch.cat(prompts), num_return_sequences=2, **settings
    )
    undrafted = [model.generate(prompt, **settings)[0].tolist() for prompt in prompts for _ in range(2)]
    assert together.tolist() == undrafted


def test_seed_must_be_an_integer_and_excludes_a_generator():
    model, [prompt_1T] = deciding_model(), some_prompts([6])
    drafting, settings = Drafting(drafting_model()), {"max_new_tokens": 9, "do_sample": True}
    first = generate_drafted(model, drafting, prompt_1T, seed=1, **settings)
    for seed in (np.int64(1), torch.tensor(1)):
        assert torch.equal(generate_drafted(model, drafting, prompt_1T, seed=seed, **settings), first)
    for seed in (True, 1.0, "1"):
        with pytest.raises(ValueError, match="a seed must be a whole number"):
            generate_drafted(model, drafting, prompt_1T, seed=seed, **settings)
    with_generator = Drafting(drafting.draft, generator=torch.Generator())
    with pytest.raises(ValueError, match="give either a seed or a generator, not both"):
        generate_drafted(model, with_generator, prompt_1T, seed=1, **settings)


def test_token_level_models_accept_the_same_seeds():
    view, [prompt_1T] = language_model(deciding_model()), some_prompts([6])
    settings = {"max_new_tokens": 9, "temperature": 1.0}
    first = view.generate(prompt_1T, seed=1, **settings)
    assert torch.equal(view.generate(prompt_1T, seed=np.int64(1), **settings), first)
    for seed, message in ((1.0, "a seed must be a whole number"), (2**63, "seed must be at least")):
        with pytest.raises(ValueError, match=message):
            view.generate(prompt_1T, seed=seed, **settings)


def test_texts_that_end_early_are_padded():
    model, draft = deciding_model(), drafting_model()
    prompts = some_prompts([6, 6])
    first, second = (
        model.generate(prompt_1T, max_new_tokens=9, do_sample=False)[0, 6:].tolist() for prompt_1T in prompts
    )
    end_token = next(token for token in first if token not in second)
    model.generation_config.pad_token_id = 0
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": end_token}
    together = generate_drafted(model, Drafting(draft), torch.cat(prompts), **settings)
    up_to_end = first[: first.index(end_token) + 1]
    assert together[0, 6:].tolist() == up_to_end + [0] * (9 - len(up_to_end)) and len(up_to_end) < 9
    assert together[1, 6:].tolist() == second


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_language_model_view_takes_a_draft(temperature):
    model, [prompt_1T], streamer = deciding_model(), some_prompts([6]), RecordingStreamer()
    view, draft = language_model(model), drafting_model()
    settings = {"temperature": temperature, "seed": 3, "max_new_tokens": 12}
    texts = [
        view.generate(prompt_1T, draft=draft, draft_chunks=2, streamer=streamer, **settings) for _ in range(2)
    ]
    assert texts[0].tolist() == texts[1].tolist() and texts[0].shape == (1, 18)
    assert streamer.tokens == texts[0][0].tolist() * 2
    if temperature == 0:
        assert texts[0].tolist() == view.generate(prompt_1T, **settings).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "num_beams=2 is not supported with a draft"),
        ({"cache_implementation": "static"}, "cache_implementation='static' is not supported with a draft"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0"),
        ({"num_return_sequences": 2, "do_sample": True}, "generation takes one prompt at a time; got 2"),
    ],
)
def test_arguments_incompatible_with_a_draft_are_refused(arguments, message):
    model, [prompt_1T] = deciding_model(), some_prompts([6])
    with pytest.raises(ValueError, match=message):
        model.generate(prompt_1T, custom_generate=Drafting(drafting_model()), max_new_tokens=4, **arguments)


def test_token_type_ids_are_refused():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model, [prompt_1T] = GPT2LMHeadModel(GPT2Config(vocab_size=40, **sizes)).double(), some_prompts([6])
    with pytest.raises(ValueError, match="token_type_ids is not supported with a draft"):
        model.generate(
            prompt_1T, custom_generate=Drafting(drafting_model()), token_type_ids=torch.ones_like(prompt_1T)
        )


def test_empty_prompt_is_refused():
    model, [prompt_1T] = deciding_model(), some_prompts([6])
    for ids_1T in (prompt_1T, prompt_1T[:, :0]):
        with pytest.raises(ValueError, match="at least one token"):
            model.generate(
                ids_1T,
                attention_mask=torch.zeros_like(ids_1T),
                custom_generate=Drafting(drafting_model()),
                max_new_tokens=4,
            )


def test_model_configured_without_a_cache_takes_a_draft():
    model, [prompt_1T] = deciding_model(), some_prompts([6])
    model.config.use_cache = model.generation_config.use_cache = False
    settings = {"temperature": 0.0, "seed": 1, "max_new_tokens": 9}
    drafted = language_model(model).generate(prompt_1T, draft=drafting_model(), **settings)
    assert drafted.tolist() == language_model(model).generate(prompt_1T, **settings).tolist()


def test_position_ids_match_those_of_generate():
    # RoBERTa's own defaults would start after the id of its padding token, 1.
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=40, is_decoder=True, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    model, [prompt_1T] = RobertaForCausalLM(config).double().eval(), some_prompts([6])
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    drafted = model.generate(prompt_1T, custom_generate=Drafting(drafting_model()), **settings)
    assert drafted.tolist() == model.generate(prompt_1T, **settings).tolist()


def test_tiny_temperature_means_greedy_decoding():
    view, [prompt_1T], draft = language_model(deciding_model()), some_prompts([6]), drafting_model()
    settings = {"seed": 1, "max_new_tokens": 9}
    greedy = view.generate(prompt_1T, temperature=0.0, **settings).tolist()
    assert view.generate(prompt_1T, temperature=1e-250, **settings).tolist() == greedy
    assert view.generate(prompt_1T, temperature=1e-250, draft=draft, **settings).tolist() == greedy


def test_invalid_drafts_are_refused():
    model, draft, [prompt_1T] = deciding_model(), drafting_model(), some_prompts([6])
    with pytest.raises(ValueError, match="the draft must be a CALM, not a LlamaForCausalLM"):
        Drafting(model)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 16"):
        Drafting(draft, num_chunks=0)
    with pytest.raises(ValueError, match="a CALM already generates whole chunks"):
        language_model(draft).generate(prompt_1T, temperature=1.0, seed=1, draft=draft)
    with pytest.raises(ValueError, match="draft_chunks requires a draft: give one as well"):
        language_model(model).generate(prompt_1T, temperature=1.0, seed=1, draft_chunks=2)


def test_thinking_target_model_takes_a_draft_only_without_thoughts():
    model, [prompt_1T] = deciding_model(), some_prompts([6])
    model.config.thoughts = Thoughts(2, 1, 2, scale=1.0).as_dict()
    settings = {"temperature": 1.0, "seed": 1, "max_new_tokens": 4, "draft": drafting_model()}
    with pytest.raises(ValueError, match="a draft is not supported with thoughts"):
        language_model(model).generate(prompt_1T, **settings)
    assert language_model(model).generate(prompt_1T, num_thoughts=0, **settings).shape == (1, 10)


def test_thinking_draft_model_drafts_without_thoughts():
    model, [prompt_1T] = deciding_model(), some_prompts([6])
    settings = {"max_new_tokens": 12, "do_sample": False}
    drafted = model.generate(prompt_1T, custom_generate=Drafting(thinking_model()), **settings)
    assert drafted.tolist() == model.generate(prompt_1T, **settings).tolist()


def test_generation_goes_on_once_the_drafts_context_is_full():
    model = deciding_model(max_position_embeddings=512)
    draft = drafting_model(backbone_config={"max_position_embeddings": 4})  # 16 tokens.
    [prompt_1T] = some_prompts([6])
    settings = {"max_new_tokens": 40, "do_sample": False}
    output = model.generate(
        prompt_1T, custom_generate=Drafting(draft, lookup=0), return_dict_in_generate=True, **settings
    )
    assert output.sequences.tolist() == model.generate(prompt_1T, **settings).tolist()
    assert 0 < output.num_drafted <= 4 * 11
