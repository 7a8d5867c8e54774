"""Recipe -> the networks that it trains, as fake tensors: shapes and types without memory."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from calm.data.chunking import check_block_size
from calm.errors import InputError, reason_of
from calm.models.autoencoder import CalmAutoencoder
from calm.models.configuration import CalmConfig
from calm.models.hyperparameters import chunk_size_of
from calm.models.loading import load_config
from calm.models.missing import check_model_exists
from calm.models.shipped import folder_of
from calm.models.tokens import LlamaForCausalLM
from calm.training.adapters import with_adapters
from calm.training.build import model_config
from calm.training.check import check_chunk_size, check_steps
from calm.training.continuing import with_inherited_parts
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.ranges import check_ranges
from calm.training.recipe import Recipe, TrainingSettings
from calm.training.sharding import check_sharding
from calm.training.teacher import Teacher, check_teacher, layer_of, teacher_config

# For packed blocks, transformers inspects the positions and skips the mask. The values of fake positions are
# unknown, so this attention never has a mask.
_WITHOUT_MASK = "sdpa_without_mask"
AttentionInterface.register(_WITHOUT_MASK, sdpa_attention_forward)
AttentionMaskInterface.register(_WITHOUT_MASK, lambda **_: None)


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a recipe, whose network is converted to fake tensors: shapes and dtypes without memory.

    Args:
        name: What is trained.
        network: The network, on the meta device.
        settings: How it is trained.
        context: Tokens of a block.
        is_packed: Whether blocks are packed, so that attention needs no mask beyond the causal one.
        can_be_sharded: Whether it can be sharded over processes.
        is_sharded: Whether the recipe asks for sharding.
        adapted: The `peft.PeftModel` around the network, if adapters are trained.
        teacher: The teacher to distill from, if any; replicated on every device.
        fakes: The `FakeTensorMode` of its tensors; all work on them must run inside it.
    """

    name: str
    network: PreTrainedModel
    settings: TrainingSettings
    context: int
    is_packed: bool
    can_be_sharded: bool = False
    is_sharded: bool = False
    adapted: Any = None
    teacher: Teacher | None = None
    fakes: FakeTensorMode = field(default_factory=FakeTensorMode)

    def __post_init__(self) -> None:
        for network in (self.network, *([] if self.teacher is None else [self.teacher.network])):
            to_fakes(network, self.fakes)
            if self.is_packed and network.config._attn_implementation == "sdpa":
                network.set_attn_implementation(_WITHOUT_MASK)

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the network."""
        return self.network.config

    @property
    def chunk_size(self) -> int:
        """Tokens per position."""
        return chunk_size_of(self.config)

    def batch(self, blocks: int) -> dict[str, Any]:
        """The network's inputs in training: a batch of blocks in which every chunk is a target.

        Args:
            blocks: Number of blocks in the batch.
        """
        chunks = self.context // self.chunk_size
        batch: dict[str, Any] = {
            "input_ids": torch.zeros(blocks, self.context, dtype=torch.long),
            "labels": torch.zeros(blocks, self.context, dtype=torch.long),
        }
        if isinstance(self.network, CalmAutoencoder):
            chunks_CK = torch.zeros(blocks * chunks, self.chunk_size, dtype=torch.long)
            return batch | {"noise": self.network.draw_noise(chunks_CK)}
        if not self.is_packed:
            batch["position_ids"] = torch.arange(chunks).expand(blocks, chunks).clone()
        if isinstance(self.config, CalmConfig):
            model: Any = self.network
            return batch | {"noise": model.head.draw_noise(blocks * (chunks - 1))}
        return batch | {"use_cache": False}

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The loss of a batch."""
        network: nn.Module = self.network if self.adapted is None else self.adapted
        if self.teacher is not None:
            batch = batch | {"teacher_output": self.teacher.output(**batch)}
        loss: Tensor = network(**batch).loss
        return loss


