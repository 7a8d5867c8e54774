"""`calm evaluate` at toy size: floors, layouts, and text that is not prepared."""

import shutil

from calm.cli import main
from calm.data.prepared import load_prepared
from calm.evaluation import held_out


def test_evaluate_with_floors(room, capsys):
    main(
        ["evaluate", str(room / "run/model"), str(room / "run/data"), "--context", "64", "--ngrams", "[2,3]"]
    )
    out = capsys.readouterr().out
    for word in ("reconstruction", "2-gram", "3-gram", "CALM", "Brier-4", "blocks of 64 tokens"):
        assert word in out


def test_floors_of_a_long_text_are_counted_if_asked_for(room, capsys, monkeypatch, tmp_path):
    tokens = load_prepared(room / "run/data").counts().tokens["train"]
    monkeypatch.setattr(held_out, "_MAX_COUNTED", tokens - 1)
    arguments = ["evaluate", str(room / "run/model"), str(room / "run/data"), "--context", "64"]
    main([*arguments, "--ngrams", "[2,3]"])
    said = capsys.readouterr()
    assert "2-gram" in said.out and "no n-gram floors" not in said.err
    main(["compare", str(room / "run"), "--output", str(tmp_path / "out"), "--context", "64"])
    said = capsys.readouterr()
    assert "report.html" in said.out and "3-gram" not in said.out
    assert (
        f"no n-gram floors: the training text has {tokens:,} tokens, which would take about 0 GiB" in said.err
    )


def test_evaluate_text_files(room, capsys):
    main(
        [
            "evaluate",
            str(room / "run/model"),
            str(room / "text.jsonl"),
            "--context",
            "64",
            "--max_blocks",
            "3",
        ]
    )
    assert "CALM" in capsys.readouterr().out


def test_text_is_laid_out_as_by_the_models_recipe(room, capsys, tmp_path):
    data = str(room / "run/data")
    for model in (room / "run", room / "run/model"):
        main(["evaluate", str(model), data])
        assert "blocks of 64 tokens, layout documents" in " ".join(capsys.readouterr().out.split())
    main(["evaluate", str(room / "run"), data, "--layout", "packed", "--context", "32"])
    assert "blocks of 32 tokens, layout packed" in " ".join(capsys.readouterr().out.split())
    shutil.copytree(room / "run/model", tmp_path / "model")
    for text in (None, "chunk_size: 4\nno_such_setting: 1\n"):
        (tmp_path / "model/recipe.yaml").unlink()
        if text is not None:
            (tmp_path / "model/recipe.yaml").write_text(text)
        main(["evaluate", str(tmp_path / "model"), data])
        assert "blocks of 1024 tokens" in capsys.readouterr().out
        (tmp_path / "model/recipe.yaml").touch()


def test_the_published_protocol(room, capsys):
    main(["evaluate", str(room / "run/model"), str(room / "run/data"), "--protocol", "published"])
    assert "blocks of 8192 tokens" in capsys.readouterr().out
