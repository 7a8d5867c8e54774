"""Brief help that fits on a screen, the full list of options, and shell completion."""

import shutil
import subprocess

import pytest
from toy import failure

from calm.cli import main
from calm.command_help import SHELLS

LINES_OF_A_SCREEN, COLUMNS = 40, 80


@pytest.mark.parametrize("command", ["train", "finetune"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_brief_help_fits_on_a_screen(command, flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    main([command, flag])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= LINES_OF_A_SCREEN and max(map(len, lines)) <= COLUMNS
    examples = [line.strip() for line in lines if line.startswith("  calm ")]
    assert len(examples) >= 2 and all(line.startswith(f"calm {command} ") for line in examples)
    assert f"calm {command} --help_all" in lines[-1] and any("--output" in line for line in lines)


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_examples_in_the_help_are_valid_commands(command, capsys, monkeypatch, tmp_path):
    """They fail only because a file is missing, never because of an option or a recipe name."""
    main([command, "--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  calm ")]
    monkeypatch.chdir(tmp_path)
    for line in lines:
        error = failure(capsys, *line.split()[1:])
        missing = ("texts/", "my.yaml", "there is no run to resume", "runs/a")
        assert any(name in error for name in missing), (line, error)


def test_help_all_lists_nested_options(capsys):
    main(["train", "--help_all"])
    text = capsys.readouterr().out
    for option in ("--data.layout", "--autoencoder.kl_floor", "--language_model.training.optimizer.beta2"):
        assert option in text


SCRIPTS = {
    "bash": """source "$1"; COMP_WORDS=(calm {word}); COMP_CWORD={index}; _shtab_calm; """
    """printf '%s\\n' "${{COMPREPLY[@]}}\"""",
    "fish": """source $argv[1]; complete -C "calm {word}" | cut -f1""",
}  # fmt: skip


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts_complete_commands_and_options(shell, capsys, tmp_path):
    main(["--completion", shell])
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    if shell == "zsh":
        load = f'autoload -Uz compinit; compinit -u -d {tmp_path}/dump; eval "$(cat {script})"'
        load += "; echo $_comps[calm]"
        done = subprocess.run(["zsh", "-f", "-c", load], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "_shtab_calm", done.stderr
        return
    for word, index, expected in (("tr", 1, "train"), ("generate --temp", 2, "--temperature")):
        command = SCRIPTS[shell].format(word=word, index=index)
        done = subprocess.run(
            [shell, "-c", command, *(["calm"] if shell == "bash" else []), str(script)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.splitlines() == [expected], done.stderr


@pytest.mark.parametrize("arguments", [["--completion"], ["--completion", "tcsh"], ["--completion=x"]])
def test_completion_for_other_shells_is_refused(arguments, capsys):
    assert "--completion takes bash, zsh, fish" in failure(capsys, *arguments)
