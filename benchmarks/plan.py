"""How accurate is `calm plan`? Memory and time of small training runs on this machine's CPU.

    python benchmarks/plan.py

It trains for a few steps with the Trainer of `calm train`, each case in new processes, and compares the peak
memory of a process with the plan. For time, the utilisation that the first case reaches on one thread
predicts the other cases.
"""

import argparse
import itertools
import os
import socket
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from measure import machine, peak_memory
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from calm.planning.devices import Device, Devices
from calm.planning.memory import Footprint, Sharing
from calm.planning.pace import SpeedAssumptions, pace_of
from calm.planning.stages import PlannedStage, stages_of
from calm.training.arguments import TrainingStage
from calm.training.blocks import Blocks
from calm.training.recipe_files import read_recipe, with_settings
from calm.training.trainer import ChunkTrainer

MEMORY_STEPS, TIME_STEPS = 3, 9
# Freed memory is returned to the system at once, so that the peak of a process is that of its tensors.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """A training run.

    Args:
        recipe: Name of a shipped recipe.
        settings: Changed settings; those of the trained stage are given without its name.
        stage: Which stage is trained: 0 for the first, -1 for the language model.
        processes: Number of processes that share it.
    """

    recipe: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    stage: int = -1
    processes: int = 1

    def planned(self) -> PlannedStage:
        """The planned stage."""
        part = "autoencoder" if self.stage == 0 else "language_model"
        settings = {f"{part}.{name}": value for name, value in self.settings.items()}
        return stages_of(with_settings(read_recipe(self.recipe), settings), self.processes)[self.stage]

    @property
    def sharing(self) -> Sharing:
        """How the processes share the work."""
        if self.processes == 1:
            return "one process"
        return "FSDP" if self.settings.get("sharded") else "DDP"


_LARGE = {"training.batch_tokens": 16384}
_ADAMW = {"training.optimizer.name": "adamw"}
_WIDE = {"hidden_size": 512, "intermediate_size": 1408, "training.batch_tokens": 8192}
MEMORY = {
    "energy head, Muon": Case("demo", _LARGE),
    "in eight microbatches": Case("demo", _LARGE | {"training.microbatch_tokens": 2048}),
    "checkpointed": Case("demo", _LARGE | {"training.gradient_checkpointing": True}),
    "bf16": Case("demo", _LARGE | {"training.precision": "bf16"}),
    "wide, AdamW": Case("demo", _WIDE | _ADAMW),
    "wide, Muon": Case("demo", _WIDE),
    "its autoencoder": Case("demo", _LARGE, stage=0),
    "flow head": Case("demo_flow", _LARGE),
    "sequential head": Case("demo_sequential", _LARGE),
    "categorical flow head": Case("demo_categorical", _LARGE),
    "baseline of tokens": Case("demo_baseline", {"training.batch_tokens": 8192}),
    "wide, two processes": Case("demo", _WIDE, processes=2),
    "wide, two processes, sharded": Case("demo", _WIDE | {"sharded": True}, processes=2),
}
TIME = {
    "energy head": Case("demo"),
    "twice the batch": Case("demo", {"training.batch_tokens": 8192}),
    "half the layers": Case("demo", {"num_layers": 2}),
    "twice the layers": Case("demo", {"num_layers": 8}),
    "twice as wide": Case("demo", {"hidden_size": 448, "intermediate_size": 1216}),
    "flow head": Case("demo_flow"),
    "baseline of tokens": Case("demo_baseline"),
}


def trainer_of(planned: PlannedStage, steps: int, folder: Path) -> ChunkTrainer:
    """The Trainer of a stage, on random tokens with two documents per block."""
    chunks = planned.context // planned.chunk_size
    num_blocks = planned.settings.batch_tokens // planned.context
    tokens = torch.randint(4, planned.config.vocab_size, (num_blocks, planned.context))
    positions = torch.arange(chunks) % -(-chunks // 2)
    rows = {"input_ids": tokens, "labels": tokens, "position_ids": positions.expand(num_blocks, -1)}
    blocks: Any = datasets.Dataset.from_dict({name: rows[name].numpy() for name in rows}).with_format("torch")
    settings = planned.settings
    settings.steps, settings.log_every, settings.evaluate_every, settings.save_every = steps, 1, 0, 0
    kind: Any = AutoModel if planned.name == "autoencoder" else AutoModelForCausalLM
    network: PreTrainedModel = kind.from_config(planned.config)
    stage = TrainingStage(planned.name, settings, folder, seed=0, is_sharded=planned.is_sharded)
    unused: Any = None
    return ChunkTrainer(network, Blocks(blocks, blocks, planned.context, unused), lambda *_: {}, stage)


def training(name: str, rank: int, port: int) -> Callable[[], Any]:
    """A function that trains a case; everything that training imports is loaded first, by a tiny training."""
    case = MEMORY[name]
    torch.set_num_threads(1)
    planned = case.planned()
    folder = Path(tempfile.mkdtemp())
    small = Case("demo", {"training.batch_tokens": 512}).planned()
    trainer_of(small, 1, folder / "small").train_or_resume()
    if case.processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(case.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        reset_processes()
    return lambda: trainer_of(planned, MEMORY_STEPS, folder / "run").train_or_resume()


def reset_processes() -> None:
    """Make accelerate forget that it was set up for a single process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def measured_peak(name: str) -> int:
    """Peak bytes of the largest process of a case."""
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    processes = MEMORY[name].processes
    with ThreadPoolExecutor(processes) as pool:
        return max(pool.map(lambda rank: peak_memory(training, name, rank, port), range(processes)))


