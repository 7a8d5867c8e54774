"""Memory per device by part, measured by running the real network and its optimizer on fake tensors."""

import functools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from calm.errors import InputError
from calm.planning.alive import GRADIENTS, WORKSPACE, AliveBytes, AssumeTrueMasks
from calm.planning.as_gpu import AsGpu
from calm.planning.stages import PlannedStage
from calm.training.optimizers import build_optimizer

Sharing = Literal["one process", "DDP", "FSDP"]
WEIGHTS, FROZEN, STATE = "weights", "frozen weights", "optimizer state"
BUCKETS, GATHERED, ACTIVATIONS, BATCH = "buckets", "gathered weights", "activations", "batch"
PARTS = (WEIGHTS, FROZEN, STATE, GRADIENTS, BUCKETS, GATHERED, ACTIVATIONS, BATCH, WORKSPACE)
"""Parts of a device's memory.

Buckets are DDP's copy of the gradients, which it all-reduces; gathered weights are the unsharded copies of
what FSDP shards, while they are needed. Activations are everything kept for the backward pass, including
autocast's bfloat16 copies of weights. Workspace is temporary memory within a pass or an optimizer step.
"""
Parts = dict[str, int]


@dataclass(frozen=True)
class Pass:
    """Bytes by part that a forward and backward pass take in addition to weights and optimizer state.

    Args:
        peak: At the peak, if there are no gradients before the pass.
        peak_without_gradients: At the moment when everything but gradients peaks.
    """

    peak: Parts
    peak_without_gradients: Parts


@dataclass(frozen=True)
class Update:
    """What an optimizer step takes.

    Args:
        state: Tensors of the optimizer state, each with the weight that it belongs to.
        workspace: Bytes of temporary memory.
        flops: FLOPs of its matrix products.
        matrix_bytes: Bytes of the weights that are updated as whole matrices, sharded or not.
    """

    state: list[tuple[Tensor, Tensor]]
    workspace: int
    flops: int
    matrix_bytes: int


