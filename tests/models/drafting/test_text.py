"""Drafted texts: greedily those of the model alone, else of the same distribution."""

import pytest
import torch
from drafts import deciding_model, distribution_of_texts, drafting_model, p_value, some_prompts
from transformers import (
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    TemperatureLogitsWarper,
)

from calm.core import speculative
from calm.core.speculative import Kept
from calm.models.drafting import text as drafted_text
from calm.models.drafting.draft import ChunkDrafter
from calm.models.drafting.text import DraftedText, check_model

pytestmark = pytest.mark.usefixtures("norms_in_double_precision")
SAMPLES, VOCABULARY = 700, 5
PROMPT = [1, 3, 4, 3, 4]


def greedy(model, draft, prompt_1T, number, num_chunks=1, **arguments):
    text = DraftedText(model, ChunkDrafter(draft, 0.0, num_chunks), prompt_1T, is_greedy=True, **arguments)
    while (left := prompt_1T.shape[1] + number - text.ids_1T.shape[1]) > 0:
        assert 1 <= len(text.round(left)) <= left
    return text


@pytest.mark.parametrize("head_type", ["sequential", "energy"])
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_greedily_the_text_is_the_models_own(head_type, num_chunks):
    model, draft = deciding_model(), drafting_model(head_type)
    for prompt_1T in some_prompts([1, 4, 7, 30]):
        text = greedy(model, draft, prompt_1T, 40, num_chunks)
        alone = model.generate(prompt_1T, max_new_tokens=40, do_sample=False)
        assert text.ids_1T.tolist() == alone.tolist()


def repeating(prompt_1T, model, draft):
    """Lets a draft write what the model would, so that much of it stays."""
    alone = model.generate(prompt_1T, max_new_tokens=80, do_sample=False)[0].tolist()

    class Knowing(ChunkDrafter):
        def draft(self, text, most, generator=None):
            drafted = super().draft(text, most, generator)
            known = alone[len(text) : len(text) + most][:5]
            wrong = len(text) % 4  # Every now and then it errs, at any place.
            return drafted._replace(tokens_G=[*known[:wrong], 3, *known[wrong + 1 :]] if wrong else known)

    return Knowing(draft, 0.0), alone


def test_greedily_the_text_is_the_models_own_where_drafts_are_good():
    model, draft, [prompt_1T] = deciding_model(), drafting_model(), some_prompts([6])
    knowing, alone = repeating(prompt_1T, model, draft)
    text = DraftedText(model, knowing, prompt_1T, is_greedy=True)
    while text.ids_1T.shape[1] < 70:
        text.round(100)
    assert text.ids_1T[0].tolist() == alone[: text.ids_1T.shape[1]]
    counts = text.counts
    assert 0.3 * counts.drafted < counts.kept < counts.drafted
    assert text.ids_1T.shape[1] == 6 + counts.rounds + counts.kept


def sampled(head_type, temperature, samples=SAMPLES, num_chunks=1):
    """Texts of three tokens of a model of five, drafted by a CALM with one token more."""
    model = deciding_model(VOCABULARY)
    draft = drafting_model(head_type, 2, vocab_size=VOCABULARY + 1)
    generator, texts = torch.Generator().manual_seed(0), []
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)] if temperature != 1 else [])
    for _ in range(samples):
        drafter = ChunkDrafter(draft, temperature, num_chunks, num_draws=4)
        text = DraftedText(model, drafter, torch.tensor([PROMPT]), None, warpers, generator=generator)
        while (left := len(PROMPT) + 3 - text.ids_1T.shape[1]) > 0:
            text.round(left)
        texts.append(tuple(text.ids_1T[0, len(PROMPT) :].tolist()))
    return p_value(texts, distribution_of_texts(model, PROMPT, 3, temperature))


@pytest.mark.parametrize(
    ("head_type", "temperature"), [("sequential", 1.0), ("sequential", 0.6), ("energy", 0.6)]
)
def test_texts_have_the_models_distribution(head_type, temperature):
    assert sampled(head_type, temperature, num_chunks=2) > 1e-3


def test_a_lost_token_behind_a_whole_draft_would_be_seen(monkeypatch):
    def without_it(model_SV, tokens_G, *others):
        kept = speculative.keep_by_ratio(model_SV, tokens_G, *others)
        return Kept(kept.number, kept.next_token if kept.number < len(tokens_G) else tokens_G[-1])

    monkeypatch.setattr(drafted_text, "keep_by_ratio", without_it)
    assert sampled("sequential", 1.0, num_chunks=2) < 1e-6


