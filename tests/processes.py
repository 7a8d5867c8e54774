"""Runs `calm` in new processes, forked from one that has already imported torch, which takes seconds."""

import gc
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess

PRELOADED = [
    "calm.data.prepare",
    "calm.serving.run",
    "calm.training.finetuning",
    "calm.training.stages",
    "torch.distributed.fsdp",
    "torch.distributed.launcher.api",
    "transformers.trainer",
]
TIMEOUT_SECONDS = 280


class Started:
    """A running process and its output so far.

    Args:
        function: The function to run, at the top level of a module.
        arguments: Its arguments.
        environment: Environment variables to set in addition to those of this process.
        file_limit: The largest size that a file may have, in bytes.
    """

    def __init__(
        self,
        function: Callable,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        file_limit: int | None = None,
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        self._output, self._errors = (Path(self._folder.name, name) for name in ("output", "errors"))
        self._output.touch()
        self._errors.touch()
        settings = (Path.cwd(), {**os.environ, **(environment or {})}, self._output, self._errors, file_limit)
        self._process = context.Process(target=_begin, args=(function, arguments, *settings))
        self._process.start()
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def is_running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        if self.is_running():
            os.kill(self.pid, number)

    def wait(self, seconds: float = TIMEOUT_SECONDS) -> CompletedProcess:
        """Its exit status, negative for a signal, and all of its output; it is killed if it takes longer."""
        self._process.join(seconds)
        if self.is_running():
            self._process.kill()
            raise TimeoutError(f"after {seconds} seconds: {self.output}{self.errors}")
        return CompletedProcess([], self._process.exitcode, self.output, self.errors)


def start(*arguments: object, program: Path | None = None, **settings) -> Started:
    """Start `calm`, or another program, with these arguments."""
    return Started(_run, program, [str(argument) for argument in arguments], **settings)


def launch(
    processes: int, *arguments: object, program: Path | None = None, command: str = "train"
) -> CompletedProcess:
    """Run `calm train`, or another command, on several processes, as torchrun does."""
    words = [command, *map(str, arguments)]
    return Started(_run_on_all, processes, program, words).wait()


def torchrun(processes: int, *arguments: object, program: Path | None = None) -> CompletedProcess:
    """Run `calm train` with torchrun itself."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script = ["-m", "calm"] if program is None else [str(program)]
    command = [sys.executable, *launcher, *script, "train", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)


def _begin(
    function: Callable,
    arguments: tuple,
    folder: Path,
    environment: Mapping[str, str],
    output: Path,
    errors: Path,
    file_limit: int | None,
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in ((1, output), (2, errors)):
        with file.open("wb") as opened:
            os.dup2(opened.fileno(), descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    gc.freeze()
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    function(*arguments)


def _run(program: Path | None, words: list[str]) -> None:
    sys.argv = [str(program or "calm"), *words]
    if program is None:
        from calm.cli import main

        main()
    else:
        runpy.run_path(str(program), run_name="__main__")


def _run_on_all(processes: int, program: Path | None, words: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    try:
        elastic_launch(config, _run)(program, words)
    except ChildFailedError as error:
        sys.exit(f"{error}")