class Footprint:
    """The memory that training a stage takes on a device.

    Args:
        stage: The stage.
        is_gpu: Whether the device is a GPU; otherwise a CPU.
    """

    def __init__(self, stage: PlannedStage, *, is_gpu: bool = True) -> None:
        self.stage, self._is_gpu = stage, is_gpu
        parameters = list(stage.network.parameters())
        self.trained = [weight for weight in parameters if weight.requires_grad]
        self.frozen = [weight for weight in parameters if not weight.requires_grad]
        self._pass_of = functools.cache(self._run)

    def parts(
        self,
        blocks: int,
        *,
        sharing: Sharing = "one process",
        devices: int = 1,
        is_summed: bool = False,
        checkpointing: bool | None = None,
    ) -> Parts:
        """Bytes per device by part, at the peak.

        Args:
            blocks: Blocks per microbatch.
            sharing: How the devices share the stage.
            devices: Number of devices.
            is_summed: Whether gradients of several microbatches are accumulated in a step.
            checkpointing: Whether activations are recomputed; None for the recipe's setting.
        """
        if checkpointing is None:
            checkpointing = self.stage.settings.gradient_checkpointing
        permanent, one_pass = self._permanent(sharing, devices), self._pass_of(blocks, checkpointing)
        moments = [permanent | moment for moment in self._moments(one_pass, sharing, devices, is_summed)]
        peak = max(moments, key=lambda moment: sum(moment.values()))
        return {part: peak[part] for part in PARTS if peak.get(part)}

    def _permanent(self, sharing: Sharing, devices: int) -> Parts:
        """Bytes by part that are held at all times."""
        shard = functools.partial(shard_bytes, devices=devices if sharing == "FSDP" else 1)
        buffers = bytes_of(self.stage.network.buffers())
        permanent = {
            WEIGHTS: sum(map(shard, self.trained)),
            FROZEN: sum(map(shard, self.frozen)) + buffers + self._teacher_bytes(),
            STATE: sum(
                shard(tensor) if tensor.shape == weight.shape else tensor.nbytes
                for tensor, weight in self.update.state
            ),
        }
        return permanent | {BUCKETS: bytes_of(self.trained)} if sharing == "DDP" else permanent

    def _teacher_bytes(self) -> int:
        """Bytes of the teacher, which is never sharded."""
        if self.stage.teacher is None:
            return 0
        network = self.stage.teacher.network
        return bytes_of(network.parameters()) + bytes_of(network.buffers())

    def _moments(self, one_pass: Pass, sharing: Sharing, devices: int, is_summed: bool) -> list[Parts]:
        """Further bytes by part, at each moment that may be the peak."""
        workspace, unsharded = self.update.workspace, bytes_of(self.trained)
        if sharing != "FSDP":
            during_pass = one_pass.peak
            if is_summed:
                during_pass = one_pass.peak_without_gradients | {GRADIENTS: unsharded}
            return [during_pass, {GRADIENTS: unsharded, WORKSPACE: workspace}]
        groups = self.groups
        sharded = sum(shard_bytes(weight, devices) for weight in self.trained)
        root = bytes_of(groups.root)
        # Weights gathered for a whole pass have unsharded gradients until its end. If gradients of several
        # microbatches accumulate, all weights do: they are reduce-scattered with the last microbatch.
        gradients = unsharded
        if not is_summed:
            gradients = sharded + bytes_of(w for w in groups.root if w.requires_grad)
        # The current layer, and the next one, which is prefetched.
        gathered = root + 2 * bytes_of(groups.layer)
        passes: list[Parts] = []
        for moment in (one_pass.peak, one_pass.peak_without_gradients):
            so_far = unsharded if is_summed else min(moment.get(GRADIENTS, 0), gradients)
            passes.append(moment | {GRADIENTS: so_far, GATHERED: gathered})
        embedding = bytes_of(groups.embedding)
        end_of_pass = {
            GRADIENTS: gradients,
            GATHERED: root + 2 * embedding,
            BATCH: one_pass.peak_without_gradients.get(BATCH, 0),
            WORKSPACE: 2 * embedding,  # Its gradient, and the reduce-scatter buffer.
        }
        if not self.update.matrix_bytes:
            workspace = math.ceil(workspace / devices)
        return [*passes, end_of_pass, {GRADIENTS: sharded, WORKSPACE: workspace}]

    @functools.cached_property
    def groups(self) -> "Groups":
        """The groups in which FSDP gathers weights."""
        return groups_of(self.stage)

    @functools.cached_property
    def update(self) -> Update:
        """What an optimizer step takes, from the second one on.

        Raises:
            InputError: If the optimizer depends on values, which fake tensors do not have.
        """
        training = self.stage.settings
        settings = training.optimizer
        with self.stage.fakes, AsGpu(is_gpu=self._is_gpu):
            optimizer = build_optimizer(self.stage.network, settings, training.precision)
            for weight in self.trained:
                weight.grad = torch.empty_like(weight)
            try:
                optimizer.step()
                with FlopCounterMode(display=False) as flops, AliveBytes() as alive:
                    nn.utils.clip_grad_norm_(self.trained, settings.max_grad_norm or math.inf)
                    optimizer.step()
            except (DataDependentOutputException, NotImplementedError) as error:
                raise InputError(
                    f"the optimizer '{settings.name}' depends on tensor values, which a plan does not have; "
                    "plan with muon or adamw."
                ) from error
            self.stage.network.zero_grad()
        state = [
            (leaf, weight)
            for weight, entry in optimizer.state.items()
            for leaf in tree_leaves(entry)
            if isinstance(leaf, Tensor)
        ]
        matrices = [w for group in optimizer.param_groups if group.get("use_muon") for w in group["params"]]
        return Update(state, sum(alive.peak().values()), flops.get_total_flops(), bytes_of(matrices))

    def _run(self, blocks: int, is_checkpointed: bool) -> Pass:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What is slow or deprecated matters in training, not in a plan.
            return self._pass(blocks, is_checkpointed)

    def _pass(self, blocks: int, is_checkpointed: bool) -> Pass:
        stage, network = self.stage, self.stage.network
        if is_checkpointed:
            network.gradient_checkpointing_enable()
        elif network.supports_gradient_checkpointing:
            network.gradient_checkpointing_disable()
        is_half = stage.settings.precision == "bf16"
        with stage.fakes, AsGpu(is_gpu=self._is_gpu), AliveBytes() as alive:

            def label_gradient(weight: Any) -> None:
                alive.label(weight.grad, GRADIENTS)

            hooks = [weight.register_post_accumulate_grad_hook(label_gradient) for weight in self.trained]
            network.train()
            batch = stage.batch(blocks)
            alive.label(batch, BATCH)
            with AssumeTrueMasks():
                with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
                    loss = stage.loss(batch)
                alive.label_rest(ACTIVATIONS)
                loss.backward()
            result = Pass(alive.peak(), alive.peak_without_gradients())
            network.zero_grad()
        for hook in hooks:
            hook.remove()
        return result


