"""What this machine is called: its processor, or its accelerator."""

import platform
import subprocess
from pathlib import Path

import torch

from calm.models.loading import best_device


def device_name() -> str:
    """The device that work runs on, such as "NVIDIA H100" or "AMD EPYC 7763 (8 threads)"."""
    device = best_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{processor_name()} ({threads} thread{'s' * (threads != 1)})"


def processor_name() -> str:
    """The name of the processor, as its maker calls it where the system tells; else its architecture."""
    name = ""
    if platform.system() == "Darwin":
        name = _output_of("sysctl", "-n", "machdep.cpu.brand_string")
    elif (described := Path("/proc/cpuinfo")).is_file():
        lines = described.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")
    return " ".join(name.split()) or platform.processor() or platform.machine()


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
