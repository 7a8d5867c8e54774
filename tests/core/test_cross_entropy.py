"""Cross-entropy without all scores in memory, against torch's with them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from calm.core import cross_entropy as module
from calm.core.cross_entropy import cross_entropy
from calm.planning.alive import AliveBytes
from calm.planning.as_gpu import AsGpu

ROWS, SIZE, VOCABULARY = 151, 6, 40


@pytest.fixture(autouse=True, params=[1, 2, 3])
def small_parts(request, monkeypatch):
    """Parts of a few rows, shared by a number of cores; the last part cannot be shared by all."""
    monkeypatch.setattr("calm.core.cross_entropy._SCORES_IN_CACHE", VOCABULARY)
    monkeypatch.setattr("calm.core.cross_entropy.SCORES_AT_ONCE", 7 * VOCABULARY)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def inputs(has_bias: bool, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    vectors = 3 * torch.randn(rows, SIZE, generator=generator)
    table = torch.randn(VOCABULARY, SIZE, generator=generator)
    targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    bias = torch.randn(VOCABULARY, generator=generator) if has_bias else None
    return vectors, table, targets, bias


def plain(vectors: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    return F.cross_entropy(F.linear(vectors, table, bias).float(), targets, reduction="none")


def losses_and_gradients(function, has_bias=True, reduce=torch.mean, rows=ROWS) -> list[Tensor]:
    vectors, table, targets, bias = inputs(has_bias, rows)
    trained = [one.requires_grad_() for one in (vectors, table, bias) if one is not None]
    losses = function(vectors, table, targets, bias)
    reduce(losses).backward()
    return [losses.detach(), *(one.grad for one in trained)]


def of_some(losses: Tensor) -> Tensor:
    """Rows weigh more or less, and some nothing."""
    return (losses * (torch.arange(len(losses)) % 3)).sum()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, of_some])
def test_losses_and_gradients_are_those_of_torch(has_bias, reduce):
    found, expected = (losses_and_gradients(way, has_bias, reduce) for way in (cross_entropy, plain))
    assert_close(found, expected)


@pytest.mark.parametrize("rows", [SIZE - 1, SIZE, SIZE + 1])
def test_few_rows_take_the_way_of_torch(rows, monkeypatch):
    """Their scores are smaller than the table."""
    calls, real = [], module._in_parts
    monkeypatch.setattr(module, "_in_parts", lambda *own: calls.append(1) or real(*own))
    found, expected = (losses_and_gradients(way, rows=rows) for way in (cross_entropy, plain))
    assert_close(found, expected)
    assert len(calls) == (rows >= SIZE)


def test_rows_with_weights_of_their_own_are_not_multiplied_by_the_table_again():
    """Gradients by the vectors are those of the plain sum, times the weights."""
    vectors, table, targets, bias = inputs(has_bias=True)
    weights = torch.arange(ROWS) % 3.0
    flops = []
    for given in (None, weights):
        with FlopCounterMode(display=False) as counter:
            module._in_parts(vectors, table, targets, bias, given)
        flops.append(counter.get_total_flops())
    assert flops[1] < 0.7 * flops[0]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_the_cores(has_bias, dtype, monkeypatch):
    """Scores and probabilities of a part, and with a bias or in half precision a second table."""
    rows, size, vocabulary = 512, 256, 300
    vectors, table = torch.randn(rows, size).to(dtype), torch.randn(vocabulary, size).to(dtype)
    bias = torch.randn(vocabulary).to(dtype) if has_bias else None
    targets = torch.randint(0, vocabulary, (rows,))
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 64 * vocabulary)
    for cores in (1, 2, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
        with AliveBytes() as alive:
            outputs = module._in_parts(vectors, table, targets, bias)
        work = sum(alive.peak().values()) - sum(one.nbytes for one in outputs)
        scores, of_table = 4 * 64 * vocabulary, 4 * vocabulary * (size + 1)
        of_vectors = 4 * rows * (size + 1) if has_bias else 0
        assert work < 4 * scores + of_vectors + of_table * (2 * has_bias + (dtype == torch.bfloat16))


def test_on_a_gpu_scores_are_computed_in_parts():
    with AsGpu():
        found = losses_and_gradients(cross_entropy)
    assert_close(found, losses_and_gradients(plain))


def test_without_gradients():
    with torch.no_grad():
        found = cross_entropy(*inputs(has_bias=True))
    assert not found.requires_grad
    assert_close(found, plain(*inputs(has_bias=True)))


def test_only_what_is_trained_gets_a_gradient():
    vectors, table, targets, bias = inputs(has_bias=True)
    cross_entropy(vectors, table.requires_grad_(), targets, bias).sum().backward()
    expected = inputs(has_bias=True)[1].requires_grad_()
    plain(vectors, expected, targets, bias).sum().backward()
    assert vectors.grad is None and bias.grad is None
    assert_close(table.grad, expected.grad)


def test_a_second_backward_pass_finds_the_same():
    vectors, table, targets, bias = inputs(has_bias=True)
    loss = cross_entropy(vectors.requires_grad_(), table.requires_grad_(), targets, bias).mean()
    loss.backward(retain_graph=True)
    first = vectors.grad.clone(), table.grad.clone()
    vectors.grad = table.grad = None
    loss.backward()
    assert_close((vectors.grad, table.grad), first, rtol=0, atol=0)


def test_no_rows_have_no_loss():
    found, expected = (losses_and_gradients(way, rows=0, reduce=torch.sum) for way in (cross_entropy, plain))
    assert_close(found, expected)


def test_under_autocast_products_are_rounded_and_sums_are_not():
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (losses_and_gradients(way) for way in (cross_entropy, plain))
    assert [one.dtype for one in found] == [torch.float32] * 4
    assert_close(found[0], expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert (one - other).abs().max() < 2**-7 * other.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_other_types_get_gradients_of_theirs(dtype):
    vectors, table, targets, bias = inputs(has_bias=True)
    vectors, table, bias = (one.to(dtype).requires_grad_() for one in (vectors, table, bias))
    losses = cross_entropy(vectors, table, targets, bias)
    losses.mean().backward()
    assert losses.dtype == torch.float32
    assert_close(losses, plain(vectors, table, targets, bias))
    assert vectors.grad.dtype == table.grad.dtype == bias.grad.dtype == dtype


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_scores_far_apart(scale):
    """Where probabilities of targets are 0 in float32, losses are not infinite."""
    vectors, table, targets, _ = inputs(has_bias=False)
    found = cross_entropy((scale * vectors).requires_grad_(), table, targets)
    assert found.isfinite().all()
    assert_close(found.detach(), plain(scale * vectors, table, targets, None), rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_shows():
    vectors, table, targets, _ = inputs(has_bias=False)
    vectors[70, 0] = float("nan")
    losses = cross_entropy(vectors, table.requires_grad_(), targets)
    assert losses.isnan().nonzero().flatten().tolist() == [70]


@pytest.mark.parametrize("target", [-100, -1, VOCABULARY])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    vectors, table, targets, _ = inputs(has_bias=False)
    targets[3] = target
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy(vectors.requires_grad_(), table, targets)


def test_the_operators_keep_the_rules_of_torch():
    """Fake tensors, compiled functions and gradients find what the operator itself does."""
    vectors, table, targets, bias = inputs(has_bias=True)
    for one in (vectors, table, bias):
        one.requires_grad_()
    torch.library.opcheck(torch.ops.calm.cross_entropy.default, (vectors, table, targets, bias))
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    assert_close(compiled(vectors, table, targets, bias), cross_entropy(vectors, table, targets, bias))
