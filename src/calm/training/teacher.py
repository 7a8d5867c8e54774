"""Teachers: frozen token-level Transformers that language models learn from (docs/uptraining.md)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from calm.data.prepared import PreparedData
from calm.data.tokenizer import load_tokenizer
from calm.errors import InputError
from calm.flops import teaching_flops
from calm.models.context import longest_context
from calm.models.distillation import TeacherOutput, token_positions
from calm.models.language_model import language_model
from calm.models.loading import load_language_model_and_tokenizer
from calm.models.missing import resolve_name
from calm.quantities import short
from calm.storage.disk import read_json, write_atomically
from calm.training.recipe import Recipe, TeacherSettings
from calm.training.uptraining import config_at, cut_of, is_token_level, is_uptraining

FACTS = "teacher.json"
# Difference allowed between the same numbers computed in two ways, relative to the largest.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2**-4}


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen token-level Transformer, and how a model learns from it.

    Args:
        network: The Transformer.
        settings: How the model learns.
        chunk_size: Tokens per chunk K of the model.
        layer: Index of the layer at which the model's backbone ends; None if states are not compared.
    """

    network: PreTrainedModel
    settings: TeacherSettings
    chunk_size: int
    layer: int | None = None

    @torch.no_grad()
    def output(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None, **_: Any
    ) -> TeacherOutput:
        """Run the teacher on a batch; like the model, it keeps documents apart.

        Args:
            input_ids: Tokens (B, T).
            labels: Tokens (B, T) with -100 on padding.
            position_ids: Position of every chunk in its document (B, C).
        """
        positions_BT = token_positions(labels, position_ids, self.chunk_size)
        decoder: Any = self.network.get_decoder()
        hidden: list[Tensor] = []

        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden.append(output[0] if isinstance(output, tuple) else output)

        hooks = [] if self.layer is None else [decoder.layers[self.layer].register_forward_hook(record)]
        try:
            with torch.autocast(input_ids.device.type, enabled=False):
                output = decoder(input_ids=input_ids, position_ids=positions_BT, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        output_layer: Any = self.network.get_output_embeddings()
        return TeacherOutput(
            output.last_hidden_state,
            output_layer.weight.detach(),
            getattr(output_layer, "bias", None),
            weight=self.settings.weight,
            temperature=self.settings.temperature,
            hidden_BTD=hidden[0] if hidden else None,
            hidden_weight=self.settings.states,
        )


def check_teacher(recipe: Recipe, network: PreTrainedModel) -> None:
    """Check that a model can learn from the teacher of its recipe, if there is one, before it is loaded.

    Args:
        recipe: The recipe.
        network: The recipe's model, which may be on the meta device.

    Raises:
        InputError: If the teacher is missing, of another kind, or its context is shorter than a block; if the
            model does not predict distributions of tokens, or is trained with another loss than
            cross-entropy; or if states are to be compared, but the model is not made of the teacher's layers.
    """
    settings = recipe.language_model.teacher
    if settings.model is None and settings != TeacherSettings():
        raise InputError("language_model.teacher has settings but no model; name the teacher's folder.")
    if (config := teacher_config(recipe)) is None:
        return
    view, context, longest = language_model(network), recipe.data.context, longest_context(config)
    if not view.can_distill:
        student = f"a model of type '{network.config.model_type}'"
        if view.head_type is not None:
            student = f"a head of type '{view.head_type}'"
        raise InputError(
            f"{student} cannot learn from a teacher, which gives a distribution for every token: use a head "
            "of type sequential, parallel or decoder, or a Llama, or leave out language_model.teacher."
        )
    if not view.learns_cross_entropy:
        raise InputError(
            "a teacher needs a head trained with cross-entropy, and this one uses another loss: set "
            "language_model.head.loss to cross_entropy, or leave out language_model.teacher."
        )
    if longest is not None and context > longest:
        raise InputError(
            f"the teacher '{settings.model}' has a context length of {longest} tokens, less than "
            f"data.context, which is {context}."
        )
    if settings.states and not _is_made_of_teacher(recipe):
        raise InputError(
            "language_model.teacher.states requires a CALM built from the teacher's own layers: set "
            "language_model.init_from to the teacher as well, or set states to 0."
        )


def _is_made_of_teacher(recipe: Recipe) -> bool:
    """Whether the CALM of a recipe is made of the layers of its teacher."""
    names = (recipe.language_model.init_from, recipe.language_model.teacher.model)
    if None in names or not is_uptraining(recipe):
        return False
    source, teacher = (resolve_name(str(name)) for name in names)
    return source == teacher or Path(source).resolve() == Path(teacher).resolve()


def teacher_config(recipe: Recipe) -> PreTrainedConfig | None:
    """The configuration of the teacher of a recipe; None if no teacher takes part.

    Raises:
        InputError: If the teacher does not exist, or is another kind of model.
    """
    settings = recipe.language_model.teacher
    if settings.model is None or not settings.is_used:
        return None
    config = config_at(settings.model)
    if not is_token_level(config):
        raise InputError(
            f"a teacher must be a token-level Transformer, but '{settings.model}' is a model of type "
            f"'{config.model_type}'."
        )
    return config


def with_teacher_tokenizer(recipe: Recipe) -> Recipe:
    """A recipe with its teacher's tokenizer, unless it names one or starts from a model that has one."""
    name = recipe.language_model.teacher.model
    if name is None or recipe.data.tokenizer is not None or recipe.language_model.init_from is not None:
        return recipe
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tokenizer=resolve_name(name)))


