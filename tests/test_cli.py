"""Wrong arguments on the command line give one sentence, in the words of its help."""

import re

import pytest
import yaml
from toy import failure

from calm.cli import main
from calm.commands import COMMANDS
from calm.errors import InputError
from calm.training.recipe_files import read_recipe

WRONG = [
    ("trian", "there is no command 'trian'; did you mean 'train'?"),
    ("--seed 1 train", "unrecognized option --seed; options come after a command, as in: calm train --seed"),
    ("--print_shtab bash", "unrecognized option --print_shtab"),
    ("--print_config", "unrecognized option --print_config"),
    ("generate", "missing model; see calm generate --help."),
    ("generate stories", "there is no prompt; give a text, or --file FILE ('-' for standard input)."),
    ("generate stories x -n 0", "samples must be at least 1"),
    ("generate stories x -n many", "samples must be a whole number, got 'many'."),
    ("generate stories x -n 2 --stream", "--stream prints one text at a time; leave out --samples."),
    ("generate stories x --json --stream", "--stream prints one text at a time; leave out --json."),
    ("generate stories -f nowhere.txt", "'nowhere.txt': No such file or directory."),
    ("import --model m", "missing --autoencoder and --out; see calm import --help"),
    ("train", "missing --output; see calm train --help"),
    ("flops a b", "unexpected argument 'b'; see calm flops --help"),
    ("doctor x", "unexpected argument 'x'; see calm doctor --help"),
    ("train --foo", "unrecognized option --foo; see calm train --help_all."),
    ("generate a b --tempurature 1", "unrecognized option --tempurature; did you mean --temperature?"),
    ("generate a b --tempurature=1", "unrecognized option --tempurature; did you mean --temperature?"),
    ("generate a b --prompt x", "prompt is a positional argument, as in: calm generate model prompt"),
    ("generate a -x", "unrecognized option -x; put -- before text that begins with a dash."),
    ("generate a -hi", "unrecognized option -hi; put -- before text that begins with a dash."),
    ("train --training.x 1", "unrecognized option --training.x; see calm train --help_all."),
    (
        "train --training.steps 1",
        "did you mean --autoencoder.training.steps or --language_model.training.steps?",
    ),
    ("train --output o --data.sources.x 1", "unrecognized option --data.sources.x"),
    ("finetune --steps 1", "did you mean --training.steps?"),
    ("train --resum --output nowhere", "there is no run to resume in 'nowhere'"),
    ("train --rec=cpu_tiny --outp o --data.sourc ./nowhere", "there is no file or folder './nowhere'"),
    ("generate a b --max 3", "--max could be --max_new_tokens or --max_draws; write it in full."),
    ("generate a b --temperature", "--temperature needs a value."),
    ("train --recipe", "--recipe needs a value."),
    ("compare --chunk_sizes", "--chunk_sizes needs a value."),
    ("generate a b --stream=yes", "--stream takes no value, got 'yes'."),
    ("generate a b --temperature hot", "--temperature must be a number, got 'hot'."),
    ("generate a b --temp hot", "--temperature must be a number, got 'hot'."),
    ("generate a b --seed=", "--seed must be a whole number, got nothing."),
    ("generate a b --sampler magic", "--sampler must be one of exact, pool, head; got 'magic'."),
    ("generate a b --head {x", "--head must be a mapping, such as '{\"num_steps\": 2}', got '{x'."),
    ("evaluate a b --ngrams [1,x]", "must be a whole number or a list of whole numbers, such as [1,2], got"),
    ("compare --chunk_sizes 1 2", "--chunk_sizes must be a list of whole numbers, such as [1,2], got '1'."),
    ("train --output o --seed null", "--seed must be a whole number, got null."),
    ("train --output o --data null", "--data must be a mapping of settings, got null."),
    ("train --output o --data no.yaml", "--data must be a mapping of settings, got 'no.yaml'."),
    ("train --output o --data.streaming maybe", "--data.streaming must be true or false, got 'maybe'."),
    ("train --output o --data {context:1,x:2}", "--data must be a mapping of settings"),
    ('train --output o --data {"x":2}', "there is no setting 'data.x'."),
    ("train --print_config=foo", "--print_config cannot be 'foo'; it takes skip_default or skip_unset."),
    ("train --output o --recipe demoo", "did you mean 'demo'?"),
    (
        "finetune --output o --recipe demo",
        "there is no recipe 'demo'; give a .yaml file or one of: full, lora, thoughts.",
    ),
    ("share x --push small", "'small' is not a repository name on the hub; give OWNER/NAME."),
]
JARGON = (
    "Parser key",
    "Union",
    "NoneType",
    "Expected a",
    "ns.",
    "<class",
    "Traceback",
    "verb",
    "jsonargparse",
)


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[arguments for arguments, _ in WRONG])
def test_wrong_arguments(capsys, arguments, message):
    error = failure(capsys, *arguments.split(" "))
    assert message in error
    assert not [word for word in JARGON if word in error]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_unknown_options(capsys, command):
    assert f"unrecognized option --nonsense; see calm {command} --help" in failure(
        capsys, command, "--nonsense"
    )
    assert failure(capsys, command, "a", "b", "c", "--nonsense=3") != ""