def stages_of(
    recipe: Recipe | FinetuningRecipe, devices: int = 1, vocab_size: int | None = None
) -> list[PlannedStage]:
    """The stages of a recipe.

    Args:
        recipe: The recipe. It need not name any text.
        devices: Number of processes that share a step.
        vocab_size: Vocabulary size, if the recipe's tokenizer is not available here.

    Raises:
        InputError: If the recipe is invalid or does not make a model, or if its steps cannot be divided among
            the devices.
    """
    check_ranges(recipe)
    if isinstance(recipe, FinetuningRecipe):
        return [_finetuning(recipe, devices)]
    recipe = with_inherited_parts(recipe)
    check_block_size(recipe.data.context, recipe.chunk_size)
    check_chunk_size(recipe)
    if recipe.language_model.sharded:
        check_sharding(recipe)
    config = model_config(_with_known_attention(recipe), vocab_size)
    shared: dict[str, Any] = {"context": recipe.data.context, "is_packed": recipe.data.layout == "packed"}
    stages = []
    if recipe.trains_autoencoder and isinstance(config, CalmConfig):
        settings = _resolved(
            recipe.autoencoder.training, "autoencoder.training", recipe.data.context, devices
        )
        with torch.device("meta"):
            autoencoder = CalmAutoencoder(config.autoencoder)
        stages.append(PlannedStage("autoencoder", autoencoder, settings, **shared))
    settings = _resolved(
        recipe.language_model.training, "language_model.training", recipe.data.context, devices
    )
    sharded: dict[str, Any] = {"can_be_sharded": True, "is_sharded": recipe.language_model.sharded}
    is_new = recipe.language_model.init_from is None or recipe.language_model.teacher.is_used
    network = network_of(config, is_new=is_new)
    teacher = _teacher_of(recipe, network, settings)
    stages.append(PlannedStage("language model", network, settings, teacher=teacher, **sharded, **shared))
    return stages


def _teacher_of(recipe: Recipe, network: PreTrainedModel, settings: TrainingSettings) -> Teacher | None:
    """The recipe's teacher, on the meta device, if it has one."""
    check_teacher(recipe, network)
    if (config := teacher_config(recipe)) is None:
        return None
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    teacher = nn.Module.to(network_of(config), dtype).eval()
    return Teacher(
        teacher.requires_grad_(False),
        recipe.language_model.teacher,
        recipe.chunk_size,
        layer_of(recipe, config),
    )


def _finetuning(recipe: FinetuningRecipe, devices: int) -> PlannedStage:
    if not recipe.model:
        raise InputError('the recipe names no model to fine-tune; pass --settings \'{"model": "FOLDER"}\'.')
    check_model_exists(recipe.model)
    network = network_of(load_config(Path(folder_of(recipe.model))))
    context = recipe.examples.context
    check_block_size(context, chunk_size_of(network.config))
    settings = _resolved(recipe.training, "training", context, devices)
    adapted = None
    if recipe.lora.rank:
        with torch.device("meta"):
            adapted = with_adapters(network, recipe.lora, recipe.model)
    return PlannedStage("fine-tuning", network, settings, context, is_packed=False, adapted=adapted)


def network_of(config: PreTrainedConfig, *, is_new: bool = False) -> PreTrainedModel:
    """Build a network on the meta device.

    Args:
        config: Its configuration.
        is_new: Whether training creates it rather than loading it.

    Raises:
        InputError: If the configuration is not valid for a model.
    """
    try:
        with torch.device("meta"):
            if is_new and isinstance(config, LlamaConfig):
                return LlamaForCausalLM(config)
            network: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # Model classes can raise anything.
        raise InputError(f"the recipe does not define a valid model: {reason_of(error)}") from error
    return network


def to_fakes(network: nn.Module, fakes: FakeTensorMode) -> None:
    """Replace the meta tensors of a network by fake tensors that report being on a CPU.

    On the meta device, attention would run different operations, and keep different tensors, than on any real
    device.
    """
    replacements: dict[int, Any] = {}  # Shared tensors stay shared.

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in replacements:
            new: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            replacements[id(tensor)] = new
        return replacements[id(tensor)]

    with fakes:
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: fake(old) for name, old in tensors.items() if old is not None})


def _with_known_attention(recipe: Recipe) -> Recipe:
    """Replace attention of other, perhaps missing, packages by sdpa, which uses as much memory."""
    if recipe.language_model.attention == "eager":
        return recipe
    return dataclasses.replace(
        recipe, language_model=dataclasses.replace(recipe.language_model, attention="sdpa")
    )


def _resolved(settings: TrainingSettings, name: str, context: int, devices: int) -> TrainingSettings:
    """Check the training settings, and replace precision "auto" by what it would be on a GPU."""
    check_steps(settings, name, context, devices)
    return dataclasses.replace(settings, precision="bf16") if settings.precision == "auto" else settings