def teacher_of(recipe: Recipe, data: PreparedData) -> Teacher | None:
    """The teacher of a recipe, in the precision of training; None if none takes part.

    Args:
        recipe: The recipe.
        data: The text.

    Raises:
        InputError: If it is damaged, its tokens are not those of the text, it does not keep documents apart,
            or its logits are not simply its states times the output embeddings.
    """
    settings = recipe.language_model.teacher
    if (config := teacher_config(recipe)) is None or (name := settings.model) is None:
        return None
    is_bf16 = recipe.language_model.training.precision == "bf16"
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    network, _ = load_language_model_and_tokenizer(name, dtype=dtype)
    check_teacher_tokenizer(name, data.tokenizer)
    _check_outputs(network, name)
    layer = layer_of(recipe, config)
    return Teacher(network.requires_grad_(False).eval(), settings, recipe.chunk_size, layer)


def check_teacher_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError if the vocabulary of a teacher is not that of the text's tokenizer."""
    if load_tokenizer(resolve_name(name)).get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"the teacher '{name}' has a different vocabulary from the text: set data.tokenizer to it, or "
            f"prepare the text with --tokenizer {name}."
        )


def layer_of(recipe: Recipe, teacher: PreTrainedConfig) -> int | None:
    """The teacher's layer at which the backbone of a recipe ends; None if states are not compared."""
    if not recipe.language_model.teacher.states:
        return None
    _, backbone, _ = cut_of(recipe).split(teacher.num_hidden_layers)
    return backbone[-1]


@torch.no_grad()
def _check_outputs(network: Any, name: str) -> None:
    """Raise InputError unless a model keeps documents apart, and its output embeddings give its logits."""
    decoder, output_layer = network.get_decoder(), network.get_output_embeddings()
    ids = torch.arange(1, 7, device=network.device).remainder(network.config.get_text_config().vocab_size)
    positions = torch.arange(3, device=network.device).repeat(2)
    block: dict[str, Any] = {"input_ids": ids.unsqueeze(0), "position_ids": positions.unsqueeze(0)}
    second: dict[str, Any] = {key: value[:, 3:] for key, value in block.items()}  # Of its two documents.
    in_block, alone = (decoder(**inputs, use_cache=False).last_hidden_state for inputs in (block, second))
    if not _are_close(in_block[:, 3:], alone):
        raise InputError(
            f"the teacher '{name}' does not keep the documents of a block apart; use a Transformer whose "
            "attention does."
        )
    logits, bias = network(**second, use_cache=False).logits, getattr(output_layer, "bias", None)
    if output_layer is None or not _are_close(F.linear(alone, output_layer.weight, bias), logits):
        raise InputError(
            f"the logits of the teacher '{name}' are not simply its states times its output embeddings; use "
            "a Transformer that does not scale or cap them."
        )


def _are_close(actual: Tensor, expected: Tensor) -> bool:
    error = (actual.float() - expected.float()).abs().max()
    return bool(error <= _TOLERANCE[expected.dtype] * expected.float().abs().max())


@dataclasses.dataclass(frozen=True)
class TeacherFacts:
    """What a run records of its teacher, which may later be gone.

    Args:
        model: Its folder or hub name.
        parameters: Its number of parameters.
        flops_per_token: FLOPs that it takes per token of training text.
    """

    model: str
    parameters: int
    flops_per_token: float

    def write(self, run: Path) -> None:
        """Write them to the folder of a run."""
        write_atomically(run / FACTS, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def __str__(self) -> str:
        return f"'{self.model}' ({short(self.parameters)} parameters)"


def teacher_facts(teacher: Teacher, context: int) -> TeacherFacts:
    """What a run records of its teacher."""
    network, name = teacher.network, teacher.settings.model
    assert name is not None
    parameters = sum(weight.numel() for weight in network.parameters())
    return TeacherFacts(name, parameters, teaching_flops(network.config, context))


def read_teacher_facts(run: Path) -> TeacherFacts | None:
    """What a run has recorded of its teacher; None if it had none.

    Raises:
        InputError: If the file is damaged.
    """
    path = run / FACTS
    if not path.is_file():
        return None
    try:
        return TeacherFacts(**read_json(path, dict))
    except TypeError as error:
        raise InputError(f"'{path}' is damaged; --resume will recreate it.") from error