def test_without_a_command_the_help_is_printed(capsys):
    main([])
    out = capsys.readouterr().out
    assert out.startswith("usage: calm") and all(command in out for command in COMMANDS)
    for arguments in (["--help"], ["-h"]):
        main(arguments)
        assert capsys.readouterr().out == out


def test_a_printed_configuration_is_a_recipe(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["train", "--recipe", "demo", "--seed", "7", "--print_config"])
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["train", "--recipe", str(tmp_path / "mine.yaml"), "--print_config=skip_default"])
    assert "seed: 7" in capsys.readouterr().out


def test_other_commands_read_a_printed_configuration(capsys, tmp_path):
    """It leaves out the options that only `calm train` has, even if they were given."""
    train_only = ["--output", str(tmp_path / "run"), "--resume", "--overwrite", "--quiet"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("seed: 7\n")
    cases = ([], 0), (train_only, 7), (["--recipe", "cpu_tiny", *train_only], 1)
    for options, seed in cases:
        with pytest.raises(SystemExit) as raised:
            main(["train", *options, "--print_config"])
        assert not raised.value.code
        (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
        assert read_recipe(str(tmp_path / "mine.yaml")).seed == seed
        main(["flops", str(tmp_path / "mine.yaml")])
        assert capsys.readouterr().out.startswith("FLOPs per token")


def test_a_recipe_file_can_set_options_of_the_command(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("a text")
    options = f"output: {tmp_path}\nresume: false\noverwrite: false\n"
    (tmp_path / "mine.yaml").write_text(f"{options}data: {{sources: {tmp_path}/text.txt}}\n")
    message = failure(capsys, "train", "--recipe", tmp_path / "mine.yaml")
    assert f"in the output folder '{tmp_path}'" in message


def test_a_file_name_that_is_too_long_is_one_sentence(capsys):
    assert failure(capsys, "ablate", "m" * 300).endswith(": File name too long.")


MALFORMED_RECIPES = [
    "seed: !!bool x", 'seed: !!int ""', "seed: !!float x", "seed: !!timestamp x", "seed: " + "[" * 20_000,
    "seed: " + "[" * 20_000 + "]" * 20_000, "seed: " + "9" * 6000, "seed: &a [*a]",
    "language_model: {head: &h {head_type: *h}}", "seed: !!python/object/apply:os.system [ls]",
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED_RECIPES, ids=range(len(MALFORMED_RECIPES)))
def test_malformed_recipes_are_one_sentence(text, capsys, tmp_path):
    (tmp_path / "odd.yaml").write_text(text)
    error = failure(capsys, "train", "--recipe", tmp_path / "odd.yaml", "--output", tmp_path / "run")
    assert "odd.yaml' is not valid YAML" in error or "seed must be a whole number" in error


def test_a_traceback_of_a_users_own_code_can_be_asked_for(capsys, monkeypatch):
    def fails_to_build():
        raise NameError("undefined_name")

    def command():
        try:
            fails_to_build()
        except NameError as error:
            raise InputError("the recipe does not define a valid model.") from error

    monkeypatch.setattr("calm.cli._run", lambda arguments: command())
    assert "Traceback" not in failure(capsys, "doctor")
    for value, is_shown in (("1", True), ("0", False)):
        monkeypatch.setenv("CALM_TRACEBACK", value)
        with pytest.raises(SystemExit):
            main(["doctor"])
        printed = capsys.readouterr().err
        assert ("in fails_to_build" in printed) == is_shown
        assert printed.splitlines()[-1] == "calm: error: the recipe does not define a valid model."


def test_a_file_name_with_newlines_is_printed_on_one_line(capsys, tmp_path):
    name = "x\ncalm: error: fake\ny.txt"
    with pytest.raises(SystemExit):
        main(["prepare", str(tmp_path / name), "--output", str(tmp_path / "out")])
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_out_of_memory_is_one_sentence(capsys):
    arguments = ["generate", "stories", "Once", "--num_draws", "9" * 12, "--sampler", "pool"]
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 1
    assert "out of memory (" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "stories", "x.txt", "--max_blocks", "0"],
        ["evaluate", "stories", "x.txt", "--ngrams", "[0]"],
        ["evaluate", "stories", "x.txt", "--seed", "1" + "0" * 30],
        ["compare", "x", "--context", "0"],
        ["compare", "x", "--max_blocks", "-1"],
        ["share", "x", "--ngrams", "[99999]"],
        ["prepare", "x.txt", "--output", "out", "--num_proc", "0"],
        ["prepare", "x.txt", "--output", "out", "--max_document_mb", "0"],
        ["generate", "stories", "x", "--max_draws", "-1"],
    ],
)
def test_numbers_out_of_range_are_refused(arguments, capsys):
    assert re.search(r"must be at least .*, got", failure(capsys, *arguments))


@pytest.mark.parametrize("sign", [" ", "="])
def test_another_head_type_drops_the_settings_of_the_recipes_head(sign, capsys):
    """As in a recipe that extends another."""
    head_type = f"--language_model.head.head_type{sign}flow".split()
    options = ["--language_model.head.num_blocks", "3", "--print_config"]
    with pytest.raises(SystemExit):
        main(["train", "--recipe", "cpu_tiny", *head_type, *options])
    head = yaml.safe_load(capsys.readouterr().out)["language_model"]["head"]
    assert head == {"head_type": "flow", "num_blocks": 3}
