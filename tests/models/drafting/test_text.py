"""Drafted texts: the same as the model's own with greedy decoding, else of the same distribution."""

import pytest
import torch
from drafts import deciding_model, distribution_of_texts, drafting_model, p_value, some_prompts
from enumeration import OutcomeEnumerator, distribution_of_outcomes, largest_error
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from calm.core import speculative
from calm.core.branches import TEXT, Branches
from calm.core.speculative import Accepted
from calm.models.drafting import growing
from calm.models.drafting import text as drafted_text
from calm.models.drafting.draft import ChunkDrafter, Draft
from calm.models.drafting.passes import TextPasses
from calm.models.drafting.text import DraftedText
from calm.models.heads import vocabulary

pytestmark = pytest.mark.usefixtures("norms_in_double_precision")
SAMPLES, VOCABULARY = 700, 5
PROMPT = [1, 3, 4, 3, 4]


def greedy(model, draft, prompt_1T, num_tokens, num_chunks=1, **arguments):
    text = DraftedText(model, ChunkDrafter(draft, 0.0, num_chunks), prompt_1T, is_greedy=True, **arguments)
    while (remaining := prompt_1T.shape[1] + num_tokens - text.ids_1T.shape[1]) > 0:
        assert 1 <= len(text.run_round(remaining)) <= remaining
    return text


@pytest.mark.parametrize("head_type", ["sequential", "energy"])
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_greedy_text_is_the_models_own(head_type, num_chunks):
    model, draft = deciding_model(), drafting_model(head_type)
    for prompt_1T in some_prompts([1, 4, 7, 30]):
        text = greedy(model, draft, prompt_1T, 40, num_chunks)
        alone = model.generate(prompt_1T, max_new_tokens=40, do_sample=False)
        assert text.ids_1T.tolist() == alone.tolist()


class MostlyRightDrafter:
    """Drafts what the model would write, with a wrong token now and then, at varying positions.

    Args:
        model_text: The text that the model writes.
        has_branches: Whether each token gets a sibling.
    """

    def __init__(self, model_text, has_branches):
        self.model_text, self.has_branches = model_text, has_branches

    def draft(self, text, max_length, generator=None, allow_tree=False):
        right = self.model_text[len(text) : len(text) + max_length][:5]
        wrong = len(text) % 4
        drafted = [*right[:wrong], 3, *right[wrong + 1 :]] if wrong else right
        if not (self.has_branches and allow_tree):
            return Draft(Branches.line(drafted))
        tokens, parents, node = [], [], TEXT
        for index, token in enumerate(drafted):
            pair = [token, 7] if (len(text) + index) % 2 else [7, token]
            parents += [node, node]
            tokens += pair if token != 7 else [7, 8]
            node = len(tokens) - 2 + pair.index(token)
        return Draft(Branches(tokens, parents))


def mostly_right_text(has_branches, **arguments):
    model, [prompt_1T] = deciding_model(), some_prompts([6])
    alone = model.generate(prompt_1T, max_new_tokens=80, do_sample=False)[0].tolist()
    drafter = MostlyRightDrafter(alone, has_branches)
    return DraftedText(model, drafter, prompt_1T, is_greedy=True, **arguments), alone


@pytest.mark.parametrize("has_branches", [False, True])
def test_greedy_text_is_the_models_own_if_most_drafts_are_right(has_branches):
    text, alone = mostly_right_text(has_branches)
    while text.ids_1T.shape[1] < 70:
        text.run_round(100)
    assert text.ids_1T[0].tolist() == alone[: text.ids_1T.shape[1]]
    counts = text.counts
    assert 0.3 * counts.drafted < counts.accepted < counts.drafted
    assert text.ids_1T.shape[1] == 6 + counts.rounds + counts.accepted


