"""Run pieces of work ahead of time on the workers of an engine: Ray Data, on one machine or many.

Pieces write files whose names are digests of what they depend on. So an engine only has to run the pieces, in
any order, and later steps find the files. The result is the same as with a single process, and interrupted
work resumes.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets

from calm.errors import InputError, RunError, reason_of
from calm.extras import is_installed, not_installed

Engine = Literal["processes", "ray"]
Piece = Callable[[], object]
RunAhead = Callable[[Sequence[Piece]], None]


def run_none(pieces: Sequence[Piece]) -> None:
    """Run no pieces ahead of time: each runs when it is needed."""


@contextlib.contextmanager
def open_engine(engine: Engine, num_workers: int | None) -> Iterator[RunAhead]:
    """Provide a function that runs pieces ahead of time, for the duration of the block.

    Args:
        engine: "ray" uses the cluster that RAY_ADDRESS names, or starts a local one. All its machines must
            see the same files under the same paths.
        num_workers: Pieces that the cluster runs at once; None runs as many as it has cores.

    Raises:
        InputError: If Ray Data is not installed, or the cluster cannot be reached.
    """
    if engine == "processes":
        yield run_none
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # By default, Ray retries an unreachable address for twelve minutes.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")
    if not is_installed("ray"):
        raise not_installed("the engine 'ray'", "ray[data]")
    import ray
    import ray.data

    is_ours, sigterm_handler = not ray.is_initialized(), signal.getsignal(signal.SIGTERM)
    if is_ours:
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"cannot reach the Ray cluster ({reason_of(error)}); check RAY_ADDRESS."
            ) from error
    try:
        yield partial(_run_in_ray, num_workers=num_workers)
    finally:
        if is_ours:
            ray.shutdown()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, sigterm_handler)  # Ray replaced it.


def _run_in_ray(pieces: Sequence[Piece], *, num_workers: int | None) -> None:
    """Run pieces on the cluster; if a worker dies, it is replaced and its piece is run again."""
    import ray.data
    from ray import cloudpickle

    if not pieces:
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    num_tasks = min(num_workers or len(pieces), len(pieces))
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items(
        [{"piece": cloudpickle.dumps(piece)} for piece in pieces], override_num_blocks=len(pieces)
    )
    run = partial(_run_row, cwd=Path.cwd())
    for row in rows.map(run, compute=ray.data.TaskPoolStrategy(size=num_tasks)).iter_rows():
        if row["mistake"]:
            raise InputError(row["mistake"])
        if row["failure"]:
            raise RunError(row["failure"])


def _run_row(row: dict[str, Any], cwd: Path) -> dict[str, str]:
    """Run a piece in a worker; return the text of an error, since Ray would wrap an exception in its own."""
    from ray import cloudpickle

    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Many workers share a machine.
    errors = {"mistake": "", "failure": ""}
    try:
        os.chdir(cwd)
        cloudpickle.loads(row["piece"])()
    except InputError as error:
        errors["mistake"] = str(error)
    except RunError as error:
        errors["failure"] = str(error)
    except OSError as error:
        errors["failure"] = (
            f"a worker failed ({reason_of(error)}). All machines must see the current folder, the sources, "
            "the output and the cache of datasets at the same paths."
        )
    return errors
