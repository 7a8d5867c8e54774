"""Learning from a teacher's distributions: against torch's divergence of full scores."""

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

ROWS, SIZE, TOLD_SIZE, VOCABULARY = 29, 6, 5, 40
WEIGHTS = (torch.arange(ROWS) % 4) / 3  # From none to all.


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of seven rows; the last one has a single row."""
    monkeypatch.setattr(module, "_FEWEST_ROWS", 7)
    monkeypatch.setattr(module, "_SCORES_IN_PART", 1)
    monkeypatch.setattr(module, "_SCORES_AT_ONCE", 7 * VOCABULARY)


def learner(dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vectors = 2 * torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64)
    table = torch.randn(VOCABULARY, SIZE, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    return vectors.to(dtype).requires_grad_(), table.to(dtype).requires_grad_(), targets


def soft_targets(
    dtype=torch.float32, tokens=VOCABULARY, has_bias=True, weights=WEIGHTS, temperature=1.0
) -> SoftTargets:
    generator = torch.Generator().manual_seed(1)
    states = 2 * torch.randn(ROWS, TOLD_SIZE, generator=generator, dtype=torch.float64)
    table = torch.randn(tokens, TOLD_SIZE, generator=generator, dtype=torch.float64)
    bias = torch.randn(tokens, generator=generator, dtype=torch.float64).to(dtype) if has_bias else None
    return SoftTargets(states.to(dtype), table.to(dtype), bias, weights.to(dtype), temperature)


def plain(vectors: Tensor, table: Tensor, targets: Tensor, told: SoftTargets) -> Tensor:
    """The same with all scores, by torch's own divergence."""
    scores, of_teacher = F.linear(vectors, table), F.linear(told.states_MY, told.table_UY, told.bias_U)
    of_teacher = of_teacher[:, : scores.shape[1]]
    missing = scores.shape[1] - of_teacher.shape[1]
    of_teacher = F.pad(of_teacher, (0, missing), value=-1e9)
    log_p, log_q = ((one / told.temperature).log_softmax(-1) for one in (scores, of_teacher))
    far = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    own = F.cross_entropy(scores, targets, reduction="none")
    return (1 - told.weights_M) * own + told.weights_M * told.temperature**2 * far


def of_some(losses: Tensor) -> Tensor:
    """Rows weigh more or less, and some nothing."""
    return (losses * (torch.arange(len(losses)) % 3)).sum()


def losses_and_gradients(way, told, reduce=torch.mean, dtype=torch.float32) -> list[Tensor]:
    vectors, table, targets = learner(dtype)
    losses = way(vectors, table, targets, told)
    reduce(losses).backward()
    return [losses.detach(), vectors.grad, table.grad]