def p_value_of_samples(head_type, temperature, samples=SAMPLES, num_chunks=1, **settings):
    """P-value of texts of three tokens; the model has five tokens, the CALM that drafts one more."""
    model = deciding_model(VOCABULARY)
    draft = drafting_model(head_type, 2, vocab_size=VOCABULARY + 1, **settings)
    generator, texts = torch.Generator().manual_seed(0), []
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)] if temperature != 1 else [])
    for _ in range(samples):
        drafter = ChunkDrafter(draft, temperature, num_chunks, num_draws=4)
        text = DraftedText(model, drafter, torch.tensor([PROMPT]), None, warpers, generator=generator)
        while (remaining := len(PROMPT) + 3 - text.ids_1T.shape[1]) > 0:
            text.run_round(remaining)
        texts.append(tuple(text.ids_1T[0, len(PROMPT) :].tolist()))
    return p_value(texts, distribution_of_texts(model, PROMPT, 3, temperature))


@pytest.mark.parametrize(
    ("head_type", "temperature"), [("sequential", 1.0), ("sequential", 0.6), ("energy", 0.6)]
)
def test_texts_have_the_models_distribution(head_type, temperature):
    assert p_value_of_samples(head_type, temperature, num_chunks=2) > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_texts_have_the_models_distribution_if_the_draft_leaves_out_classes(temperature, monkeypatch):
    """Four of six tokens can be drafted at a time: those in two of three classes."""
    monkeypatch.setattr(vocabulary, "_TOKENS_OF_A_DRAFT", 4)
    assert p_value_of_samples("sequential", temperature, head={"num_classes": 3}) > 1e-3


def test_losing_the_token_after_a_complete_draft_is_detected(monkeypatch):
    def without_next_token(draft, *others):
        accepted = speculative.accept_by_ratio(draft, *others)
        is_complete = accepted.nodes and accepted.nodes[-1] not in draft.children
        return Accepted(
            accepted.nodes, draft.tokens_G[accepted.nodes[-1]] if is_complete else accepted.next_token
        )

    monkeypatch.setattr(drafted_text, "accept_by_ratio", without_next_token)
    assert p_value_of_samples("sequential", 1.0, num_chunks=2) < 1e-6


def outcomes_of_round(monkeypatch, num_earlier_rounds):
    """The distribution of a round's new tokens, {tokens: probability}, the text before it, and the model.

    It enumerates all random outcomes, of the draft and of the decision. Earlier rounds accept the second
    candidate of their draft.
    """
    model, draft = deciding_model(3), drafting_model(chunk_size=2, vocab_size=4)
    enumerator, [prompt] = OutcomeEnumerator(), [[1, 2, 2, 0, 1]]
    enumerator.patch(monkeypatch, growing, drafted_text)
    before = {}

    def run():
        drafter = ChunkDrafter(draft, tree_tokens=3)
        text = DraftedText(model, drafter, torch.tensor([prompt]))
        for _ in range(num_earlier_rounds):
            with monkeypatch.context() as scripted:
                # The second candidate is accepted, and what may follow it is drawn.
                answers = iter([False, True])
                scripted.setattr(
                    growing, "draw_distinct", lambda weights_MV, number, _: weights_MV.topk(number).indices
                )
                scripted.setattr(speculative, "_happens", lambda *_: next(answers))
                scripted.setattr(speculative, "draw_token", lambda weights_V, _: int(weights_V.argmax()))
                assert len(text.run_round(9)) == 2
        before["text"] = text.ids_1T[0].tolist()
        return tuple(text.run_round(9))

    return distribution_of_outcomes(enumerator, run), before["text"], model


def error_of_round(monkeypatch, num_earlier_rounds):
    outcomes, text, model = outcomes_of_round(monkeypatch, num_earlier_rounds)
    assert max(len(tokens) for tokens in outcomes) == 3

    @torch.no_grad()
    def distribution_after(before):
        return model(torch.tensor([[*text, *before]])).logits[0, -1].softmax(-1)

    return largest_error(outcomes, distribution_after)


@pytest.mark.parametrize("num_earlier_rounds", [0, 1])
def test_a_round_has_exactly_the_models_distribution(num_earlier_rounds, monkeypatch):
    assert error_of_round(monkeypatch, num_earlier_rounds) < 1e-5  # Logits are in single precision.


