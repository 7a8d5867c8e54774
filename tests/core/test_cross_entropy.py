"""Cross-entropy without all logits in memory, against torch's own."""

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
    monkeypatch.setattr("calm.core.cross_entropy._LOGITS_IN_CACHE", VOCABULARY)
    monkeypatch.setattr("calm.core.cross_entropy.LOGITS_AT_ONCE", 7 * VOCABULARY)
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


def reference(vectors: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    return F.cross_entropy(F.linear(vectors, table, bias).float(), targets, reduction="none")


def losses_and_gradients(function, has_bias=True, reduce=torch.mean, rows=ROWS) -> list[Tensor]:
    vectors, table, targets, bias = inputs(has_bias, rows)
    trained = [tensor.requires_grad_() for tensor in (vectors, table, bias) if tensor is not None]
    losses = function(vectors, table, targets, bias)
    reduce(losses).backward()
    return [losses.detach(), *(tensor.grad for tensor in trained)]


def weighted_sum(losses: Tensor) -> Tensor:
    """Rows have weights 0, 1 and 2."""
    return (losses * (torch.arange(len(losses)) % 3)).sum()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, weighted_sum])
def test_losses_and_gradients_match_torch(has_bias, reduce):
    actual, expected = (
        losses_and_gradients(loss_fn, has_bias, reduce) for loss_fn in (cross_entropy, reference)
    )
    assert_close(actual, expected)


@pytest.mark.parametrize("rows", [SIZE - 1, SIZE, SIZE + 1])
def test_few_rows_are_left_to_torch(rows, monkeypatch):
    """With fewer rows than features, the logits are smaller than the table."""
    calls, real = [], module._in_parts
    monkeypatch.setattr(module, "_in_parts", lambda *args: calls.append(1) or real(*args))
    actual, expected = (losses_and_gradients(loss_fn, rows=rows) for loss_fn in (cross_entropy, reference))
    assert_close(actual, expected)
    assert len(calls) == (rows >= SIZE)


def test_weighting_rows_skips_the_gradient_of_the_vectors():
    """The gradient of the vectors is that of the unweighted sum, times the weights."""
    vectors, table, targets, bias = inputs(has_bias=True)
    weights = torch.arange(ROWS) % 3.0
    flops = []
    for row_weights in (None, weights):
        with FlopCounterMode(display=False) as counter:
            module._in_parts(vectors, table, bias, targets, row_weights)
        flops.append(counter.get_total_flops())
    assert flops[1] < 0.7 * flops[0]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_the_number_of_cores(has_bias, dtype, monkeypatch):
    """It holds logits and probabilities of a part, and a second table with a bias or in half precision."""
    rows, size, vocabulary = 512, 256, 300
    vectors, table = torch.randn(rows, size).to(dtype), torch.randn(vocabulary, size).to(dtype)
    bias = torch.randn(vocabulary).to(dtype) if has_bias else None
    targets = torch.randint(0, vocabulary, (rows,))
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 64 * vocabulary)
    for cores in (1, 2, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
        with AliveBytes() as alive:
            outputs = module._in_parts(vectors, table, bias, targets)
        work = sum(alive.peak().values()) - sum(tensor.nbytes for tensor in outputs)
        logits_bytes, table_bytes = 4 * 64 * vocabulary, 4 * vocabulary * (size + 1)
        vectors_bytes = 4 * rows * (size + 1) if has_bias else 0
        assert work < 4 * logits_bytes + vectors_bytes + table_bytes * (
            2 * has_bias + (dtype == torch.bfloat16)
        )


def test_losses_and_gradients_match_torch_on_a_gpu():
    with AsGpu():
        actual = losses_and_gradients(cross_entropy)
    assert_close(actual, losses_and_gradients(reference))


def test_no_grad_is_respected():
    with torch.no_grad():
        actual = cross_entropy(*inputs(has_bias=True))
    assert not actual.requires_grad
    assert_close(actual, reference(*inputs(has_bias=True)))


def test_only_trained_tensors_get_a_gradient():
    vectors, table, targets, bias = inputs(has_bias=True)
    cross_entropy(vectors, table.requires_grad_(), targets, bias).sum().backward()
    expected = inputs(has_bias=True)[1].requires_grad_()
    reference(vectors, expected, targets, bias).sum().backward()
    assert vectors.grad is None and bias.grad is None
    assert_close(table.grad, expected.grad)


def test_second_backward_pass_gives_the_same_gradients():
    vectors, table, targets, bias = inputs(has_bias=True)
    loss = cross_entropy(vectors.requires_grad_(), table.requires_grad_(), targets, bias).mean()
    loss.backward(retain_graph=True)
    first = vectors.grad.clone(), table.grad.clone()
    vectors.grad = table.grad = None
    loss.backward()
    assert_close((vectors.grad, table.grad), first, rtol=0, atol=0)


def test_empty_batch_has_no_losses():
    actual, expected = (
        losses_and_gradients(loss_fn, rows=0, reduce=torch.sum) for loss_fn in (cross_entropy, reference)
    )
    assert_close(actual, expected)


def test_autocast_rounds_products_but_not_sums():
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = (losses_and_gradients(loss_fn) for loss_fn in (cross_entropy, reference))
    assert [tensor.dtype for tensor in actual] == [torch.float32] * 4
    assert_close(actual[0], expected[0])
    for tensor, reference_tensor in zip(actual[1:], expected[1:], strict=True):
        assert (tensor - reference_tensor).abs().max() < 2**-7 * reference_tensor.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradients_have_the_dtype_of_the_weights(dtype):
    vectors, table, targets, bias = inputs(has_bias=True)
    vectors, table, bias = (tensor.to(dtype).requires_grad_() for tensor in (vectors, table, bias))
    losses = cross_entropy(vectors, table, targets, bias)
    losses.mean().backward()
    assert losses.dtype == torch.float32
    assert_close(losses, reference(vectors, table, targets, bias))
    assert vectors.grad.dtype == table.grad.dtype == bias.grad.dtype == dtype


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_losses_of_extreme_logits_are_finite(scale):
    """Some targets have probability 0 in float32, where its logarithm would be infinite."""
    vectors, table, targets, _ = inputs(has_bias=False)
    actual = cross_entropy((scale * vectors).requires_grad_(), table, targets)
    assert actual.isfinite().all()
    assert_close(actual.detach(), reference(scale * vectors, table, targets, None), rtol=1e-5, atol=1e-5)


def test_nan_in_a_row_makes_only_its_loss_nan():
    vectors, table, targets, _ = inputs(has_bias=False)
    vectors[70, 0] = float("nan")
    losses = cross_entropy(vectors, table.requires_grad_(), targets)
    assert losses.isnan().nonzero().flatten().tolist() == [70]


@pytest.mark.parametrize("target", [-100, -1, VOCABULARY])
def test_target_outside_the_vocabulary_is_an_error(target):
    vectors, table, targets, _ = inputs(has_bias=False)
    targets[3] = target
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy(vectors.requires_grad_(), table, targets)


def test_operator_passes_opcheck_and_compiles():
    vectors, table, targets, bias = inputs(has_bias=True)
    for tensor in (vectors, table, bias):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.calm.cross_entropy.default, (vectors, table, bias, targets))
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    assert_close(compiled(vectors, table, targets, bias), cross_entropy(vectors, table, targets, bias))
