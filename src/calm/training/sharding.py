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
    """Raise InputError for what does not go with sharding."""
    if recipe.language_model.sharded and recipe.language_model.training.compile:
        raise InputError(
            "a sharded model cannot be compiled yet; set language_model.sharded or "
            "language_model.training.compile to false."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise InputError(
            "the configuration of accelerate asks for FSDP, which would shard the autoencoder as well; "
            "launch without it and set language_model.sharded to true."
        )


def sharding_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `TrainingArguments` for a sharded model.

    Args:
        model: The model; each of its `_no_split_modules` is gathered when it runs, the rest for a step.
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
    """Make accelerate shard over CPU processes as well, where it would replicate; torch can."""
    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def keep_autocast(accelerator: Accelerator) -> None:
    """Leave mixed precision to autocast, as without sharding, so losses and gradients stay in float32."""
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()


class WholeTable(TrainerCallback):
    """Lets an embedding that the head has a use for stay gathered until the end of a pass.

    Args:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """It has been sharded by now."""
        embedding = self._model.get_input_embeddings()
        is_shared = getattr(getattr(self._model, "head", None), "shares_embedding", False)
        if is_shared and isinstance(embedding, FSDPModule):
            embedding.set_reshard_after_forward(False)


def check_checkpoint(checkpoint: Path, is_sharded: bool) -> None:
    """Raise InputError if a checkpoint is sharded and the run is not, or the other way around."""
    if (checkpoint / f"{FSDP_MODEL_NAME}_0").is_dir() == is_sharded:
        return
    if is_sharded:
        raise InputError(f"'{checkpoint}' was not written by a sharded run; resume with one process.")
    raise InputError(f"'{checkpoint}' was written by a sharded run; resume with two processes or more.")


def whole_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model with all weights in each process; the model itself if it is not sharded.

    All processes call it together.
    """
    if not isinstance(model, FSDPModule):
        return model
    unsharded: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with no_init_weights():
        whole = unsharded(copy.deepcopy(model.config))
    whole.load_state_dict(weights)
    return whole.to(model.device)
