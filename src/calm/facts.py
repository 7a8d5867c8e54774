"""Facts about a finished run of `calm train`, as its report shows them."""

from dataclasses import replace

from transformers import PreTrainedModel

from calm.flops import parameters_of
from calm.models.language_model import language_model
from calm.report.curves import History
from calm.report.facts import AUTOENCODER, LANGUAGE_MODEL, RunFacts, StageFacts, here_and_now
from calm.report.names import model_name
from calm.training.clock import seconds_of
from calm.training.processes import processes
from calm.training.recipe import Recipe, TrainingSettings
from calm.training.speed import known_training_flops
from calm.training.teacher import TeacherFacts


def facts_of(
    recipe: Recipe, model: PreTrainedModel, history: History, teacher: TeacherFacts | None = None
) -> RunFacts:
    """The facts of a run that was trained on this machine and has just finished.

    Args:
        recipe: Its recipe.
        model: Its language model.
        history: Logs of its stages; times that they lack are unknown.
        teacher: Facts about its teacher, if it had one.
    """
    view = language_model(model)

    def stage(name: str, settings: TrainingSettings, network: PreTrainedModel) -> StageFacts:
        per_token = known_training_flops(network.config, recipe.data.context)
        return StageFacts(
            name=name,
            steps=settings.steps,
            tokens=settings.tokens,
            flops=None if per_token is None else per_token * settings.tokens,
            seconds=seconds_of([history.get(name, [])]),
        )

    language_stage = stage(LANGUAGE_MODEL, recipe.language_model.training, model)
    if teacher is not None and language_stage.flops is not None:
        teacher_flops = teacher.flops_per_token * language_stage.tokens
        language_stage = replace(language_stage, flops=language_stage.flops + teacher_flops)
    stages = [language_stage]
    if recipe.trains_autoencoder and view.autoencoder is not None:
        stages.insert(0, stage(AUTOENCODER, recipe.autoencoder.training, view.autoencoder))
    return RunFacts(
        model=model_name(view.chunk_size, view.head_type),
        parameters=parameters_of(model),
        stages=stages,
        has_trained_autoencoder=view.autoencoder is not None and not view.autoencoder.config.has_codes,
        provenance=here_and_now(processes().num_processes),
        teacher=None if teacher is None else str(teacher),
        has_loss_in_nats=view.learns_cross_entropy,
    )
