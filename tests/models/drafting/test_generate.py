"""Drafts behind `generate` of transformers, with its processors, criteria, ends and lengths."""

import numpy as np
import pytest
import torch
from drafts import deciding_model, drafting_model, some_prompts
from tiny import thinking_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from calm.models.drafting.batching import DraftedBatch, TokenSampler
from calm.models.drafting.generate import DraftedOutput, Drafting, generate_drafted
from calm.models.language_model import language_model
from calm.models.thoughts import Thoughts
from calm.models.uptraining import Cut, calm_from_transformer

pytestmark = pytest.mark.usefixtures("norms_in_double_precision")
# What `generate` takes that changes a greedy text.
WAYS = [
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


class SimpleTokens:
    """What a conversion asks of a tokenizer."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __len__(self):
        return 40


class Listener(BaseStreamer):
    def __init__(self):
        self.tokens, self.has_ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.has_ended = True


@pytest.mark.parametrize("arguments", WAYS, ids=str)
def test_greedy_texts_are_those_without_a_draft(arguments):
    model, draft = deciding_model(), drafting_model()
    arguments = (
        {"do_sample": False} | ({} if "max_length" in arguments else {"max_new_tokens": 20}) | arguments
    )
    for prompt_1T in some_prompts([1, 6]):
        alone = model.generate(prompt_1T, **arguments)
        for num_chunks in (1, 3):
            drafted = model.generate(prompt_1T, custom_generate=Drafting(draft, num_chunks), **arguments)
            assert drafted.tolist() == alone.tolist()


def test_any_causal_model_takes_a_draft():
    plain = LlamaForCausalLM(deciding_model().config).double().eval()
    plain.load_state_dict(deciding_model().state_dict())
    [prompt_1T] = some_prompts([6])
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    drafted = plain.generate(prompt_1T, custom_generate=Drafting(drafting_model()), **how)
    assert drafted.tolist() == plain.generate(prompt_1T, **how).tolist()


def test_a_criterion_is_asked_after_every_token():
    model, [prompt_1T], asked = deciding_model(), some_prompts([6]), []

    def at_seventeen(ids_1T, scores, **_):
        asked.append(ids_1T.shape[1])
        return torch.tensor([ids_1T.shape[1] >= 17])

    drafted = model.generate(
        prompt_1T,
        custom_generate=Drafting(drafting_model(), num_chunks=3),
        stopping_criteria=StoppingCriteriaList([at_seventeen]),
        max_new_tokens=50,
        do_sample=False,
    )
    assert drafted.shape == (1, 17) and asked == list(range(7, 18))


def test_draws_depend_on_the_seed_alone():
    model, draft, [prompt_1T] = deciding_model(), drafting_model(), some_prompts([6])
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(
            model.generate(prompt_1T, custom_generate=Drafting(draft), max_new_tokens=20, do_sample=True)
        )
    assert texts[0].tolist() == texts[1].tolist() != texts[2].tolist()


def test_what_a_draft_came_to_is_told():
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
    model, [prompt_1T], listener = deciding_model(), some_prompts([6]), Listener()
    drafting = Drafting(drafting_model(), num_chunks=3, streamer=listener)
    written = model.generate(prompt_1T, custom_generate=drafting, max_new_tokens=13, do_sample=True)
    assert listener.tokens == written[0].tolist() and listener.has_ended


@pytest.mark.parametrize("temperature", [0.4, 1.0, None])
def test_a_draft_with_the_models_own_distributions_is_accepted_whole(temperature, monkeypatch):
    # So it has to be drawn at the temperature that the model is sampled at.
    model, [prompt_1T] = deciding_model(max_position_embeddings=256), some_prompts([6])
    same = calm_from_transformer(model, SimpleTokens(), 1, Cut(0, 0))
    drafting = Drafting(same, num_chunks=4, lookup=0, generator=torch.Generator().manual_seed(1))
    how = {"max_new_tokens": 100, "return_dict_in_generate": True, "top_k": 0}
    how |= {"do_sample": False} if temperature is None else {"do_sample": True, "temperature": temperature}
    output = model.generate(prompt_1T, custom_generate=drafting, **how)
    assert output.num_accepted == output.num_drafted > 60
    if temperature is not None:
        monkeypatch.setattr(Drafting, "lookup", 0)
        batch, shares = DraftedBatch(model, same, 4), []
        row = batch.join(prompt_1T[0].tolist(), TokenSampler(temperature=temperature), 100, seed=1)
        while not row.has_ended:
            shares += [one.agreement for one in batch.step()]
        assert set(shares) == {1.0} and len(shares) < 40


def test_several_prompts_are_written_one_after_the_other():
    model, draft = deciding_model(), drafting_model()
    model.generation_config.pad_token_id = 0
    prompts = some_prompts([6, 6])
    how = {"max_new_tokens": 9, "do_sample": False}
    together = generate_drafted(model, Drafting(draft), torch.cat(prompts), num_return_sequences=2, **how)
    alone = [model.generate(prompt, **how)[0].tolist() for prompt in prompts for _ in range(2)]
    assert together.tolist() == alone


def test_a_seed_is_one_whole_number_and_the_only_source():
    model, [prompt_1T] = deciding_model(), some_prompts([6])
    drafting, how = Drafting(drafting_model()), {"max_new_tokens": 9, "do_sample": True}
    first = generate_drafted(model, drafting, prompt_1T, seed=1, **how)
    for seed in (np.int64(1), torch.tensor(1)):
        assert torch.equal(generate_drafted(model, drafting, prompt_1T, seed=seed, **how), first)
    for seed in (True, 1.0, "1"):
        with pytest.raises(ValueError, match="a seed must be a whole number"):
            generate_drafted(model, drafting, prompt_1T, seed=seed, **how)
    with_generator = Drafting(drafting.draft, generator=torch.Generator())
    with pytest.raises(ValueError, match="give either a seed or a generator, not both"):
        generate_drafted(model, with_generator, prompt_1T, seed=1, **how)


def test_a_model_of_tokens_takes_the_same_seeds():
    view, [prompt_1T] = language_model(deciding_model()), some_prompts([6])
    how = {"max_new_tokens": 9, "temperature": 1.0}
    first = view.generate(prompt_1T, seed=1, **how)
    assert torch.equal(view.generate(prompt_1T, seed=np.int64(1), **how), first)
    for seed, message in ((1.0, "a seed must be a whole number"), (2**63, "seed must be at least")):
        with pytest.raises(ValueError, match=message):
            view.generate(prompt_1T, seed=seed, **how)


def test_texts_that_end_early_are_padded():
    model, draft = deciding_model(), drafting_model()
    prompts = some_prompts([6, 6])
    first, second = (
        model.generate(one, max_new_tokens=9, do_sample=False)[0, 6:].tolist() for one in prompts
    )
    ends = next(token for token in first if token not in second)
    model.generation_config.pad_token_id = 0
    how = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": ends}
    together = generate_drafted(model, Drafting(draft), torch.cat(prompts), **how)
    written = first[: first.index(ends) + 1]
    assert together[0, 6:].tolist() == written + [0] * (9 - len(written)) and len(written) < 9
    assert together[1, 6:].tolist() == second


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_view_of_a_model_of_tokens_takes_a_draft(temperature):
    model, [prompt_1T], listener = deciding_model(), some_prompts([6]), Listener()
    view, draft = language_model(model), drafting_model()
    how = {"temperature": temperature, "seed": 3, "max_new_tokens": 12}
    texts = [
        view.generate(prompt_1T, draft=draft, draft_chunks=2, streamer=listener, **how) for _ in range(2)
    ]
    assert texts[0].tolist() == texts[1].tolist() and texts[0].shape == (1, 18)
    assert listener.tokens == texts[0][0].tolist() * 2
    if temperature == 0:
        assert texts[0].tolist() == view.generate(prompt_1T, **how).tolist()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"num_beams": 2}, "num_beams=2 is not supported with a draft"),
        ({"cache_implementation": "static"}, "cache_implementation='static' is not supported with a draft"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0"),
        ({"num_return_sequences": 2, "do_sample": True}, "generation takes one prompt at a time; got 2"),
    ],
)
def test_what_does_not_go_with_a_draft_is_refused(arguments, why):
    model, [prompt_1T] = deciding_model(), some_prompts([6])
    with pytest.raises(ValueError, match=why):
        model.generate(prompt_1T, custom_generate=Drafting(drafting_model()), max_new_tokens=4, **arguments)


def test_what_a_model_reads_beside_tokens_is_refused():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model, [prompt_1T] = GPT2LMHeadModel(GPT2Config(vocab_size=40, **sizes)).double(), some_prompts([6])
    with pytest.raises(ValueError, match="token_type_ids is not supported with a draft"):
        model.generate(
            prompt_1T, custom_generate=Drafting(drafting_model()), token_type_ids=torch.ones_like(prompt_1T)
        )


def test_a_prompt_without_tokens_is_refused():
    model, [prompt_1T] = deciding_model(), some_prompts([6])
    for ids_1T in (prompt_1T, prompt_1T[:, :0]):
        with pytest.raises(ValueError, match="at least one token"):
            model.generate(
                ids_1T,
                attention_mask=torch.zeros_like(ids_1T),
                custom_generate=Drafting(drafting_model()),
                max_new_tokens=4,
            )


def test_a_model_that_was_saved_without_a_cache_takes_a_draft():
    model, [prompt_1T] = deciding_model(), some_prompts([6])
    model.config.use_cache = model.generation_config.use_cache = False
    how = {"temperature": 0.0, "seed": 1, "max_new_tokens": 9}
    drafted = language_model(model).generate(prompt_1T, draft=drafting_model(), **how)
    assert drafted.tolist() == language_model(model).generate(prompt_1T, **how).tolist()


def test_positions_are_those_that_generate_gives():
    # Its own would begin behind its padding token, 1.
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=40, is_decoder=True, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    model, [prompt_1T] = RobertaForCausalLM(config).double().eval(), some_prompts([6])
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    drafted = model.generate(prompt_1T, custom_generate=Drafting(drafting_model()), **how)
    assert drafted.tolist() == model.generate(prompt_1T, **how).tolist()


def test_a_temperature_of_next_to_nothing_is_none():
    view, [prompt_1T], draft = language_model(deciding_model()), some_prompts([6]), drafting_model()
    how = {"seed": 1, "max_new_tokens": 9}
    greedy = view.generate(prompt_1T, temperature=0.0, **how).tolist()
    assert view.generate(prompt_1T, temperature=1e-250, **how).tolist() == greedy
    assert view.generate(prompt_1T, temperature=1e-250, draft=draft, **how).tolist() == greedy


def test_drafts_that_cannot_be_are_refused():
    model, draft, [prompt_1T] = deciding_model(), drafting_model(), some_prompts([6])
    with pytest.raises(ValueError, match="the draft must be a CALM, not a LlamaForCausalLM"):
        Drafting(model)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 16"):
        Drafting(draft, num_chunks=0)
    with pytest.raises(ValueError, match="a CALM already generates whole chunks"):
        language_model(draft).generate(prompt_1T, temperature=1.0, seed=1, draft=draft)
    with pytest.raises(ValueError, match="draft_chunks requires a draft: give one as well"):
        language_model(model).generate(prompt_1T, temperature=1.0, seed=1, draft_chunks=2)


def test_a_model_that_thinks_takes_a_draft_only_without_thoughts():
    model, [prompt_1T] = deciding_model(), some_prompts([6])
    model.config.thoughts = Thoughts(2, 1, 2, scale=1.0).as_dict()
    how = {"temperature": 1.0, "seed": 1, "max_new_tokens": 4, "draft": drafting_model()}
    with pytest.raises(ValueError, match="a draft is not supported with thoughts"):
        language_model(model).generate(prompt_1T, **how)
    assert language_model(model).generate(prompt_1T, num_thoughts=0, **how).shape == (1, 10)


def test_a_draft_that_can_think_drafts_without_thoughts():
    model, [prompt_1T] = deciding_model(), some_prompts([6])
    how = {"max_new_tokens": 12, "do_sample": False}
    drafted = model.generate(prompt_1T, custom_generate=Drafting(thinking_model()), **how)
    assert drafted.tolist() == model.generate(prompt_1T, **how).tolist()


def test_where_the_drafts_context_is_full_the_model_goes_on_alone():
    model = deciding_model(max_position_embeddings=512)
    draft = drafting_model(backbone_config={"max_position_embeddings": 4})  # 16 tokens.
    [prompt_1T] = some_prompts([6])
    how = {"max_new_tokens": 40, "do_sample": False}
    output = model.generate(
        prompt_1T, custom_generate=Drafting(draft, lookup=0), return_dict_in_generate=True, **how
    )
    assert output.sequences.tolist() == model.generate(prompt_1T, **how).tolist()
    assert 0 < output.num_drafted <= 4 * 11
