"""`calm recipes` and `calm models`."""

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


def json_of(capsys, *arguments):
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_recipes_are_listed_with_a_description(capsys):
    recipes = json_of(capsys, "recipes")
    for command, kind in (("train", Recipe), ("finetune", FinetuningRecipe)):
        assert recipes[command].keys() == shipped_recipes(kind).keys()
        assert all(len(description) > 50 for description in recipes[command].values())
    main(["recipes"])
    out = " ".join(capsys.readouterr().out.split())
    assert recipes["train"]["laptop_quick"][:40] in out and "calm finetune --recipe NAME" in out
    assert out.index("laptop_quick") < out.index("calm_m ")  # Recipes for many GPUs come last.


def test_models_are_listed_with_type_head_and_chunk_size(tmp_path, monkeypatch, capsys):
    shutil.copytree(shipped_models()["stories"], tmp_path / "runs/one/model")
    (tmp_path / "adapters").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "far/away"}
    (tmp_path / "adapters/adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("[")
    stories = {"type": "calm", "head": "sequential", "K": 4}
    adapters = {"type": "adapters of far/away", "head": None, "K": None}
    monkeypatch.chdir(tmp_path)
    local = {"adapters": adapters, "runs/one/model": stories}
    shipped = {"classics": stories | {"K": 2}, "stories": stories}
    assert json_of(capsys, "models") == {**shipped, **local}
    assert json_of(capsys, "models", "runs") == {**shipped, "runs/one/model": stories}
    main(["models"])
    out = capsys.readouterr().out
    assert "runs/one/model" in out and "far/away" in out
    assert "there is no folder 'nowhere'" in failure(capsys, "models", "nowhere")


@pytest.mark.parametrize("command", ["recipes", "models"])
def test_listing_does_not_import_torch(command, tmp_path):
    program = (
        f"import sys; from calm_command import main; sys.argv = ['calm', '{command}']; main(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, capture_output=True)
