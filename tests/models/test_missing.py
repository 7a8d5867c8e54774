"""Names of models: a run can be given for its model, and a wrong name is refused with suggestions."""

import json
import subprocess
import sys

import pytest
from tiny import tiny_model
from toy import failure

from calm.errors import InputError
from calm.models.loading import load_autoencoder, load_language_model_and_tokenizer, load_model
from calm.models.missing import resolve_name
from calm.models.shipped import folder_of

SHIPPED = "classics (in the package), stories (in the package)"


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with two runs, one of them unfinished, and a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("seed: 0\n")
    tiny_model().save_pretrained("runs/demo/model")
    for run in ("demo", "begun"):
        (tmp_path / "runs" / run / "autoencoder").mkdir(parents=True)
        (tmp_path / "runs" / run / "recipe.yaml").write_text("seed: 0\n")
        config = json.dumps({"model_type": "calm_autoencoder"})
        (tmp_path / "runs" / run / "autoencoder/config.json").write_text(config)
    return tmp_path


def test_run_can_be_given_for_its_model(workspace, monkeypatch):
    assert (
        folder_of("runs/demo") == folder_of("runs/demo/") == "runs/demo/model" == folder_of("runs/demo/model")
    )
    assert load_model("runs/demo").config == load_model("runs/demo/model").config
    assert load_autoencoder(workspace / "runs/demo").config.model_type == "calm_autoencoder"
    monkeypatch.setenv("HOME", str(workspace))
    assert folder_of("~/runs/demo") == str(workspace / "runs/demo/model")
    (workspace / "runs/demo").rename(workspace / "stories")
    assert folder_of("stories") == "stories/model", "a local run takes precedence over a model of the package"


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("stoires", f"models nearby: {SHIPPED}, runs/demo/model; did you mean 'stories'?"),
        ("nobody/nothing", f"models nearby: {SHIPPED}, runs/demo/model."),
        (
            "runs/dmeo",
            "there is no such folder (the hub was not queried, as 'runs' is a local folder); "
            f"models nearby: {SHIPPED}, runs/demo/model; did you mean 'runs/demo/model'?",
        ),
        (
            "runs/demo/modle",
            f"there is no such folder; models nearby: {SHIPPED}, runs/demo/model; "
            "did you mean 'runs/demo/model'?",
        ),
        ("./none", f"there is no such folder; models nearby: {SHIPPED}, runs/demo/model."),
        ("runs/demo/model/config.json", "it is a file; give the folder it is in."),
        ("notes", "cannot load 'notes': it is a file; give the folder it is in."),
        ("runs/begun", "is a run with an unfinished model (no model/config.json); continue with --resume."),
        ("runs", "there is no model in 'runs' (no config.json); there is one in runs/demo/model."),
        (" ", f"the model name is empty; models nearby: {SHIPPED}, runs/demo/model."),
        ("", f"the model name is empty; models nearby: {SHIPPED}, runs/demo/model."),
        ("m" * 300, "File name too long."),
    ],
)
def test_wrong_name_is_explained(workspace, name, ending):
    with pytest.raises(InputError) as caught:
        load_language_model_and_tokenizer(name)
    assert str(caught.value).endswith(ending)


def test_flops_suggests_models_and_recipes(workspace, capsys):
    message = failure(capsys, "flops", "stoires")
    assert "there is no recipe 'stoires'" in message and message.endswith("did you mean 'stories'?")
    assert failure(capsys, "flops", "laptp").endswith("runs/demo/model.")
    assert "did you mean 'laptop'" in failure(capsys, "flops", "laptp")


def test_name_is_looked_up_without_importing_torch(tmp_path):
    """The commands do this before they import anything heavy."""
    program = (
        "import sys; from calm.models.missing import check_model_exists; from calm.errors import InputError\n"
        "check_model_exists('stories')\n"
        "try:\n    check_model_exists('stoires')\n"
        "except InputError as error:\n    print(error)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    setup = "import sys, types; sys.modules['calm_command'] = types.SimpleNamespace(is_running=True); "
    done = subprocess.run(
        [sys.executable, "-c", setup + program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "cannot load 'stoires'" in done.stdout and "did you mean 'stories'?" in done.stdout


def test_deeply_nested_configuration_nearby_is_skipped(tmp_path):
    """It must not turn the message about another model into a traceback."""
    for name, config in (("deep", "[" * 100_000), ("good", '{"model_type": "calm"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"there is no such folder.*good"):
        resolve_name(str(tmp_path / "none"))
