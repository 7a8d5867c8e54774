"""Experiment trackers: what the Trainer's `report_to` needs around it.

The callbacks of transformers do the logging. This module starts a run in each tracker for each stage,
continues it when the stage is resumed, and ends it. Environment variables that are set are left alone.
"""

import contextlib
import dataclasses
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks

from calm.errors import InputError, RunError, reason_of
from calm.extras import require
from calm.storage.disk import read_json, write_atomically
from calm.training.runs import Run

logger = logging.getLogger(__name__)
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
IDS = "trackers.json"  # The stage's id, by which its runs are found again.
_PROJECT = "calm"
_TAG = "calm.id"
# Set unless they already are. The trackers' own timeouts are minutes or infinite if a server does not answer.
_ENVIRONMENT = {
    "wandb": {
        "WANDB_PROJECT": _PROJECT,
        "WANDB_INIT_TIMEOUT": "15",
        "WANDB_LOGIN_TIMEOUT": "60",
        "WANDB_FINISH_TIMEOUT": "60",
    },
    "mlflow": {
        "MLFLOW_EXPERIMENT_NAME": _PROJECT,
        "MLFLOW_FLATTEN_PARAMS": "TRUE",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "10",  # At the end, each batch waits for the server.
    },
}
End = Callable[[bool], object]  # Ends a tracker's run, given whether it succeeded.


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are known and installed.

    Raises:
        InputError: If one is not.
    """
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"report_to takes {', '.join(TRACKERS)}, or [] for none; got '{name}'.")
        require(f"report_to {name}", name)


@dataclass(frozen=True)
class Tracking:
    """The trackers of a stage, and how they identify it.

    Args:
        names: The trackers; empty for none.
        folder: Folder of the stage's checkpoints, where its id is recorded.
        title: Name of the stage.
        id: Identifies its runs when it is resumed. A stage that starts over gets another.
        recipe: Logged along with the Trainer's arguments and the model's configuration.
    """

    names: Sequence[str] = ()
    folder: Path = Path()
    title: str = ""
    id: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run_name(self) -> str:
        """The name of its runs, by which trackio finds them."""
        return f"{self.title}-{self.id}"

    def arguments(self) -> dict[str, Any]:
        """The Trainer's arguments for tracking. Sets the environment variables of the trackers."""
        if not self.names:
            return {"report_to": "none"}
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.folder / "tensorboard")
        for name in self.names:
            for variable, value in _ENVIRONMENT.get(name, {}).items():
                os.environ.setdefault(variable, value)
        return {"report_to": list(self.names), "run_name": self.run_name, "project": _PROJECT}


def tracking_of(run: Run, stage: str = "") -> Tracking:
    """The trackers of a stage of a run.

    Args:
        run: The run.
        stage: Folder name of the stage; empty for a run that has only one.
    """
    folder = run.folder / "checkpoints" / stage
    try:
        recorded = read_json(folder / IDS, dict)
    except (FileNotFoundError, InputError):  # If it is damaged, only names change.
        recorded = {}
    return Tracking(
        names=run.recipe.tracker_list,
        folder=folder,
        title="/".join(filter(None, (run.folder.resolve().name, stage))),
        id=str(recorded.get("id") or secrets.token_hex(4)),
        recipe=dataclasses.asdict(run.recipe),
    )


@contextlib.contextmanager
def tracked(trainer: Trainer, tracking: Tracking) -> Iterator[None]:
    """Open the trackers' runs for the block, on the main process only.

    Raises:
        RunError: If a tracker cannot start its run. If one cannot end it, that is only logged.
    """
    if not (tracking.names and trainer.is_world_process_zero()):
        yield
        return
    write_atomically(tracking.folder / IDS, json.dumps({"id": tracking.id}) + "\n")
    ends: dict[str, End] = {}
    has_succeeded = False
    try:
        for name in tracking.names:
            with _start_errors(name):
                ends[name] = _STARTS[name](tracking)
                _log_settings(name, trainer)
        yield
        has_succeeded = True
    finally:
        for name, end in ends.items():
            try:
                end(has_succeeded)
            except Exception as error:  # Their libraries may raise anything.
                logger.warning("%s could not finish its run (%s).", name, reason_of(error))


@contextlib.contextmanager
def _start_errors(name: str) -> Iterator[None]:
    """Turn any error while a tracker starts into a RunError."""
    try:
        yield
    except Exception as error:  # Their libraries may raise anything.
        raise RunError(
            f"{name} cannot start a run ({reason_of(error)}); --resume continues once it can, or without it "
            "given --report_to '[]'."
        ) from error


def _log_settings(name: str, trainer: Trainer) -> None:
    """Set up a tracker's callback now, where errors are reported. (TensorBoard's has no setup.)"""
    (callback_class,) = get_reporting_integration_callbacks([name])
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, callback_class) and hasattr(callback, "setup"):
            callback.setup(trainer.args, trainer.state, trainer.model)


def _start_wandb(tracking: Tracking) -> End:
    import wandb  # noqa: PLC0415 (it may be missing)

    if wandb.run is not None:  # The caller started it.
        return _leave_open
    wandb.init(name=tracking.run_name, id=tracking.id, resume="allow")
    return lambda has_succeeded: wandb.finish(exit_code=0 if has_succeeded else 1)


def _start_mlflow(tracking: Tracking) -> End:
    import mlflow  # noqa: PLC0415 (it may be missing)

    if mlflow.active_run() is not None:  # The caller started it.
        return _leave_open
    mlflow.set_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"])
    earlier = mlflow.search_runs(
        filter_string=f"tags.`{_TAG}` = '{tracking.id}'", max_results=1, output_format="list"
    )
    if earlier:
        mlflow.start_run(run_id=earlier[0].info.run_id)
    else:
        mlflow.start_run(run_name=tracking.run_name, tags={_TAG: tracking.id})
    return lambda has_succeeded: mlflow.end_run("FINISHED" if has_succeeded else "FAILED")


def _start_trackio(tracking: Tracking) -> End:
    """Start nothing: its callback does, and ends the run. End it again, since an evaluation reopens it."""
    import trackio  # noqa: PLC0415 (it may be missing)

    return lambda has_succeeded: trackio.context_vars.current_run.get() and trackio.finish()


def _leave_open(has_succeeded: bool) -> None:
    """Do nothing: the run is not ours to end, or needs no end."""


_STARTS: dict[str, Callable[[Tracking], End]] = {
    "tensorboard": lambda tracking: _leave_open,
    "wandb": _start_wandb,
    "mlflow": _start_mlflow,
    "trackio": _start_trackio,
}