@pytest.mark.parametrize(
    ("owner", "name", "fault", "num_earlier_rounds"),
    [
        # The cache keeps the first drafted tokens instead of the accepted path.
        (TextPasses, "roll_back", lambda self, number, keep=(): self._cache.crop(len(keep) - number), 1),
        # Each drafted token sees all before it, also those on other paths.
        (Branches, "sees", lambda self: torch.ones(len(self), len(self), dtype=torch.bool).tril(), 0),
        # Positions come from the indices of nodes instead of their depths.
        (Branches, "depths", property(lambda self: range(len(self))), 0),
    ],
)
def test_faults_of_a_pass_are_detected(owner, name, fault, num_earlier_rounds, monkeypatch):
    monkeypatch.setattr(owner, name, fault)
    assert error_of_round(monkeypatch, num_earlier_rounds) > 1e-3


@pytest.mark.parametrize("has_branches", [False, True])
def test_stale_cache_is_detected(has_branches, monkeypatch):
    monkeypatch.setattr(TextPasses, "roll_back", lambda self, number, keep=(): None)
    text, alone = mostly_right_text(has_branches)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        for _ in range(10):
            text.run_round(100)
        assert text.ids_1T[0].tolist() == alone[: text.ids_1T.shape[1]]


def test_left_padding_changes_nothing():
    model, draft, [prompt_1T] = deciding_model(), drafting_model(), some_prompts([6])
    padded_1T = torch.nn.functional.pad(prompt_1T, (3, 0))
    mask_1T = (torch.arange(9) >= 3).long().unsqueeze(0)
    text = greedy(model, draft, padded_1T, 20, mask_1T=mask_1T)
    assert text.ids_1T[0, 3:].tolist() == greedy(model, draft, prompt_1T, 20).ids_1T[0].tolist()


@pytest.mark.parametrize("has_branches", [False, True])
def test_processors_see_the_drafted_tokens_before_each_position(has_branches):
    seen = []

    def record(ids_1T, logits_1V):
        seen.append(ids_1T[0].tolist())
        return logits_1V

    text, _ = mostly_right_text(has_branches, processors=LogitsProcessorList([record]))
    for _ in range(6):
        num_seen = len(seen)
        new = text.run_round(100)
        written = text.ids_1T[0].tolist()
        assert seen[num_seen:] == [written[: len(written) - after] for after in range(len(new), 0, -1)]


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_draft_may_have_a_smaller_or_larger_vocabulary(chunk_size):
    # The draft has fewer tokens than the model, or more: the text is the model's in any case.
    for vocab_size in (30, 50):
        model, draft = deciding_model(), drafting_model(chunk_size=chunk_size, vocab_size=vocab_size)
        [prompt_1T] = some_prompts([6], 30)
        with torch.no_grad():
            draft.head.scores.bias[vocab_size - 1] = 5.0
        alone = model.generate(prompt_1T, max_new_tokens=8, do_sample=False)
        assert vocab_size == 50 or int(alone.max()) >= 30  # The draft has to read tokens that it lacks.
        assert greedy(model, draft, prompt_1T, 8).ids_1T.tolist() == alone.tolist()


def test_both_models_read_a_long_text_in_pieces():
    model, draft, [prompt_1T] = deciding_model(), drafting_model(), some_prompts([61])
    alone = model.generate(prompt_1T, max_new_tokens=20, do_sample=False)
    text = DraftedText(model, ChunkDrafter(draft, 0.0), prompt_1T, is_greedy=True)
    pieces = []
    while (remaining := 81 - text.ids_1T.shape[1]) > 0:
        pieces.append(0)
        while not text.read_ahead(16):
            pieces[-1] += 1
        text.run_round(remaining)
    # First both read three pieces each; later the draft reads as many in each of the other alignments.
    assert pieces[0] == 6 and sorted(pieces)[-4:] == [3, 3, 3, 6] and sum(pieces) == 15
    assert text.ids_1T.tolist() == alone.tolist()


def test_logits_are_computed_only_where_they_are_needed():
    model, draft, [prompt_1T] = deciding_model(), drafting_model(), some_prompts([30])
    widths = []
    handle = model.lm_head.register_forward_hook(
        lambda module, inputs, output: widths.append(output.shape[1])
    )
    for tree_tokens in (0, 6):
        drafter = ChunkDrafter(draft, 0.0, tree_tokens=tree_tokens)
        DraftedText(model, drafter, prompt_1T, is_greedy=True).run_round(9)
    handle.remove()
    assert widths == [5, 7]
