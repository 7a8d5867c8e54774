"""Thoughts, against uncached passes, closed forms and central differences."""

import pytest
import torch
import transformers
from recorders import RecordingStreamer
from tiny import tiny_llama, tiny_model
from torch.testing import assert_close

from calm.core.chunks import IGNORED_LABEL
from calm.core.random import generator_of_row
from calm.models.calm import CalmForCausalLM
from calm.models.generation.sampler_registry import sampler_from
from calm.models.thoughts import (
    THOUGHT,
    Thinking,
    Thoughts,
    read_positions,
    rescale,
    thoughts_of,
)
from calm.models.tokens import LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("norms_in_double_precision")
# Two rows that think at different positions, the second less often and after padding.
IS_THOUGHT = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]]).bool()
MASK = torch.tensor([[1] * 8, [0, 1, 1, 1, 1, 1, 1, 1]])
POSITIONS = (MASK.cumsum(-1) - 1).clamp_min(0)


def calm(head: str = "sequential", chunk_size: int = 2) -> CalmForCausalLM:
    torch.manual_seed(0)
    return tiny_model(chunk_size, head_config={"head_type": head}).double()


def uncached_states(model, inputs_BCD, scale=None):
    """States from uncached passes over all positions, each of which fills in one more thought."""
    known = inputs_BCD
    for position in range(IS_THOUGHT.shape[1] + 1):
        states = model(inputs_embeds=known, attention_mask=MASK, position_ids=POSITIONS, use_cache=False)
        states = states.last_hidden_state
        if position == IS_THOUGHT.shape[1]:
            return states
        if IS_THOUGHT[:, position].any():
            thought = rescale(states[:, position - 1], scale)
            filled = torch.where(IS_THOUGHT[:, position, None], thought, known[:, position])
            known = torch.cat([known[:, :position], filled[:, None], known[:, position + 1 :]], dim=1)
    raise AssertionError


@pytest.mark.parametrize("scale", [None, 0.7])
def test_cached_passes_equal_uncached_passes(scale):
    model = tiny_llama().model
    inputs = torch.randn(2, 8, 16, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    gradients = []
    for mode in ("cached", "uncached"):
        leaf = inputs.clone().requires_grad_()
        if mode == "cached":
            states = read_positions(model, leaf, MASK, POSITIONS, None, Thinking(IS_THOUGHT, scale))
        else:
            states = uncached_states(model, leaf, scale)
        model.zero_grad()
        states[MASK.bool()].pow(3).sum().backward()
        gradients.append(
            [states[MASK.bool()], leaf.grad, *(weight.grad for weight in model.layers.parameters())]
        )
    for cached, uncached in zip(*gradients, strict=True):
        assert_close(cached, uncached, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.double, torch.bfloat16, torch.float16])
def test_rescale_sets_the_root_mean_square(dtype):
    """In half precision, the squares of large states would overflow."""
    states = (torch.randn(3, 64, dtype=torch.double) * torch.tensor([[0.01], [1.0], [400.0]])).to(dtype)
    rms = states.double().pow(2).mean(-1, keepdim=True).sqrt()
    assert_close(rescale(states, 0.7), (states.double() * 0.7 / rms).to(dtype), rtol=1e-7, atol=0)
    assert torch.equal(rescale(torch.zeros(1, 4, dtype=dtype), 0.7), torch.zeros(1, 4, dtype=dtype))