def test_a_stale_cache_would_be_seen(monkeypatch):
    model, draft, [prompt_1T] = deciding_model(), drafting_model(), some_prompts([6])
    monkeypatch.setattr(drafted_text.DynamicCache, "crop", lambda self, number: None)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        alone = model.generate(prompt_1T, max_new_tokens=40, do_sample=False)
        assert greedy(model, draft, prompt_1T, 40).ids_1T.tolist() == alone.tolist()


def test_padding_in_front_changes_nothing():
    model, draft, [prompt_1T] = deciding_model(), drafting_model(), some_prompts([6])
    padded_1T = torch.nn.functional.pad(prompt_1T, (3, 0))
    mask_1T = (torch.arange(9) >= 3).long().unsqueeze(0)
    text = greedy(model, draft, padded_1T, 20, mask_1T=mask_1T)
    assert text.ids_1T[0, 3:].tolist() == greedy(model, draft, prompt_1T, 20).ids_1T[0].tolist()


def test_processors_see_the_tokens_of_the_draft_before_their_place():
    model, draft, [prompt_1T] = deciding_model(), drafting_model(), some_prompts([6])
    knowing, _ = repeating(prompt_1T, model, draft)
    seen = []

    def note(ids_1T, scores_1V):
        seen.append(ids_1T[0].tolist())
        return scores_1V

    text = DraftedText(model, knowing, prompt_1T, None, LogitsProcessorList([note]), is_greedy=True)
    for _ in range(6):
        before = len(seen)
        new = text.round(100)
        asked = seen[before : before + len(new)]
        written = text.ids_1T[0].tolist()
        assert asked == [written[: len(written) - left] for left in range(len(new), 0, -1)]


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_models_and_drafts_of_other_vocabularies(chunk_size):
    # More tokens than the model has, and fewer: whatever is drafted, the text is the model's.
    for vocab_size in (30, 50):
        model, draft = deciding_model(), drafting_model(chunk_size=chunk_size, vocab_size=vocab_size)
        [prompt_1T] = some_prompts([6], 30)
        with torch.no_grad():
            draft.head.scores.bias[vocab_size - 1] = 5.0
        alone = model.generate(prompt_1T, max_new_tokens=8, do_sample=False)
        assert vocab_size == 50 or int(alone.max()) >= 30  # Tokens that the draft lacks are read too.
        assert greedy(model, draft, prompt_1T, 8).ids_1T.tolist() == alone.tolist()


def test_models_that_forget_are_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    check_model(
        MistralForCausalLM(MistralConfig(vocab_size=40, num_key_value_heads=2, sliding_window=None, **sizes))
    )
    with pytest.raises(ValueError, match="forgets old tokens"):
        check_model(
            MistralForCausalLM(MistralConfig(vocab_size=40, num_key_value_heads=2, sliding_window=8, **sizes))
        )
    with pytest.raises(ValueError, match="remembers nothing"):
        check_model(OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=40, n_embd=16, n_layer=1, n_head=2)))
    encoder_decoder = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    with pytest.raises(ValueError, match="causal language models"):
        check_model(encoder_decoder)


def test_a_long_text_is_read_in_pieces_by_both():
    model, draft, [prompt_1T] = deciding_model(), drafting_model(), some_prompts([61])
    alone = model.generate(prompt_1T, max_new_tokens=20, do_sample=False)
    text = DraftedText(model, ChunkDrafter(draft, 0.0), prompt_1T, is_greedy=True)
    pieces = []
    while (left := 81 - text.ids_1T.shape[1]) > 0:
        pieces.append(0)
        while not text.read_ahead(16):
            pieces[-1] += 1
        text.round(left)
    # At first both read, three pieces each, and later the draft in each of the three other alignments.
    assert pieces[0] == 6 and sorted(pieces)[-4:] == [3, 3, 3, 6] and sum(pieces) == 15
    assert text.ids_1T.tolist() == alone.tolist()


def test_scores_are_made_of_the_places_that_are_looked_at():
    model, draft, [prompt_1T] = deciding_model(), drafting_model(), some_prompts([30])
    widths = []
    handle = model.lm_head.register_forward_hook(lambda module, given, out: widths.append(out.shape[1]))
    text = DraftedText(model, ChunkDrafter(draft, 0.0), prompt_1T, is_greedy=True)
    text.round(9)
    handle.remove()
    assert widths == [5]
