"""The distillation loss and its gradients, against torch's KL divergence of full logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from calm.core import distillation as module
from calm.core.distillation import SoftTargets, distillation
from calm.planning.alive import AliveBytes
from calm.planning.as_gpu import AsGpu

ROWS, SIZE, TEACHER_SIZE, VOCABULARY = 29, 6, 5, 40
WEIGHTS = (torch.arange(ROWS) % 4) / 3  # The teacher's share, from 0 to 1.


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of seven rows; the last one has a single row."""
    monkeypatch.setattr(module, "_FEWEST_ROWS", 7)
    monkeypatch.setattr(module, "_LOGITS_IN_PART", 1)
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 7 * VOCABULARY)


def student_inputs(dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vectors = 2 * torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64)
    table = torch.randn(VOCABULARY, SIZE, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    return vectors.to(dtype).requires_grad_(), table.to(dtype).requires_grad_(), targets


def make_soft_targets(
    dtype=torch.float32, tokens=VOCABULARY, has_bias=True, weights=WEIGHTS, temperature=1.0
) -> SoftTargets:
    generator = torch.Generator().manual_seed(1)
    states = 2 * torch.randn(ROWS, TEACHER_SIZE, generator=generator, dtype=torch.float64)
    table = torch.randn(tokens, TEACHER_SIZE, generator=generator, dtype=torch.float64)
    bias = torch.randn(tokens, generator=generator, dtype=torch.float64).to(dtype) if has_bias else None
    return SoftTargets(states.to(dtype), table.to(dtype), bias, weights.to(dtype), temperature)


def reference(vectors: Tensor, table: Tensor, targets: Tensor, soft_targets: SoftTargets) -> Tensor:
    """The same from all logits, with torch's own divergence."""
    logits = F.linear(vectors, table)
    teacher_logits = F.linear(soft_targets.states_MY, soft_targets.table_UY, soft_targets.bias_U)
    teacher_logits = teacher_logits[:, : logits.shape[1]]
    missing = logits.shape[1] - teacher_logits.shape[1]
    teacher_logits = F.pad(teacher_logits, (0, missing), value=-1e9)
    weight, temperature = soft_targets.weights_M, soft_targets.temperature
    log_p, log_q = ((tensor / temperature).log_softmax(-1) for tensor in (logits, teacher_logits))
    divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    cross_entropy = F.cross_entropy(logits, targets, reduction="none")
    return (1 - weight) * cross_entropy + weight * temperature**2 * divergence


def weighted_sum(losses: Tensor) -> Tensor:
    """Rows have weights 0, 1 and 2."""
    return (losses * (torch.arange(len(losses)) % 3)).sum()


def losses_and_gradients(loss_fn, soft_targets, reduce=torch.mean, dtype=torch.float32) -> list[Tensor]:
    vectors, table, targets = student_inputs(dtype)
    losses = loss_fn(vectors, table, targets, soft_targets)
    reduce(losses).backward()
    return [losses.detach(), vectors.grad, table.grad]


@pytest.mark.parametrize("reduce", [torch.mean, weighted_sum])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize(
    "tokens", [VOCABULARY, VOCABULARY + 3, VOCABULARY - 3], ids=["same", "more", "fewer"]
)
@pytest.mark.parametrize("as_gpu", [False, True], ids=["cpu", "gpu"])
def test_losses_and_gradients_match_torch(as_gpu, tokens, temperature, reduce):
    soft_targets = make_soft_targets(tokens=tokens, temperature=temperature, has_bias=tokens != VOCABULARY)
    with AsGpu(is_gpu=as_gpu):
        actual = losses_and_gradients(distillation, soft_targets, reduce)
    assert_close(actual, losses_and_gradients(reference, soft_targets, reduce))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_pass_gradcheck_in_double_precision(temperature):
    vectors, table, targets = student_inputs(torch.float64)
    soft_targets = make_soft_targets(torch.float64, temperature=temperature)

    def losses(*weights: Tensor) -> Tensor:
        return distillation(*weights, targets, soft_targets)

    assert torch.autograd.gradcheck(losses, (vectors, table), fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_student_equal_to_its_teacher_has_no_loss_and_no_gradient(dtype, temperature):
    vectors, table, targets = student_inputs(dtype)
    soft_targets = SoftTargets(vectors.detach(), table.detach(), None, torch.ones(ROWS), temperature)
    losses = distillation(vectors, table, targets, soft_targets)
    losses.sum().backward()
    assert not losses.any() and not vectors.grad.any() and not table.grad.any()


def test_teacher_with_zero_weight_leaves_the_cross_entropy():
    vectors, table, targets = student_inputs()
    soft_targets = make_soft_targets(weights=torch.zeros(ROWS), temperature=2.0)
    losses = distillation(vectors, table, targets, soft_targets)
    assert_close(losses, F.cross_entropy(F.linear(vectors, table), targets, reduction="none"))


def test_teacher_gets_no_gradient():
    soft_targets = make_soft_targets()
    teacher_tensors = [tensor.requires_grad_() for tensor in soft_targets[:3]]
    losses_and_gradients(distillation, soft_targets)
    assert all(tensor.grad is None for tensor in teacher_tensors)


def test_no_grad_is_respected():
    soft_targets = make_soft_targets()
    for tensor in soft_targets[:3]:
        tensor.requires_grad_()
    with torch.no_grad():
        assert not distillation(*student_inputs(), soft_targets).requires_grad


def test_second_backward_pass_gives_the_same_gradients():
    vectors, table, targets = student_inputs()
    loss = distillation(vectors, table, targets, make_soft_targets()).mean()
    loss.backward(retain_graph=True)
    first = vectors.grad.clone(), table.grad.clone()
    vectors.grad = table.grad = None
    loss.backward()
    assert_close((vectors.grad, table.grad), first, rtol=0, atol=0)


def test_losses_of_extreme_logits_are_finite():
    """Some probabilities are 0 in float32, where their logarithm would be infinite."""
    vectors, table, targets = student_inputs()
    soft_targets = make_soft_targets()._replace(weights_M=torch.ones(ROWS))
    extreme = soft_targets._replace(states_MY=-1e4 * soft_targets.states_MY)
    actual = distillation(1e4 * vectors, table, targets, extreme)
    assert actual.isfinite().all()
    doubles = [tensor.detach().double() for tensor in (1e4 * vectors, table)]
    expected = reference(*doubles, targets, SoftTargets(*(tensor.double() for tensor in extreme[:4])))
    assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_autocast_rounds_the_student_but_not_the_teacher():
    soft_targets = make_soft_targets()
    with torch.autocast("cpu", torch.bfloat16):
        actual = losses_and_gradients(distillation, soft_targets)
    assert [tensor.dtype for tensor in actual] == [torch.float32] * 3
    vectors, table, targets = student_inputs()
    rounded = F.linear(vectors.bfloat16(), table.bfloat16()).float()
    expected = reference(rounded, torch.eye(VOCABULARY), targets, soft_targets)
    assert_close(actual[0], expected.detach())


def test_empty_batch_has_no_losses():
    vectors, table, targets = (
        tensor[:0] if tensor.shape[0] == ROWS else tensor for tensor in student_inputs()
    )
    soft_targets = make_soft_targets()
    empty = soft_targets._replace(states_MY=soft_targets.states_MY[:0], weights_M=soft_targets.weights_M[:0])
    losses = distillation(vectors, table, targets, empty)
    losses.sum().backward()
    assert losses.shape == (0,)


def test_logits_of_all_rows_are_never_in_memory_together(monkeypatch):
    rows, vocabulary = 512, 300
    monkeypatch.setattr(module, "_FEWEST_ROWS", 16)
    vectors, table = torch.randn(rows, 8), torch.randn(vocabulary, 8)
    soft_targets = SoftTargets(torch.randn(rows, 4), torch.randn(vocabulary, 4), None, torch.ones(rows), 2.0)
    with AliveBytes() as alive:
        outputs = module._in_parts(vectors, table, torch.zeros(rows, dtype=torch.long), soft_targets)
    work = sum(alive.peak().values()) - sum(tensor.nbytes for tensor in outputs)
    assert work < 8 * 4 * 16 * vocabulary + table.nbytes + 4 * vectors.nbytes


def test_operator_passes_opcheck_and_compiles():
    vectors, table, targets = student_inputs()
    soft_targets = make_soft_targets()
    torch.library.opcheck(torch.ops.calm.distillation.default, (vectors, table, targets, *soft_targets))
    compiled = torch.compile(distillation, fullgraph=True, backend="aot_eager")
    expected = distillation(vectors, table, targets, soft_targets)
    assert_close(compiled(vectors, table, targets, soft_targets), expected)


def test_flops_are_counted():
    vectors, table, targets = student_inputs()
    soft_targets = make_soft_targets()
    with FlopCounterMode(display=False) as counter:
        distillation(vectors, table, targets, soft_targets)
    assert counter.get_total_flops() == ROWS * VOCABULARY * (6 * SIZE + 2 * TEACHER_SIZE)