@dataclass(frozen=True)
class Groups:
    """The groups in which FSDP gathers weights.

    Args:
        layers: Layers, gathered one at a time.
        embedding: The input embedding, gathered when it is used.
        root: Everything else, gathered for a whole pass.
    """

    layers: list[list[nn.Parameter]]
    embedding: list[nn.Parameter]
    root: list[nn.Parameter]

    @property
    def layer(self) -> list[nn.Parameter]:
        """The largest layer."""
        return max(self.layers, key=bytes_of, default=[])


def has_tied_scores(config: PreTrainedConfig) -> bool:
    """Whether a CALM or a token-level model computes logits with its input embeddings."""
    return bool(getattr(config, "has_tied_scores", config.tie_word_embeddings))


def groups_of(stage: PlannedStage) -> Groups:
    """The groups of a stage's network, as accelerate makes them with `training.sharding`."""
    network, names = stage.network, set(stage.network._no_split_modules or [])
    layers = [
        list(module.parameters())
        for module in network.modules()
        if any(kind.__name__ in names for kind in type(module).__mro__)
    ]
    # If logits are computed with the embedding, it is needed until the end of the pass.
    embedding = [] if has_tied_scores(stage.config) else list(network.get_input_embeddings().parameters())
    inside = {id(weight) for group in (*layers, embedding) for weight in group}
    return Groups(layers, embedding, [w for w in network.parameters() if id(w) not in inside])


def shard_bytes(tensor: Tensor, devices: int = 1) -> int:
    """Bytes of the largest shard of a tensor whose first axis is divided among devices."""
    if not tensor.ndim:
        return tensor.nbytes
    return tensor.nbytes // len(tensor) * math.ceil(len(tensor) / devices)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Total bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def largest_that_fits(bytes_for: Callable[[int], int], limit: float, maximum: int) -> int:
    """The largest number up to `maximum` that fits in `limit` bytes, by interpolation; 0 if there is none.

    Args:
        bytes_for: Bytes that a number needs; increasing and nearly linear.
        limit: Available bytes.
        maximum: The largest useful number.
    """
    if bytes_for(1) > limit:
        return 0
    if bytes_for(maximum) <= limit:
        return maximum
    fits, fails = 1, maximum
    while fails - fits > 1:
        rise = (bytes_for(fails) - bytes_for(fits)) / (fails - fits)
        guess = fits + int((limit - bytes_for(fits)) / rise)
        guess = min(max(guess, fits + 1), fails - 1)
        fits, fails = (guess, fails) if bytes_for(guess) <= limit else (fits, guess)
    return fits
