"""Weights, gradients and optimizer state sharded over processes: torch's FSDP2 through accelerate."""

import copy
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainerCallback
from transformers.initialization import no_init_weights

from calm.errors import InputError
from calm.training.recipe import Recipe


def check_sharding(recipe: Recipe) -> None:
    """Raise InputError for settings that do not work with sharding, or if accelerate itself would shard."""
    if recipe.language_model.sharded and recipe.language_model.training.compile:
        raise InputError(
            "a sharded model cannot be compiled yet; set language_model.sharded or "
            "language_model.training.compile to false."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise InputError(
            "the accelerate configuration enables FSDP, which would shard the autoencoder as well; launch "
            "without it and set language_model.sharded to true."
        )


def sharding_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `TrainingArguments` for a sharded model.

    Args:
        model: The model; its `_no_split_modules` are gathered one at a time, the rest for a whole step.
    """
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": list(model._no_split_modules or []),
            "reshard_after_forward": True,
            "state_dict_type": "SHARDED_STATE_DICT",
            "cpu_ram_efficient_loading": False,
        },
    }


def shard_on_cpu_as_well() -> None:
    """Make accelerate shard over CPU processes, where it would replicate although torch can shard."""
    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def keep_autocast(accelerator: Accelerator) -> None:
    """Leave mixed precision to autocast, as without sharding, so losses and gradients stay in float32."""
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()


class KeepTiedEmbedding(TrainerCallback):
    """Keeps the token embedding gathered for the rest of a pass if the output layer shares its weight.

    A head uses the weight directly instead of calling the layer, which would gather it.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set this in the model, which has just been sharded."""
        model = kwargs["model"]
        embedding = model.get_input_embeddings()
        if isinstance(embedding, FSDPModule) and getattr(model.config, "has_tied_scores", False):
            embedding.set_reshard_after_forward(False)


def check_checkpoint(checkpoint: Path, is_sharded: bool) -> None:
    """Raise InputError if a checkpoint is sharded and the run is not, or vice versa."""
    if (checkpoint / f"{FSDP_MODEL_NAME}_0").is_dir() == is_sharded:
        return
    if is_sharded:
        raise InputError(f"'{checkpoint}' was not written by a sharded run; resume with one process.")
    raise InputError(f"'{checkpoint}' was written by a sharded run; resume with two or more processes.")


def unsharded_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model with all weights in each process; the model itself if it is not sharded.

    All processes call this together.
    """
    if not isinstance(model, FSDPModule):
        return model
    model_class: Any = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with no_init_weights():
        unsharded = model_class(copy.deepcopy(model.config))
    unsharded.load_state_dict(weights)
    del weights  # They are on the device, which may not have room for them twice.
    return unsharded.to(model.device)