class Stub(torch.nn.Module):
    """A backbone whose state is a matrix times its input, whatever came before."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix, self.config, self.calls = matrix, tiny_llama().config, 0

    def forward(self, inputs_embeds, past_key_values=None, cache=None, **_):
        self.calls += 1
        return transformers.modeling_outputs.BaseModelOutputWithPast(
            last_hidden_state=inputs_embeds @ self.matrix.T
        )


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_thoughts_of_a_linear_backbone_are_powers_of_its_matrix(number):
    """The state after n thoughts is A^(n + 1) times the marker's input, in n + 1 passes."""
    matrix = torch.randn(3, 3, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    stub = Stub(matrix)
    inputs = torch.randn(1, 2 + number + 1, 3, dtype=torch.double)
    is_thought = torch.tensor([[False, False, *[True] * number, False]])
    states = read_positions(stub, inputs, None, None, None, Thinking(is_thought))
    expected = torch.linalg.matrix_power(matrix, number + 1) @ inputs[0, 1]
    assert_close(states[0, 1 + number], expected)
    assert_close(states[0, -1], matrix @ inputs[0, -1])
    assert stub.calls == number + 1


def test_row_that_begins_with_a_thought_needs_an_earlier_state():
    model = tiny_llama().model
    inputs = torch.randn(1, 3, 16, dtype=torch.double)
    thinking = Thinking(torch.tensor([[True, False, False]]))
    with pytest.raises(ValueError, match="cannot begin with a thought"):
        read_positions(model, inputs, None, None, None, thinking)
    before = torch.randn(1, 16, dtype=torch.double)
    states = read_positions(model, inputs, None, None, None, thinking._replace(before_BD=before))
    assert_close(states, read_positions(model, torch.cat([before[:, None], inputs[:, 1:]], dim=1)))


def test_gradients_through_thoughts_match_central_differences():
    model = tiny_llama().model
    direction = torch.randn(2, 8, 16, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    leaf = torch.randn(2, 8, 16, dtype=torch.double).requires_grad_()

    def value(inputs):
        states = read_positions(model, inputs, MASK, POSITIONS, None, Thinking(IS_THOUGHT))
        return states[:, -1].pow(2).sum()

    value(leaf).backward()
    step = 1e-6
    with torch.no_grad():
        difference = (value(leaf + step * direction) - value(leaf - step * direction)) / (2 * step)
    assert_close((leaf.grad * direction).sum(), difference, rtol=1e-6, atol=1e-8)


def test_thoughts_are_not_detached(monkeypatch):
    """The last state depends on the question through the thoughts, too."""
    model = tiny_llama().model
    inputs = torch.randn(2, 8, 16, dtype=torch.double)
    gradients = []
    for detach in (False, True):
        if detach:
            monkeypatch.setattr("calm.models.thoughts.rescale", lambda states, scale: states.detach())
        leaf = inputs.clone().requires_grad_()
        read_positions(model, leaf, MASK, POSITIONS, None, Thinking(IS_THOUGHT))[:, -1].sum().backward()
        gradients.append(leaf.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3
    assert torch.all(gradients[0][IS_THOUGHT] == 0)


def test_gradient_checkpointing_is_refused():
    for model in (tiny_llama(), calm()):
        model.gradient_checkpointing_enable()
        model.train()
        ids = torch.full((2, 8 * getattr(model.config, "chunk_size", 1)), 5)
        with pytest.raises(ValueError, match="gradient checkpointing"):
            model(ids, is_thought=IS_THOUGHT)


# Whole models.


def prompts(model):
    """Prompts of several lengths in a batch, padded in front."""
    rows = [[1, 7, 8, 9, 10, 11], [1, 5, 6], [1, 30, 31, 32, 33]]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return rows, ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


HEADS = ["sequential", "energy", "flow", "categorical_flow"]


def generate(model, ids, **arguments):
    settings = (
        {"do_sample": False} if isinstance(model, LlamaForCausalLM) else {"temperature": 1.0, "seed": 3}
    )
    return model.generate(ids, max_new_tokens=8, **settings | arguments)


@pytest.mark.parametrize("model", [tiny_llama, calm], ids=["llama", "calm"])
def test_zero_thoughts_are_the_ordinary_model(model):
    model = model()
    _, ids, mask = prompts(model)
    assert torch.equal(
        generate(model, ids, attention_mask=mask, num_thoughts=0), generate(model, ids, attention_mask=mask)
    )
    doubled = [id_ for id_ in ids[0].tolist() for _ in range(2)]
    batch = torch.tensor([doubled])
    plain, thinking = model(batch), model(batch, is_thought=None)
    name = "logits" if "logits" in plain else "last_hidden_state"
    assert torch.equal(plain[name], thinking[name])


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
@pytest.mark.parametrize("head", HEADS)
def test_text_of_a_row_does_not_depend_on_the_other_rows(head, chunk_size):
    model = calm(head, chunk_size)
    rows, ids, mask = prompts(model)
    together = generate(model, ids, attention_mask=mask, num_thoughts=3)
    for row, tokens in zip(together[:, ids.shape[1] :].tolist(), rows, strict=True):
        alone = generate(model, torch.tensor([tokens]), num_thoughts=3)[0, len(tokens) :].tolist()
        assert row[: len(alone)] == alone
        assert all(token == 0 for token in row[len(alone) :])


def test_llama_text_of_a_row_does_not_depend_on_the_other_rows():
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    rows, ids, mask = prompts(model)
    together = generate(model, ids, attention_mask=mask, num_thoughts=3)
    assert together.shape == (3, 6 + 8) and torch.equal(together[:, :6], ids)
    for row, tokens in zip(together[:, 6:], rows, strict=True):
        assert torch.equal(row, generate(model, torch.tensor([tokens]), num_thoughts=3)[0, len(tokens) :])


@pytest.mark.parametrize("mode", ["lean", "static", "uncached"])
def test_first_chunk_equals_an_uncached_pass_with_any_cache(mode):
    model = calm()
    ids = torch.tensor([[1, 7, 8, 9, 10]])
    arguments = {"static": {"cache_implementation": "static"}, "uncached": {"use_cache": False}}.get(mode, {})
    text = generate(model, ids, num_thoughts=2, **arguments)
    # By hand: one pass over the padded prompt and two thoughts between markers.
    tokens = [0, 1, 7, 8, 9, 10]
    thoughts = Thoughts(2, 1, 2).tokens(2)
    batch = torch.tensor([[*tokens, *thoughts]])
    mask = torch.ones_like(batch)
    state = model(batch, attention_mask=mask, is_thought=batch[:, ::2] == THOUGHT).last_hidden_state[:, -1]
    generator = generator_of_row(3, ids[0].tolist(), 0, torch.device("cpu"))
    chunk = model.sample_chunks(state, sampler_from(temperature=1.0), [generator]).chunks_RK
    assert text[0, 5:7].tolist() == chunk[0].tolist()


def loss_of(model, is_thought):
    size = getattr(model.config, "chunk_size", 1)
    ids = torch.tensor([[7 + index % 20 for index in range(8 * size)]] * 2)
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[:, 6 * size :] = ids[:, 6 * size :]
    arguments = {"attention_mask": MASK.repeat_interleave(size, 1), "position_ids": POSITIONS}
    noise = {} if size == 1 else {"generator": torch.Generator().manual_seed(5)}
    return model(ids, labels=labels, is_thought=is_thought, **arguments, **noise).loss


@pytest.mark.parametrize("model", [tiny_llama, calm], ids=["llama", "sequential"])
def test_gradient_of_the_loss_matches_central_differences(model):
    model = model()
    loss = loss_of(model, IS_THOUGHT)
    backbone = model.model if isinstance(model, LlamaForCausalLM) else model.backbone
    weight = backbone.layers[0].mlp.up_proj.weight
    loss.backward()
    direction, step = weight.grad / weight.grad.norm(), 1e-2  # Losses are in single precision.
    with torch.no_grad():
        weight += step * direction
        above = loss_of(model, IS_THOUGHT)
        weight -= 2 * step * direction
        below = loss_of(model, IS_THOUGHT)
    assert_close(float((weight.grad * direction).sum()), float(above - below) / (2 * step), rtol=5e-3, atol=0)


def test_loss_in_training_equals_that_in_evaluation():
    model = tiny_llama()
    expected = loss_of(model, IS_THOUGHT)
    assert_close(loss_of(model.train(), IS_THOUGHT), expected)


def test_cached_passes_without_thoughts_equal_a_single_pass():
    model = tiny_llama().model
    inputs = torch.randn(2, 8, 16, dtype=torch.double)
    single = read_positions(model, inputs, MASK, POSITIONS)
    cache = transformers.cache_utils.DynamicCache(config=model.config)
    parts = [
        read_positions(model, inputs[:, first:end], MASK[:, :end], POSITIONS[:, first:end], cache)
        for first, end in ((0, 3), (3, 4), (4, 8))
    ]
    assert_close(torch.cat(parts, dim=1)[MASK.bool()], single[MASK.bool()])


@pytest.mark.parametrize("model", [tiny_llama, calm], ids=["llama", "calm"])
def test_states_are_rescaled_as_configured(model):
    model = model()
    model.config.thoughts = Thoughts(3, 1, 2, scale=0.7).as_dict()
    ids = torch.arange(5, 21).view(2, 8)
    if isinstance(model, LlamaForCausalLM):
        states = model.think(ids, IS_THOUGHT, MASK, POSITIONS)
        backbone, inputs = model.model, model.model.embed_tokens(ids)
    else:
        ids, mask = ids.repeat_interleave(2, 1), MASK.repeat_interleave(2, 1)
        states = model(ids, attention_mask=mask, position_ids=POSITIONS, is_thought=IS_THOUGHT)
        states = states.last_hidden_state[..., : model.config.hidden_size]
        backbone, inputs = model.backbone, model.embed_chunks(ids.unflatten(1, (8, 2)))
    expected = uncached_states(backbone, inputs, 0.7)
    assert_close(states[MASK.bool()], expected[MASK.bool()], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("model", [tiny_llama, calm], ids=["llama", "calm"])
def test_pauses_repeat_the_first_marker(model):
    model, ids = model(), torch.tensor([[1, 5, 6, 7]])
    thoughts = Thoughts(3, 1, 2, "pause")
    size = getattr(model.config, "chunk_size", 1)
    assert thoughts.tokens(size) == [1] * 4 * size + [2] * size
    spelled_out = torch.tensor([ids[0].tolist() + thoughts.tokens(size)])
    texts = []
    for prompt, entry in ((ids, thoughts.as_dict()), (spelled_out, None)):
        model.config.thoughts = entry
        draws = {} if size == 1 else {"seed": None, "generator": torch.Generator().manual_seed(5)}
        texts.append(generate(model, prompt, **draws)[0, prompt.shape[1] :])
    assert torch.equal(*texts)


# Configurations and arguments.


def test_plain_llama_loads_a_folder_with_thoughts(tmp_path):
    model = tiny_llama()
    model.config.thoughts = Thoughts(2, 1, 2, scale=0.5).as_dict()
    model.save_pretrained(tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.double)
    ids = torch.tensor([[1, 7, 8, 9]])
    assert torch.equal(plain(ids).logits, model(ids).logits)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.double)
    assert thoughts_of(loaded.config) == Thoughts(2, 1, 2, scale=0.5)
    text = generate(loaded, ids)
    assert torch.equal(text, generate(loaded, ids, num_thoughts=2))
    assert torch.equal(generate(loaded, ids, num_thoughts=0), generate(tiny_llama(), ids))


def test_calm_uses_as_many_thoughts_as_in_training(tmp_path):
    model = calm()
    model.config.thoughts = Thoughts(2, 1, 2).as_dict()
    model.save_pretrained(tmp_path)
    loaded = CalmForCausalLM.from_pretrained(tmp_path, dtype=torch.double)
    ids = torch.tensor([[1, 7, 8, 9]])
    assert torch.equal(generate(loaded, ids), generate(model, ids, num_thoughts=2))
    assert torch.equal(generate(loaded, ids, num_thoughts=0), generate(calm(), ids))


def test_thoughts_count_towards_the_context():
    model = tiny_llama(max_position_embeddings=16)
    message = (
        "has 3 tokens, thoughts and their markers take 8, and 8 new tokens are requested, more than the "
        "context of 16"
    )
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=8, num_thoughts=6)
    model = calm()
    longest = model.config.backbone.max_position_embeddings
    with pytest.raises(ValueError, match="context of"):
        generate(model, torch.tensor([[1, 5, 6]]), num_thoughts=longest)


def test_beam_search_is_refused():
    with pytest.raises(ValueError, match="num_beams"):
        tiny_llama().generate(torch.tensor([[1, 5]]), num_beams=2, num_thoughts=1)


def test_streamers_do_not_see_thoughts():
    for model in (tiny_llama(), calm()):
        recorder = RecordingStreamer()
        text = generate(model, torch.tensor([[1, 5, 6]]), num_thoughts=3, streamer=recorder)
        assert recorder.tokens == text[0].tolist() and recorder.has_ended and THOUGHT not in recorder.tokens