@pytest.mark.parametrize("reduce", [torch.mean, of_some])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize(
    "tokens", [VOCABULARY, VOCABULARY + 3, VOCABULARY - 3], ids=["same", "more", "fewer"]
)
@pytest.mark.parametrize("as_gpu", [False, True], ids=["cpu", "gpu"])
def test_losses_and_gradients_are_those_of_torch(as_gpu, tokens, temperature, reduce):
    told = soft_targets(tokens=tokens, temperature=temperature, has_bias=tokens != VOCABULARY)
    with AsGpu(is_gpu=as_gpu):
        found = losses_and_gradients(distillation, told, reduce)
    assert_close(found, losses_and_gradients(plain, told, reduce))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_in_double_precision_are_differences_of_losses(temperature):
    vectors, table, targets = learner(torch.float64)
    told = soft_targets(torch.float64, temperature=temperature)

    def losses(*of: Tensor) -> Tensor:
        return distillation(*of, targets, told)

    assert torch.autograd.gradcheck(losses, (vectors, table), fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learner_that_is_its_teacher_has_nothing_to_learn(dtype, temperature):
    vectors, table, targets = learner(dtype)
    told = SoftTargets(vectors.detach(), table.detach(), None, torch.ones(ROWS), temperature)
    losses = distillation(vectors, table, targets, told)
    losses.sum().backward()
    assert not losses.any() and not vectors.grad.any() and not table.grad.any()


def test_without_weight_it_is_the_cross_entropy():
    vectors, table, targets = learner()
    losses = distillation(vectors, table, targets, soft_targets(weights=torch.zeros(ROWS), temperature=2.0))
    assert_close(losses, F.cross_entropy(F.linear(vectors, table), targets, reduction="none"))


def test_nothing_of_the_teacher_is_trained_and_without_gradients_there_are_none():
    told = soft_targets()
    of_teacher = [one.requires_grad_() for one in told[:3]]
    losses_and_gradients(distillation, told)
    assert all(one.grad is None for one in of_teacher)
    with torch.no_grad():
        assert not distillation(*learner(), told).requires_grad


def test_a_second_backward_pass_finds_the_same():
    vectors, table, targets = learner()
    loss = distillation(vectors, table, targets, soft_targets()).mean()
    loss.backward(retain_graph=True)
    first = vectors.grad.clone(), table.grad.clone()
    vectors.grad = table.grad = None
    loss.backward()
    assert_close((vectors.grad, table.grad), first, rtol=0, atol=0)


def test_scores_far_apart_are_finite():
    """Where a probability is 0 in float32, its logarithm is not looked for."""
    vectors, table, targets = learner()
    told = soft_targets()._replace(weights_M=torch.ones(ROWS))
    far = told._replace(states_MY=-1e4 * told.states_MY)
    found = distillation(1e4 * vectors, table, targets, far)
    assert found.isfinite().all()
    wide = [one.detach().double() for one in (1e4 * vectors, table)]
    wanted = plain(*wide, targets, SoftTargets(*(one.double() for one in far[:4])))
    assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_under_autocast_the_learner_is_rounded_and_the_teacher_is_not():
    told = soft_targets()
    with torch.autocast("cpu", torch.bfloat16):
        found = losses_and_gradients(distillation, told)
    assert [one.dtype for one in found] == [torch.float32] * 3
    vectors, table, targets = learner()
    rounded = F.linear(vectors.bfloat16(), table.bfloat16()).float()
    same = plain(rounded, torch.eye(VOCABULARY), targets, told)
    assert_close(found[0], same.detach())


def test_no_rows_have_no_loss():
    vectors, table, targets = (one[:0] if one.shape[0] == ROWS else one for one in learner())
    told = soft_targets()
    empty = told._replace(states_MY=told.states_MY[:0], weights_M=told.weights_M[:0])
    losses = distillation(vectors, table, targets, empty)
    losses.sum().backward()
    assert losses.shape == (0,)


def test_scores_of_all_rows_are_never_in_memory(monkeypatch):
    rows, vocabulary = 512, 300
    monkeypatch.setattr(module, "_FEWEST_ROWS", 16)
    vectors, table = torch.randn(rows, 8), torch.randn(vocabulary, 8)
    told = SoftTargets(torch.randn(rows, 4), torch.randn(vocabulary, 4), None, torch.ones(rows), 2.0)
    with AliveBytes() as alive:
        outputs = module._in_parts(vectors, table, torch.zeros(rows, dtype=torch.long), told)
    work = sum(alive.peak().values()) - sum(one.nbytes for one in outputs)
    assert work < 8 * 4 * 16 * vocabulary + table.nbytes + 4 * vectors.nbytes


def test_the_operator_keeps_the_rules_of_torch():
    """Fake tensors, compiled functions and gradients find what the operator itself does."""
    vectors, table, targets = learner()
    told = soft_targets()
    torch.library.opcheck(torch.ops.calm.distillation.default, (vectors, table, targets, *told))
    compiled = torch.compile(distillation, fullgraph=True, backend="aot_eager")
    assert_close(compiled(vectors, table, targets, told), distillation(vectors, table, targets, told))
    with FlopCounterMode(display=False) as counter:
        distillation(vectors, table, targets, told)
    assert counter.get_total_flops() == ROWS * VOCABULARY * (6 * SIZE + 2 * TOLD_SIZE)
