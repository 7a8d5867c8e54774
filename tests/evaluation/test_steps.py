"""Scoring in steps: branches see only their own text, and both estimators have the same mean."""

import pytest
import torch
from tiny import EOS, PAD, tiny_model
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from calm.core.chunks import find_targets, split_into_chunks
from calm.data.chunking import make_blocks
from calm.errors import InputError
from calm.evaluation.branches import read_text
from calm.evaluation.brier import FromDraws, Targets, evaluate_brier
from calm.evaluation.perplexity import evaluate_perplexity
from calm.evaluation.scorers import AutoencoderCeiling, scorer_of
from calm.evaluation.steps import DrawScorer, ProbabilityScorer
from calm.models.generation.sampler_registry import sampler_from
from calm.models.readers import ChunkReader, TokensReader

VOCAB = 12


def llama(seed=0, vocab_size=VOCAB):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.6, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def sequential(chunk_size, **changes):
    """A CALM whose head has a likelihood, with distributions that are not flat."""
    model = tiny_model(chunk_size, head_config={"head_type": "sequential"}, **changes)
    with torch.no_grad():
        model.head.scores.weight.normal_(std=0.3)
        model.head.scores.bias.normal_(std=0.5)
        model.head.embed_tokens.weight.normal_(std=1.0)
    return model


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64,
                        initializer_range=0.6, eos_token_id=EOS, pad_token_id=PAD)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def blocks_of(num_documents=24, block_size=48, chunk_size=4, vocab=VOCAB, longest=24):
    """Documents of several lengths in the layout of training: padded in front, some cut by a block's edge."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(3, longest, (num_documents,), generator=generator).tolist()
    documents = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]
    arrays = make_blocks(
        documents, list(range(num_documents)),
        chunk_size=chunk_size, block_size=block_size, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def targets_in(block, chunk_size=4):
    is_target = find_targets(block["labels"], block["position_ids"], chunk_size)
    chunks = split_into_chunks(block["input_ids"], chunk_size)[:, 1:][is_target]
    targets = Targets(is_target, chunks, torch.tensor([EOS]), PAD)
    return Targets(is_target, targets.end(chunks)[0], targets.eos_ids, PAD)


def texts_before(block, is_target_BC, chunk_size=4):
    """The document's own tokens before each target, without padding."""
    texts = []
    for row, column in is_target_BC.nonzero().tolist():
        end = (column + 1) * chunk_size
        start = end - chunk_size * int(block["position_ids"][row, column + 1])
        is_text = block["labels"][row, start:end] >= 0
        texts.append(block["input_ids"][row, start:end][is_text].tolist())
    return texts


