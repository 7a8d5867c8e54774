"""Trackers of experiments: what the Trainer's `report_to` needs around it.

The callbacks of transformers do the logging. Here a stage gets a run of its own in each tracker, goes on in
it when it is resumed, and ends it. What the trackers' own environment variables say is left as it is.
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
from calm.storage.disk import read_json, write_file_whole
from calm.training.runs import Run

logger = logging.getLogger(__name__)
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
NOTE = "trackers.json"
_PROJECT = "calm"
_TAG = "calm.id"
# Unless they are set. Where a server does not answer, the trackers' own waits are minutes, or without end.
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
End = Callable[[bool], object]  # Ends a tracker's run, which succeeded or not.


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
    """Where a stage is tracked, and as what.

    Args:
        names: The trackers; empty for none.
        folder: Folder of the stage's checkpoints, where its id is noted.
        title: What the stage is called.
        id: Finds its runs again when it is resumed. A stage that begins anew has another.
        recipe: Logged beside the arguments of the Trainer and the configuration of the model.
    """

    names: Sequence[str] = ()
    folder: Path = Path()
    title: str = ""
    id: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run_name(self) -> str:
        """The name of its runs; trackio finds them by it."""
        return f"{self.title}-{self.id}"

    def arguments(self) -> dict[str, Any]:
        """What the Trainer is told of it."""
        if not self.names:
            return {"report_to": "none"}
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.folder / "tensorboard")
        for name in self.names:
            for variable, value in _ENVIRONMENT.get(name, {}).items():
                os.environ.setdefault(variable, value)
        return {"report_to": list(self.names), "run_name": self.run_name, "project": _PROJECT}


def tracking_of(run: Run, stage: str = "") -> Tracking:
    """How a stage of a run is tracked.

    Args:
        run: The run.
        stage: The stage, as its folder is called; empty for a run that has only one.
    """
    folder = run.folder / "checkpoints" / stage
    try:
        noted = read_json(folder / NOTE, dict)
    except (FileNotFoundError, InputError):  # Nothing but names depends on a damaged one.
        noted = {}
    return Tracking(
        names=run.recipe.tracker_list,
        folder=folder,
        title="/".join(filter(None, (run.folder.resolve().name, stage))),
        id=str(noted.get("id") or secrets.token_hex(4)),
        recipe=dataclasses.asdict(run.recipe),
    )


@contextlib.contextmanager
def tracked(trainer: Trainer, tracking: Tracking) -> Iterator[None]:
    """Runs of the trackers for the block; only the main process has them.

    Raises:
        RunError: If a tracker cannot begin its run. If one cannot end it, that is only logged.
    """
    if not (tracking.names and trainer.is_world_process_zero()):
        yield
        return
    write_file_whole(tracking.folder / NOTE, json.dumps({"id": tracking.id}) + "\n")
    ends: dict[str, End] = {}
    has_succeeded = False
    try:
        for name in tracking.names:
            with _beginning(name):
                ends[name] = _BEGINNINGS[name](tracking)
                _log_settings(name, trainer)
        yield
        has_succeeded = True
    finally:
        for name, end in ends.items():
            try:
                end(has_succeeded)
            except Exception as error:  # Of any of their libraries.
                logger.warning("%s could not end its run (%s).", name, reason_of(error))


@contextlib.contextmanager
def _beginning(name: str) -> Iterator[None]:
    """Raise what keeps a tracker from beginning as a RunError."""
    try:
        yield
    except Exception as error:  # Of any of their libraries.
        raise RunError(
            f"{name} cannot begin a run ({reason_of(error)}); --resume goes on once it can, or without it "
            "with --report_to '[]'."
        ) from error


def _log_settings(name: str, trainer: Trainer) -> None:
    """Let the callback of a tracker begin now, where errors are told. (That of TensorBoard has no setup.)"""
    (kind,) = get_reporting_integration_callbacks([name])
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, kind) and hasattr(callback, "setup"):
            callback.setup(trainer.args, trainer.state, trainer.model)


def _begin_wandb(tracking: Tracking) -> End:
    import wandb  # noqa: PLC0415 (it may be missing)

    if wandb.run is not None:  # The caller's own.
        return _leave_open
    wandb.init(name=tracking.run_name, id=tracking.id, resume="allow")
    return lambda has_succeeded: wandb.finish(exit_code=0 if has_succeeded else 1)


def _begin_mlflow(tracking: Tracking) -> End:
    import mlflow  # noqa: PLC0415 (it may be missing)

    if mlflow.active_run() is not None:  # The caller's own.
        return _leave_open
    mlflow.set_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"])
    ours = mlflow.search_runs(
        filter_string=f"tags.`{_TAG}` = '{tracking.id}'", max_results=1, output_format="list"
    )
    if ours:
        mlflow.start_run(run_id=ours[0].info.run_id)
    else:
        mlflow.start_run(run_name=tracking.run_name, tags={_TAG: tracking.id})
    return lambda has_succeeded: mlflow.end_run("FINISHED" if has_succeeded else "FAILED")


def _begin_trackio(tracking: Tracking) -> End:
    """Nothing: its callback begins and ends the run, but an evaluation after that opens it again."""
    import trackio  # noqa: PLC0415 (it may be missing)

    return lambda has_succeeded: trackio.context_vars.current_run.get() and trackio.finish()


def _leave_open(has_succeeded: bool) -> None:
    """The end of what needs none."""


_BEGINNINGS: dict[str, Callable[[Tracking], End]] = {
    "tensorboard": lambda tracking: _leave_open,
    "wandb": _begin_wandb,
    "mlflow": _begin_mlflow,
    "trackio": _begin_trackio,
}
