"""The notebooks run from beginning to end, and are saved with their output."""

import re

import nbformat
import pytest
from docs_pages import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds_of(notebook):
    """The kinds of output of each cell; a set, as a text may come in several parts."""
    return [{output.output_type for output in cell.outputs} for cell in code_of(notebook)]


def shortened(source):
    """The same code with fewer stories, steps and draws: what the model learns is not tested."""
    for long, short in {
        r"num_stories=\d+": "num_stories=300",
        r'training\.steps": \d+': 'training.steps": 40',
        r'evaluate_every": \d+': 'evaluate_every": 20',
        r"shares_of_next_chunk\(\d+": "shares_of_next_chunk(100",
    }.items():
        source = re.sub(long, short, source)
    return source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = nbformat.read(path, as_version=4)
    saved = kinds_of(notebook)
    for cell in code_of(notebook):
        cell.source = shortened(cell.source)
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": tmp_path}}).execute()
    assert kinds_of(notebook) == saved


def test_every_notebook_is_saved_with_a_picture():
    for path in NOTEBOOKS:
        outputs = [output for cell in code_of(nbformat.read(path, as_version=4)) for output in cell.outputs]
        assert any("image/png" in output.get("data", {}) for output in outputs)
    assert len(NOTEBOOKS) == 3
