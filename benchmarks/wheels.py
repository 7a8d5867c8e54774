"""Does the wheel install with each extra in an empty environment, and do the extra's features work there?

    python benchmarks/wheels.py        # about a quarter of an hour; needs the package index

Each environment gets torch first, then the wheel with one extra, which must not change torch. Commands run in
a folder of their own. Without extras, commands that need one must say so in one sentence.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from calm.data.stories import write_stories

ROOT = Path(__file__).parents[1]
TRAINED = (
    "--data.sources prepared --data.context 64 --output trained "
    "--autoencoder.training.steps 2 --autoencoder.training.batch_tokens 128 --autoencoder.hidden_size 32 "
    "--language_model.training.steps 2 --language_model.training.batch_tokens 128 "
    "--language_model.hidden_size 32 --language_model.num_heads 2 --language_model.num_layers 1"
)
TUNED = (
    "--recipe lora --model stories --examples.sources questions.jsonl --examples.context 64 "
    "--training.steps 2 --training.batch_tokens 128 --answers.number 2 --output tuned"
)
# Extra -> a command that needs it, and the package whose absence it reports first.
NEEDS = {
    "report": ("calm compare stories --data prepared --max_blocks 2 --output compared", "matplotlib"),
    "serve": ("calm serve stories --port 0", "fastapi"),
    "cluster": ("calm prepare stories.jsonl --engine ray --output clustered", "ray[data]"),
    "finetune": (f"calm finetune {TUNED}", "peft"),
    "gguf": ("calm generate model.gguf Once --max_new_tokens 8 --seed 1", "gguf"),
    "harness": ("python -m calm.harness --help", "lm-eval"),
    "tensorboard": (f"calm train {TRAINED} --report_to tensorboard", "tensorboard"),
}


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel, and a working folder for commands."""

    folder: Path
    work: Path

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a command of the environment."""
        program, *arguments = command.split()
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.Popen(
            [self.folder / "bin" / program, *arguments],
            cwd=self.work, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, command: str, code: int = 0) -> str:
        """Run a command that must exit with `code`, and return its output."""
        process = self.start(command)
        text, _ = process.communicate()
        assert process.returncode == code, f"{command}: exit code {process.returncode}\n{text[-3000:]}"
        return text


def check_serving(environment: Environment) -> None:
    """Serve the shipped model, and request a text."""
    server = environment.start(NEEDS["serve"][0])
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[3].rstrip(",")
        request = json.dumps({"model": "stories", "prompt": "Once", "max_tokens": 8, "seed": 1}).encode()
        with urllib.request.urlopen(f"{url}/completions", request, timeout=100) as response:
            assert json.load(response)["choices"][0]["text"]
    finally:
        server.terminate()
        server.wait()


def check_gguf(environment: Environment) -> None:
    """Write a model to a GGUF file, and let it continue a text."""
    environment.run(f"python {ROOT / 'tests/gguf_files.py'} model.gguf")
    environment.run(NEEDS["gguf"][0])


def write_texts(environment: Environment) -> None:
    """The files that the commands read."""
    write_stories(environment.work / "stories.jsonl", seed=0, num_stories=60)
    (model,) = environment.folder.glob("lib/python*/site-packages/calm/shipped/stories")
    environment.run(f"calm prepare stories.jsonl --output prepared --tokenizer {model}")
    pairs = [{"prompt": f"{a} + 1 =", "completion": f" {a + 1}"} for a in range(40)]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (environment.work / "questions.jsonl").write_text(lines, encoding="utf-8")


def check_without_extras(environment: Environment) -> None:
    """Commands that need an extra must say which package is missing."""
    for command, package in NEEDS.values():
        message = environment.run(command, code=2).splitlines()[-1]
        assert f"needs {package}" in message and "not installed: pip install" in message, message


# Extra -> its check, by default that its command in `NEEDS` succeeds.
CHECKS: dict[str, Callable[[Environment], object]] = {
    "": check_without_extras,
    **{name: functools.partial(Environment.run, command=command) for name, (command, _) in NEEDS.items()},
    "serve": check_serving,
    "gguf": check_gguf,
    "docs": lambda environment: (
        environment.run("zensical --version") and environment.run("jupyter-nbconvert --version")
    ),
}


def build(folder: Path) -> Path:
    """Build the wheel from the source distribution."""
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def torch_in(environment: Environment) -> list[str]:
    """The installed versions of torch and of libraries that come with some of its builds."""
    lines = environment.run("python -m pip freeze").splitlines()
    return [line for line in lines if line.startswith(("torch==", "torch @", "nvidia-", "triton"))]


def check(wheel: Path, extra: str, folder: Path) -> str:
    """Install the wheel with an extra and use it; return the version of torch."""
    environment = Environment(folder / "env", folder / "work")
    environment.work.mkdir()
    venv.create(environment.folder, with_pip=True)
    environment.run(f"python -m pip install --quiet -c {ROOT / 'constraints.txt'} torch")
    torch = torch_in(environment)
    environment.run(f"python -m pip install --quiet {wheel}" + (f"[{extra}]" if extra else ""))
    assert torch_in(environment) == torch, "another torch came with the wheel"
    write_texts(environment)
    text = environment.run("calm generate stories Once --seed 1 --max_new_tokens 16")
    assert text.startswith("Once"), text
    CHECKS[extra](environment)
    return torch[0]


def main() -> None:
    """Check every extra in turn."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        for extra in CHECKS:
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as environment_folder:
                torch = check(wheel, extra, Path(environment_folder))
            seconds = time.monotonic() - start
            print(f"{extra or 'no extra':12} works, with {torch} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