def planned_peak(case: Case) -> dict[str, int]:
    """Planned bytes of a process, by part."""
    planned = case.planned()
    blocks, passes = planned.settings.batches(planned.context, case.processes)
    return Footprint(planned, is_gpu=False).parts(
        blocks, sharing=case.sharing, devices=case.processes, is_summed=passes > 1
    )


class Clock(TrainerCallback):
    """Records CPU time at the end of each step; unlike wall time, it ignores what else the machine does."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the time."""
        self.ends.append(time.process_time())


def measured_seconds(case: Case) -> float:
    """Median CPU seconds of a step on one thread, without the first steps."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(case.planned(), TIME_STEPS, Path(folder))
        trainer.add_callback(clock)
        trainer.train_or_resume()
    return statistics.median(later - end for end, later in itertools.pairwise(clock.ends[2:]))


def shortest(function: Callable[[], Any]) -> float:
    """CPU seconds of a function: the minimum of several calls."""
    return min(timeit.repeat(function, number=1, repeat=7, timer=time.process_time))


def compare_memory(names: list[str]) -> None:
    """Print planned and measured memory of each case."""
    print(
        "| training | planned, MiB | most of it | measured, MiB | planned / measured |\n|---|---|---|---|---|"
    )
    os.environ |= _ALLOCATOR  # For the child processes.
    for name in names:
        parts, measured = planned_peak(MEMORY[name]), measured_peak(name)
        planned = sum(parts.values())
        largest = sorted(parts, key=parts.__getitem__)[: -3 if len(parts) > 2 else None : -1]
        print(
            f"| {name} | {planned / 2**20:,.0f} | {', '.join(largest)} | {measured / 2**20:,.0f} | "
            f"{planned / measured:.2f} |",
            flush=True,
        )


def compare_times() -> None:
    """Print planned and measured seconds of a step for each case; the first case gives the utilisation."""
    torch.set_num_threads(1)
    matrix, numbers = torch.ones(1024, 1024), torch.ones(2**26)
    rate = 2 * 1024**3 / shortest(lambda: matrix @ matrix)
    bandwidth = 2 * numbers.nbytes / shortest(lambda: numbers.mul_(2))  # Each number is read and written.
    card = Device("a thread", 0, rate, rate, bandwidth, 0)
    print(f"one thread; matrix products: {rate / 1e9:.0f} GFLOP/s; memory: {card.bandwidth / 1e9:.0f} GB/s\n")
    print("| training | planned, s | measured, s | planned / measured |\n|---|---|---|---|")
    utilisation = None
    for name, case in TIME.items():
        measured = measured_seconds(case)
        footprint, devices = Footprint(case.planned(), is_gpu=False), Devices(1, card)
        if utilisation is None:
            utilisation = (
                pace_of(footprint, "one process", devices, SpeedAssumptions(1, 1e9)).step_seconds / measured
            )
        planned = pace_of(footprint, "one process", devices, SpeedAssumptions(utilisation, 1e9)).step_seconds
        print(f"| {name} | {planned:.3f} | {measured:.3f} | {planned / measured:.2f} |", flush=True)
    print(f"\nutilisation of the first: {utilisation:.0%}")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("memory", "time"), help="one of the tables")
    parser.add_argument("--cases", nargs="+", choices=list(MEMORY), default=list(MEMORY))
    arguments = parser.parse_args()
    print(f"{machine()}\n")
    if arguments.only != "time":
        compare_memory(arguments.cases)
    if arguments.only != "memory":
        print()
        compare_times()


if __name__ == "__main__":
    main()