@pytest.mark.parametrize("make", [llama, gpt2])
def test_branches_of_tokens_see_only_their_own_text(make):
    model, block = make(), blocks_of()
    targets = targets_in(block)
    text = read_text(TokensReader(model), block, targets.is_target_BC, 4)
    path = torch.randint(3, VOCAB, (len(targets.chunks_PK), 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        on_text = [text.outputs_on_text(step) for step in range(4)]
        on_path = [text.follow(path[:, step : step + 1]) for step in range(3)]
        for index, before in enumerate(texts_before(block, targets.is_target_BC)):
            alone = model(torch.tensor([before + path[index].tolist()])).logits[0]
            for step in range(3):
                assert_close(on_path[step][index], alone[len(before) + step], rtol=1e-4, atol=1e-4)
            truth = targets.chunks_PK[index].tolist()
            alone = model(torch.tensor([before + truth])).logits[0]
            length = truth.index(EOS) if EOS in truth else 3
            for step in range(length + 1):
                assert_close(on_text[step][index], alone[len(before) + step - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unit_size", [1, 2])
def test_branches_of_chunks_see_only_their_own_text(unit_size):
    model, block = tiny_model(unit_size), blocks_of(vocab=40)
    targets = targets_in(block)
    text = read_text(ChunkReader(model), block, targets.is_target_BC, 4)
    path = torch.randint(3, 40, (len(targets.chunks_PK), 4), generator=torch.Generator().manual_seed(0))
    steps = 4 // unit_size
    with torch.no_grad():
        on_text = text.outputs_on_text(0)
        on_path = [text.follow(path[:, s * unit_size : (s + 1) * unit_size]) for s in range(steps - 1)]
        for index, before in enumerate(texts_before(block, targets.is_target_BC)):
            padding = [PAD] * (-len(before) % unit_size)
            alone = model.hidden_states_of_chunks(torch.tensor([padding + before + path[index].tolist()]))[0]
            num_units = (len(padding) + len(before)) // unit_size
            assert_close(on_text[index], alone[num_units - 1], rtol=1e-4, atol=1e-4)
            for step, states in enumerate(on_path):
                assert_close(states[index], alone[num_units + step], rtol=1e-4, atol=1e-4)


def distribution_of_tokens(model):
    """Next-token distribution of a token model after a text and the tokens of a window so far."""
    return lambda before, window: model(torch.tensor([before + window])).logits[0, -1].double().softmax(-1)


def distribution_of_chunks(model, temperature):
    """The same for a CALM whose head has a likelihood, from the loss of every token."""
    size, vocab = model.config.chunk_size, model.config.vocab_size

    def distribution(before, window):
        num_complete = len(window) // size * size
        text = [PAD] * (-len(before) % size) + before + window[:num_complete]
        state = model.hidden_states_of_chunks(torch.tensor([text]))[:, -1]
        partial = window[num_complete:]
        chunks = torch.tensor([[*partial, v, *[PAD] * (size - len(partial) - 1)] for v in range(vocab)])
        losses = model.head.token_losses(state.expand(vocab, -1), chunks)[:, len(partial)]
        return (-losses.double() / temperature).softmax(-1)

    return distribution


def literal_means(distribution_of, block, targets):
    """Brier-n of every target by enumerating all windows of tokens: no branch, no cache, no estimate."""
    scores = []
    for before, truth in zip(
        texts_before(block, targets.is_target_BC), targets.chunks_PK.tolist(), strict=True
    ):
        distributions = {(): 1.0}
        row = []
        for order in range(1, 5):
            longer = {}
            for window, probability in distributions.items():
                if EOS in window:
                    longer[(*window, PAD)] = longer.get((*window, PAD), 0.0) + probability
                    continue
                for token, p in enumerate(distribution_of(before, list(window)).tolist()):
                    longer[(*window, token)] = probability * p
            distributions = longer
            row.append(
                2 * distributions.get(tuple(truth[:order]), 0.0) - sum(p * p for p in distributions.values())
            )
        scores.append(row)
    return torch.tensor(scores).mean(0)


@torch.no_grad()
@pytest.mark.parametrize("estimator", ["best", "draws"])
def test_mean_of_both_estimators_is_that_of_an_enumeration(estimator):
    model = llama(vocab_size=5)
    block = blocks_of(num_documents=4, block_size=16, vocab=5, longest=8)
    targets = targets_in(block)
    assert (targets.chunks_PK == EOS).any() and (targets.chunks_PK[:, -1] != PAD).any()
    exact = literal_means(distribution_of_tokens(model), block, targets)
    scorer = scorer_of(model, estimator)
    repeats = []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        hits, equal = scorer.estimate(block, targets, 3, generator)
        repeats.append((2 * hits - equal).double().mean(0))
    means = torch.stack(repeats)
    error = means.std(0) / len(repeats) ** 0.5
    if estimator == "best":
        # Order 1 takes no draws, so every repeat is exact.
        assert_close(means[:, 0], exact[0].expand(300).double(), rtol=1e-5, atol=1e-5)
        assert error[1:].max() < 0.004
    assert ((means.mean(0) - exact)[1:].abs() < 3.5 * error[1:]).all()
    assert abs(means[:, 0].mean() - exact[0]) < 3.5 * error[0] + 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("unit_size", "temperature"), [(2, 1.0), (4, 1.0), (4, 0.5)])
def test_mean_of_chunk_probabilities_is_that_of_an_enumeration(unit_size, temperature):
    model = sequential(unit_size, vocab_size=5)
    block = blocks_of(num_documents=4, block_size=16, vocab=5, longest=8)
    targets = targets_in(block)
    exact = literal_means(distribution_of_chunks(model, temperature), block, targets)
    scorer = scorer_of(model, temperature=temperature)
    repeats = []
    for seed in range(200):
        hits, equal = scorer.estimate(block, targets, 2, torch.Generator().manual_seed(seed))
        repeats.append((2 * hits - equal).double().mean(0))
    means = torch.stack(repeats)
    error = means.std(0) / len(repeats) ** 0.5
    assert_close(means[:, 0], exact[0].expand(200).double(), rtol=1e-5, atol=1e-5)
    assert 0 < error[1:].max() < 0.01
    assert ((means.mean(0) - exact)[1:].abs() < 3.5 * error[1:]).all()
    assert scorer.reader.mean_draws == 1


def test_calm_is_scored_by_probabilities_if_it_has_them():
    model = sequential(4)
    pool = sampler_from(temperature=0.5, sampler="pool")
    head = sampler_from(temperature=0.5, sampler="head")
    assert isinstance(scorer_of(model), ProbabilityScorer)
    assert isinstance(scorer_of(model, sampler=head), ProbabilityScorer)
    # Greedy decoding, samplers of whole chunks and most heads have no probabilities to score.
    blocks = [blocks_of(num_documents=4, block_size=64, vocab=40)]
    for temperature in (0.0, 0.005):
        greedy = sampler_from(temperature=temperature, sampler="head")
        scorer = scorer_of(model, sampler=greedy)
        result = evaluate_brier(scorer, blocks, eos_token_id=EOS, pad_token_id=PAD, seed=0)
        assert isinstance(scorer, DrawScorer) and result.collisions[0] == 1
    assert isinstance(scorer_of(model, sampler=pool), DrawScorer)
    assert isinstance(scorer_of(sequential(2), sampler=pool), DrawScorer)
    assert isinstance(scorer_of(model, "draws"), DrawScorer)
    assert isinstance(scorer_of(tiny_model(4)), DrawScorer)


@pytest.mark.parametrize("unit_size", [2, 4])
def test_chunk_probabilities_agree_with_draws_and_have_less_variance(unit_size):
    model, blocks = sequential(unit_size), [blocks_of(num_documents=200, block_size=96, vocab=40)]
    settings = {"eos_token_id": EOS, "pad_token_id": PAD, "seed": 0}
    best, drawn = (evaluate_brier(scorer_of(model, e), blocks, **settings) for e in ("best", "draws"))
    assert best.num_chunks == drawn.num_chunks > 300
    for order in range(2):  # Draws of more tokens hardly ever agree here.
        error = (best.errors[order] ** 2 + drawn.errors[order] ** 2) ** 0.5
        assert abs(best.means[order] - drawn.means[order]) < 3.5 * error
        assert best.errors[order] < drawn.errors[order]


def test_token_probabilities_agree_with_draws_and_have_less_variance():
    model = llama()
    blocks = [blocks_of(num_documents=200, block_size=96)]
    settings = {"eos_token_id": EOS, "pad_token_id": PAD, "seed": 0}
    best = evaluate_brier(ProbabilityScorer(TokensReader(model)), blocks, **settings)
    drawn = evaluate_brier(DrawScorer(TokensReader(model)), blocks, **settings)
    assert best.num_chunks == drawn.num_chunks > 300
    for a, b, error_a, error_b in zip(best.means, drawn.means, best.errors, drawn.errors, strict=True):
        assert abs(a - b) < 3.5 * (error_a**2 + error_b**2) ** 0.5
        assert error_a < error_b


def test_single_step_window_is_scored_like_draws_of_whole_chunks():
    """A CALM with K = 4 fills the window of four tokens in one step."""
    model, block = tiny_model(4), blocks_of(vocab=40)

    class Draws:
        chunk_size = 4

        def draw_next_chunks(self, block, is_target_BC, num_draws, generator):
            states = model.hidden_states_of_chunks(block["input_ids"], position_ids=block["position_ids"])
            return model.draw_chunks(states[:, :-1][is_target_BC], num_draws, generator)

    settings = {"eos_token_id": EOS, "pad_token_id": PAD, "seed": 3, "num_draws": 4}
    stepwise = DrawScorer(ChunkReader(model))
    assert stepwise.chunk_size == 4
    in_steps, from_draws = (evaluate_brier(s, [block], **settings) for s in (stepwise, FromDraws(Draws())))
    assert in_steps.means == pytest.approx(from_draws.means, abs=1e-6)


@pytest.mark.parametrize(("unit_size", "window"), [(1, 4), (2, 4), (3, 6), (4, 4), (8, 8)])
def test_windows_hold_whole_chunks_and_at_least_four_tokens(unit_size, window):
    assert scorer_of(tiny_model(unit_size)).chunk_size == window


def test_token_perplexity_is_that_of_each_document_alone():
    model, block = llama(), blocks_of()
    targets = targets_in(block)
    total, count = 0.0, 0
    with torch.no_grad():
        for before, truth in zip(
            texts_before(block, targets.is_target_BC), targets.chunks_PK.tolist(), strict=True
        ):
            truth = truth[: truth.index(EOS) + 1] if EOS in truth else truth
            distribution = model(torch.tensor([before + truth])).logits[0].log_softmax(-1)
            total -= sum(float(distribution[len(before) - 1 + i, token]) for i, token in enumerate(truth))
            count += len(truth)
    result = evaluate_perplexity(model, [block], eos_token_id=EOS, pad_token_id=PAD)
    assert result.num_tokens == count
    assert result.cross_entropy == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_chunk_perplexity_is_that_of_each_document_alone(size):
    """For a head that has a likelihood, chunk by chunk."""
    window = max(size, 4)
    model = tiny_model(size, head_config={"head_type": "sequential"})
    model.head.scores.weight.data.normal_(std=0.3)
    block = blocks_of(vocab=40, chunk_size=window, longest=40)
    targets = targets_in(block, window)
    assert (targets.chunks_PK == PAD).any() and (targets.chunks_PK == EOS).any()
    total, count = 0.0, 0
    indices = targets.is_target_BC.nonzero().tolist()
    for (row, column), truth in zip(indices, targets.chunks_PK.tolist(), strict=True):
        first = column - int(block["position_ids"][row, column])
        before = block["input_ids"][row, first * window : (column + 1) * window].tolist()
        for start in range(0, window, size):
            # A chunk of only padding at the start of a document is not read.
            context = before + truth[:start]
            skipped = next(i for i, token in enumerate(context) if token != PAD) // size * size
            state = model.hidden_states_of_chunks(torch.tensor([context[skipped:]]))[:, -1]
            losses = model.head.token_losses(state, torch.tensor([truth[start : start + size]]))[0]
            for token, loss in zip(truth[start : start + size], losses.tolist(), strict=True):
                if token != PAD:
                    total, count = total + loss, count + 1
    result = evaluate_perplexity(model, [block], eos_token_id=EOS, pad_token_id=PAD)
    assert result.num_tokens == count
    assert result.cross_entropy == pytest.approx(total / count, rel=1e-4)


def test_ceiling_of_a_perfect_autoencoder_is_100():
    model, block = tiny_model(2), blocks_of(vocab=40)

    class Perfect:
        config = model.autoencoder.config

        def encode(self, tokens_PK):
            self.tokens = tokens_PK
            return self

        def sample(self, num_draws, generator):
            return self.tokens.expand(num_draws, -1, -1)

        def decode_tokens(self, latents):
            return latents

    ceiling = AutoencoderCeiling(Perfect(), 4)
    settings = {"eos_token_id": EOS, "pad_token_id": PAD, "seed": 0}
    assert evaluate_brier(FromDraws(ceiling), [block], **settings).means == (1.0, 1.0, 1.0, 1.0)
    untrained = evaluate_brier(FromDraws(AutoencoderCeiling(model.autoencoder, 4)), [block], **settings)
    assert untrained.means[3] < 0.5


@torch.no_grad()
@pytest.mark.parametrize("estimator", ["best", "draws"])
def test_low_temperature_scales_the_logits_of_a_token_model(estimator):
    """Scores are those of the model whose last layer is divided by T."""
    model, block = llama(), blocks_of(num_documents=60, block_size=96)
    settings = {"eos_token_id": EOS, "pad_token_id": PAD, "seed": 0, "num_draws": 3}
    cold = evaluate_brier(scorer_of(model, estimator, temperature=0.4), [block], **settings)
    warm = evaluate_brier(scorer_of(model, estimator), [block], **settings)
    model.lm_head.weight /= 0.4
    expected = evaluate_brier(scorer_of(model, estimator), [block], **settings)
    assert cold.means == pytest.approx(expected.means, abs=1e-5)
    assert min(c - w for c, w in zip(cold.collisions, warm.collisions, strict=True)) > 0
    for mean, hit, collision in zip(cold.means, cold.hits, cold.collisions, strict=True):
        assert mean == pytest.approx(2 * hit - collision, abs=1e-6)


@pytest.mark.parametrize("unit_size", [2, 4])
def test_calm_at_low_temperature_has_more_collisions_and_counts_draws(unit_size):
    scorers = {t: scorer_of(tiny_model(unit_size), temperature=t) for t in (1.0, 0.5)}
    settings = {"eos_token_id": EOS, "pad_token_id": PAD, "seed": 0}
    results = {t: evaluate_brier(s, [blocks_of(vocab=40)], **settings) for t, s in scorers.items()}
    assert results[0.5].collisions[0] > results[1.0].collisions[0]
    assert scorers[1.0].reader.mean_draws == 1
    assert 2 <= scorers[0.5].reader.mean_draws <= 200


def test_one_draw_is_refused():
    with pytest.raises(InputError, match="at least two draws, got num_draws=1"):
        evaluate_brier(
            scorer_of(tiny_model(4)), [blocks_of()], eos_token_id=EOS, pad_token_id=PAD, seed=0, num_draws=1
        )
