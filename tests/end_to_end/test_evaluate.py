"""`calm evaluate` at toy size: n-gram floors, layouts, and text that is not prepared."""

import shutil

from calm.cli import main
from calm.data.prepared import load_prepared
from calm.evaluation import held_out


def test_evaluate_with_floors(root, capsys):
    main(
        ["evaluate", str(root / "run/model"), str(root / "run/data"), "--context", "64", "--ngrams", "[2,3]"]
    )
    out = capsys.readouterr().out
    for word in ("reconstruction", "2-gram", "3-gram", "CALM", "Brier-4", "blocks of 64 tokens"):
        assert word in out


def test_floors_of_a_long_text_are_counted_only_on_request(root, capsys, monkeypatch, tmp_path):
    tokens = load_prepared(root / "run/data").counts().tokens["train"]
    monkeypatch.setattr(held_out, "_MAX_COUNTED", tokens - 1)
    arguments = ["evaluate", str(root / "run/model"), str(root / "run/data"), "--context", "64"]
    main([*arguments, "--ngrams", "[2,3]"])
    printed = capsys.readouterr()
    assert "2-gram" in printed.out and "no n-gram floors" not in printed.err
    main(["compare", str(root / "run"), "--output", str(tmp_path / "out"), "--context", "64"])
    printed = capsys.readouterr()
    assert "report.html" in printed.out and "3-gram" not in printed.out
    assert (
        f"no n-gram floors: the training text has {tokens:,} tokens, which would take about 0 GiB"
        in printed.err
    )


def test_evaluate_text_files(root, capsys):
    main(["evaluate", str(root / "run/model"), str(root / "text.jsonl"),
          "--context", "64", "--max_blocks", "3"])  # fmt: skip
    assert "CALM" in capsys.readouterr().out


def test_layout_and_context_default_to_the_models_recipe(root, capsys, tmp_path):
    data = str(root / "run/data")
    for model in (root / "run", root / "run/model"):
        main(["evaluate", str(model), data])
        assert "blocks of 64 tokens, layout documents" in " ".join(capsys.readouterr().out.split())
    main(["evaluate", str(root / "run"), data, "--layout", "packed", "--context", "32"])
    assert "blocks of 32 tokens, layout packed" in " ".join(capsys.readouterr().out.split())
    shutil.copytree(root / "run/model", tmp_path / "model")
    for text in (None, "chunk_size: 4\nno_such_setting: 1\n"):
        (tmp_path / "model/recipe.yaml").unlink()
        if text is not None:
            (tmp_path / "model/recipe.yaml").write_text(text)
        main(["evaluate", str(tmp_path / "model"), data])
        assert "blocks of 1024 tokens" in capsys.readouterr().out
        (tmp_path / "model/recipe.yaml").touch()


def test_the_published_protocol_has_blocks_of_8192_tokens(root, capsys):
    main(["evaluate", str(root / "run/model"), str(root / "run/data"), "--protocol", "published"])
    assert "blocks of 8192 tokens" in capsys.readouterr().out
