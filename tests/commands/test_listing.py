"""What there is: recipes and models."""

import json
import shutil
import subprocess
import sys

import pytest
from toy import failure

from calm.cli import main
from calm.models.shipped import shipped_models
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.recipe import Recipe
from calm.training.recipe_settings import shipped_recipes


def figures(capsys, *arguments):
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_recipes(capsys):
    found = figures(capsys, "recipes")
    for command, kind in (("train", Recipe), ("finetune", FinetuningRecipe)):
        assert found[command].keys() == shipped_recipes(kind).keys()
        assert all(len(about) > 50 for about in found[command].values())
    main(["recipes"])
    out = " ".join(capsys.readouterr().out.split())
    assert found["train"]["laptop_quick"][:40] in out and "calm finetune --recipe NAME" in out
    assert out.index("laptop_quick") < out.index("calm_m ")  # What needs many GPUs comes last.


def test_models(tmp_path, monkeypatch, capsys):
    shutil.copytree(shipped_models()["stories"], tmp_path / "runs/one/model")
    (tmp_path / "adapters").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "far/away"}
    (tmp_path / "adapters/adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("[")
    stories = {"type": "calm", "head": "sequential", "K": 4}
    adapters = {"type": "adapters of far/away", "head": None, "K": None}
    monkeypatch.chdir(tmp_path)
    near = {"adapters": adapters, "runs/one/model": stories}
    shipped = {"classics": stories | {"K": 2}, "stories": stories}
    assert figures(capsys, "models") == {**shipped, **near}
    assert figures(capsys, "models", "runs") == {**shipped, "runs/one/model": stories}
    main(["models"])
    out = capsys.readouterr().out
    assert "runs/one/model" in out and "far/away" in out
    assert "there is no folder 'nowhere'" in failure(capsys, "models", "nowhere")


@pytest.mark.parametrize("command", ["recipes", "models"])
def test_lists_need_no_torch(command, tmp_path):
    program = (
        f"import sys; from calm_command import main; sys.argv = ['calm', '{command}']; main(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, capture_output=True)
