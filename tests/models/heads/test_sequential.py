"""The sequential head against the enumeration of all chunks."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config, tiny_model
from torch.testing import assert_close

from calm import CalmForCausalLM
from calm.core.distillation import SoftTargets
from calm.errors import InputError
from calm.models.generation.sampler_registry import default_sampler, sampler_from
from calm.models.heads import Likelihood, Target, vocabulary
from calm.models.heads.logits import draw_tokens
from calm.models.heads.registry import build_head
from calm.models.heads.vocabulary import ClassedTokens, TwoSoftmaxes
from calm.models.loading import load_language_model_and_tokenizer

HEAD = {"head_type": "sequential"}
KINDS = {"one softmax": HEAD, "classes": HEAD | {"num_classes": 2}, "a class each": HEAD | {"num_classes": 9}}
VOCABULARY, SIZE = 5, 2
ids = torch.randint(3, 40, (2, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=KINDS)
def small(request) -> CalmForCausalLM:
    """A model with few chunks, that are not equally likely."""
    model = tiny_model(SIZE, vocab_size=VOCABULARY, head_config=KINDS[request.param])
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            if "scores" in name:
                parameter.normal_(std=0.3 if parameter.ndim == 2 else 0.5)
        model.head.embed_tokens.weight.normal_(std=1.0)
        if model.config.head.num_classes > 1:
            model.head.tokens_by_class.copy_(torch.tensor([3, 1, 4, 0, 2]))
    return model


def log_distributions(head, states):
    """Log-probability of every chunk in every state, (P, V, V), from the loss."""
    chunks = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=SIZE)))
    distributions = [
        -SIZE * head.loss(state.expand(len(chunks), -1), Target(None, chunks)) for state in states
    ]
    return torch.stack(distributions).unflatten(-1, (VOCABULARY, VOCABULARY)).detach()


def chunk_frequencies(draws):
    """Share of the draws of each chunk, (P, V, V)."""
    first, second = draws.unbind(-1)
    counts = F.one_hot(VOCABULARY * first + second, VOCABULARY**2).double().mean(0)
    return counts.unflatten(-1, (VOCABULARY, VOCABULARY))


def test_probabilities_from_the_loss_sum_to_one(small):
    distributions = log_distributions(small.head, torch.randn(3, small.config.state_size)).exp()
    assert_close(distributions.sum((1, 2)), torch.ones(3))
    assert distributions.std() > 0.02


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_distribution_of_the_loss(small, temperature):
    """At T each token has its distribution to the power 1/T, normalized, given the token before it."""
    states, number = torch.randn(3, small.config.state_size), 40_000
    distributions = log_distributions(small.head, states).double()
    first, given = distributions.logsumexp(-1), distributions.log_softmax(-1)
    expected = (first / temperature).softmax(-1)[..., None] * (given / temperature).softmax(-1)
    prepared, generator = small.head.prepare(states), torch.Generator().manual_seed(1)
    actual = chunk_frequencies(small.head.draw_chunks(prepared, number, generator, temperature))
    # One of 75 frequencies is this many standard errors off for about one seed in 2,000.
    assert ((actual - expected).abs() < 4.5 * (expected * (1 - expected) / number).sqrt() + 1e-9).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_probabilities_match_the_enumeration(small, temperature, monkeypatch):
    """They are the token's probability, the sum of squares of its distribution, and its maximum."""
    states = torch.randn(3, small.config.state_size)
    distributions = log_distributions(small.head, states).double()
    first = (distributions.logsumexp(-1) / temperature).softmax(-1)
    given = (distributions / temperature).softmax(-1)
    monkeypatch.setattr("calm.core.cross_entropy.LOGITS_AT_ONCE", 3 * VOCABULARY)  # In parts.
    for chunk in ([0, 0], [2, 4], [4, 1]):
        statistics = small.head.token_probabilities(states, torch.tensor([chunk] * 3), temperature)
        of_token = torch.stack([first[:, chunk[0]], given[:, chunk[0], chunk[1]]], dim=-1)
        squares = torch.stack([first.square().sum(-1), given[:, chunk[0]].square().sum(-1)], dim=-1)
        highest = torch.stack([first.amax(-1), given[:, chunk[0]].amax(-1)], dim=-1)
        for actual, expected in zip(statistics, (of_token, squares, highest), strict=True):
            assert_close(actual.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_temperature_1_is_the_default(small):
    prepared = small.head.prepare(torch.randn(3, small.config.state_size))
    at_one = small.head.draw_chunks(prepared, 5, torch.Generator().manual_seed(4), 1.0)
    assert torch.equal(at_one, small.head.draw_chunks(prepared, 5, torch.Generator().manual_seed(4)))


def test_temperatures_out_of_range_are_refused(small):
    prepared = small.head.prepare(torch.randn(3, small.config.state_size))
    with pytest.raises(ValueError, match="takes temperatures from 0 to 1, got -1"):
        small.head.draw_chunks(prepared, 1, temperature=-1)
    # Distributions at temperature 0 are not supported, only greedy draws.
    with pytest.raises(ValueError, match=r"temperature from 0.01 to 1, got 0"):
        small.head.token_probabilities(torch.randn(1, small.config.state_size), torch.ones(1, 2).long(), 0)


def test_loss_of_a_text_matches_the_head_after_its_prompt(small):
    """Backbone, own embeddings and head together: the chunk after a prompt, against the loss of the text."""
    prompt, chunks = torch.tensor([[3, 4, 1, 3]]), itertools.product(range(VOCABULARY), repeat=SIZE)
    texts = torch.cat([prompt.expand(25, -1), torch.tensor(list(chunks))], dim=-1)
    labels = texts.clone()
    labels[:, :4] = -100  # Only the chunk after the prompt counts.
    with torch.no_grad():
        losses = [
            small(text[None], labels=label[None]).loss for text, label in zip(texts, labels, strict=True)
        ]
        state = small.hidden_states_of_chunks(prompt)[:, -1]
    assert_close(
        (-SIZE * torch.stack(losses)).view(1, VOCABULARY, VOCABULARY), log_distributions(small.head, state)
    )


def test_window_reaches_into_the_previous_chunk():
    """With the backbone's state unchanged, the last token of a chunk affects the distribution of the next."""
    model = tiny_model(head_config=HEAD)
    changed = ids.clone()
    changed[:, 7] = 3 + (changed[:, 7] - 2) % 37
    width = model.config.hidden_size
    before, after = (model.hidden_states_of_chunks(tokens)[:, 1] for tokens in (ids, changed))
    after = torch.cat([before[:, :width], after[:, width:]], dim=-1)
    tokens = ids[:, 8:12]
    losses = [model.head.loss(state, Target(None, tokens)) for state in (before, after)]
    assert (losses[0] - losses[1]).abs().min() > 1e-4
    assert before.shape == (2, model.config.state_size) == (2, 32 + 4 * 5)


@pytest.mark.parametrize("head", KINDS)
def test_logits_computed_in_parts_give_the_same_results(head, monkeypatch):
    model, results = tiny_model(head_config=KINDS[head]), []
    for logits_at_once in (2**26, 40 * 7):
        monkeypatch.setattr("calm.core.cross_entropy.LOGITS_AT_ONCE", logits_at_once)
        model.zero_grad()
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([loss.detach(), *gradients, model.eval().generate(ids, max_new_tokens=12, seed=3)])
    assert_close(results[0], results[1])


def test_token_is_chosen_by_the_cumulative_sum_of_its_distribution():
    distributions = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    points = torch.tensor([0.0, 0.24, 0.26, 0.999, 1 - 2**-24])
    chosen, sums = draw_tokens(torch.ones(5, 1), distributions.log().T.nan_to_num(neginf=-1e9), points)
    assert chosen.tolist() == [1, 1, 3, 3, 3]
    assert_close(sums, torch.ones(5))


def test_head_sampler_makes_one_draw_at_the_temperature():
    model = tiny_model(head_config=HEAD)
    assert default_sampler(model.config.head, 0.5) == "head"
    state = torch.randn(3, model.config.state_size)
    settings = sampler_from(temperature=0.5, sampler="head")
    sample = model.sample_chunks(state, settings, torch.Generator().manual_seed(0))
    drawn = model.head.draw_chunks(model.head.prepare(state), 1, torch.Generator().manual_seed(0), 0.5)
    assert torch.equal(sample.chunks_RK, drawn[0])
    assert sample.num_draws_R.tolist() == [1, 1, 1]


@pytest.mark.parametrize("logits_at_once", [2**26, 40 * 2])
@pytest.mark.parametrize("head", KINDS)
def test_temperature_0_is_greedy_decoding(head, logits_at_once, monkeypatch):
    monkeypatch.setattr("calm.core.cross_entropy.LOGITS_AT_ONCE", logits_at_once)
    torch.manual_seed(2)
    model = tiny_model(head_config=KINDS[head])
    with torch.no_grad():
        # At zero, as in a new head, no distribution would depend on the text.
        for weight in (model.head.out.weight, model.head.direct.weight):
            weight.normal_()
    written = model.generate(ids, max_new_tokens=8, temperature=0.0, seed=1, return_dict_in_generate=True)
    assert written.num_draws.max() == 1
    assert torch.equal(written.sequences, model.generate(ids, max_new_tokens=8, temperature=0.0, seed=2))
    state = torch.randn(5, model.config.state_size)
    settings = sampler_from(temperature=0.0, sampler=default_sampler(model.config.head, 0.0))
    chunks = model.sample_chunks(state, settings).chunks_RK
    for index in range(4):  # No other token is likelier, given those before it.
        others = chunks.repeat_interleave(40, 0)
        others[:, index] = torch.arange(40).repeat(5)
        losses = model.head.token_losses(state.repeat_interleave(40, 0), others)[:, index].view(5, 40)
        assert torch.equal(losses.argmin(-1), chunks[:, index])
    assert len(chunks.unique(dim=0)) > 1


@pytest.mark.parametrize("needs_gradients", [False, True])
def test_distillation_losses_match_those_of_full_distributions(small, needs_gradients):
    """Cross-entropy and KL divergence, computed from what `token_distribution` gives."""
    head, states = small.head, torch.randn(6, small.config.state_size)
    tokens, weights = torch.randint(0, VOCABULARY, (6, SIZE)), torch.rand(12)
    soft_targets = SoftTargets(torch.randn(12, 4), torch.randn(VOCABULARY, 4), None, weights, 2.0)
    with torch.set_grad_enabled(needs_gradients):
        actual = head.distillation_losses(states, tokens, soft_targets)
    teacher = (soft_targets.states_MY @ soft_targets.table_UY.T / 2).log_softmax(-1).view(6, SIZE, VOCABULARY)
    for index in range(SIZE):
        p = head.token_distribution(head.prepare(states), tokens, index)
        cross_entropy = -p.log().gather(1, tokens[:, index, None]).squeeze(1)
        log_q = teacher[:, index]
        divergence = (log_q.exp() * (log_q - (p.log() / 2).log_softmax(-1))).sum(-1)
        weight = weights.view(6, SIZE)[:, index]
        expected = (1 - weight) * cross_entropy + weight * 4 * divergence
        assert_close(actual[:, index], expected, rtol=1e-4, atol=1e-5)
    if needs_gradients:
        actual.sum().backward()
        assert all(p.grad is not None for name, p in head.named_parameters() if "scores" in name)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_drafts_are_drawn_from_the_likeliest_classes(temperature, monkeypatch):
    """Their distribution is that of the head, without the other tokens."""
    monkeypatch.setattr(vocabulary, "_TOKENS_OF_A_DRAFT", 13)  # Two classes of six of the seven.
    torch.manual_seed(0)
    model = tiny_model(SIZE, vocab_size=40, head_config=HEAD | {"num_classes": 7})
    head, states = model.head, 3 * torch.randn(50, model.config.state_size)
    head.tokens_by_class.copy_(torch.randperm(40))
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.startswith(("scores", "class_scores", "out.", "direct.")):
                parameter.normal_(std=0.5)
        head.class_scores.bias[-1] = 2.0  # The last class has four tokens and padding.
        prepared, tokens = head.prepare(states), torch.randint(0, 40, (50, SIZE))
        full_PV = head.token_distribution(prepared, tokens, 1, temperature)
        at_one_PV = head.token_distribution(prepared, tokens, 1)
        actual = head.draft_distribution(prepared, tokens, 1, temperature)
    classes_PC = torch.zeros(50, 7).index_add_(1, torch.arange(40) // 6, at_one_PV[:, head.tokens_by_class])
    is_likely_PC = classes_PC >= classes_PC.topk(2).values[:, 1:]
    expected_PV = torch.zeros(50, 40)
    expected_PV[:, head.tokens_by_class] = is_likely_PC[:, torch.arange(40) // 6].float()
    expected_PV *= full_PV
    assert_close(actual.over_vocabulary(), expected_PV / expected_PV.sum(-1, keepdim=True))
    assert actual.p_MS.shape == (50, 12) and bool(is_likely_PC[:, -1].any())
    assert_close(actual.row(3).over_vocabulary(), actual.over_vocabulary()[3:4])


def test_classes_are_of_equal_size_and_never_empty():
    for vocab_size, num_classes, size, num_filled in (
        (40, 7, 6, 7),
        (5, 4, 2, 3),
        (5, 9, 1, 5),
        (40, 40, 1, 40),
    ):
        config = tiny_config(vocab_size=vocab_size, head_config=HEAD | {"num_classes": num_classes}).head
        assert (config.class_size, config.num_filled_classes) == (size, num_filled)


def test_new_head_with_classes_starts_from_counts_and_neighbours():
    """Every distribution has the token frequencies; tokens with the same neighbours share a class."""
    torch.manual_seed(0)
    head = build_head(tiny_config(head_config=HEAD | {"num_classes": 4}).head, 32, 8)
    counts, groups = torch.arange(40), torch.arange(40) % 4
    neighbours = torch.zeros(40, 8)
    neighbours[torch.arange(40), groups] = 50
    head.init_from_neighbours(lambda: neighbours)
    head.init_from_counts(lambda: counts)
    with torch.no_grad():
        for weight in (head.out.weight, head.out.bias, head.direct.weight, head.direct.bias):
            weight.zero_()
        states = torch.randn(3, 32 + head.config.extra_state_size)
        actual = head.token_distribution(head.prepare(states), torch.zeros(3, 4, dtype=torch.long), 1)
    assert_close(actual, ((counts + 0.5) / (counts + 0.5).sum()).expand(3, -1))
    classes = head.tokens_by_class.view(4, 10)
    assert {frozenset((row % 4).tolist()) for row in classes} == {frozenset({n}) for n in range(4)}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_traced_draw_matches_the_eager_draw(temperature):
    model = tiny_model(head_config=KINDS["classes"])
    vocabulary, size = model.head._vocabulary(), model.config.head.vector_size
    traced = torch.compile(lambda *args: vocabulary.draw(*args, temperature), backend="eager", dynamic=True)
    with torch.no_grad():
        vectors, uniform = 3 * torch.randn(500, size), torch.rand(500)
        uniform[:2] = torch.tensor([0.0, 1 - 2**-24])  # The smallest and the largest possible number.
        assert (traced(vectors, uniform)[0] == vocabulary.draw(vectors, uniform, temperature)[0]).all()


def test_the_lower_edge_of_a_class_draws_no_token_without_probability():
    """64 classes of 4 tokens, all equally likely except the first of each class, which never occurs."""
    bias = torch.zeros(256)
    bias[::4] = -60.0
    tokens = ClassedTokens(torch.zeros(256, 3), bias, torch.arange(256), 4)
    vocabulary = TwoSoftmaxes(torch.zeros(64, 3), torch.zeros(64), tokens)
    edges = torch.arange(64) / 64
    for uniform in (edges, edges.nextafter(torch.tensor(2.0)), edges[1:].nextafter(torch.tensor(-1.0))):
        tokens, sums = vocabulary.draw(torch.zeros(len(uniform), 6), uniform, 1.0)
        assert (tokens % 4 > 0).all() and sums.isfinite().all()
        assert (tokens // 4 == (uniform * 64).floor()).all()


def test_classes_must_contain_every_token_exactly_once(tmp_path):
    model = tiny_model(head_config=KINDS["classes"])
    for damaged in (torch.zeros(40).long(), torch.arange(40) - 1, torch.arange(40) + 1):
        model.head.tokens_by_class.copy_(damaged)
        model.save_pretrained(tmp_path / "damaged")
        with pytest.raises(InputError, match=r"head\.tokens_by_class .* every token exactly once"):
            load_language_model_and_tokenizer(str(tmp_path / "damaged"))


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        tiny_config(head_config=HEAD | {"rank": 0})
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        tiny_config(head_config=HEAD | {"num_classes": 0})
    with pytest.raises(ValueError, match="layer_norm_eps must be above 0"):
        tiny_config(head_config=HEAD | {"layer_norm_eps": 0.0})


def test_it_has_a_likelihood_unlike_categorical_flow_and_energy():
    assert isinstance(tiny_model(head_config=HEAD).head, Likelihood)
    assert not isinstance(tiny_model(head_config={"head_type": "categorical_flow"}).head, Likelihood)
    assert not isinstance(tiny_model().head, Likelihood)
