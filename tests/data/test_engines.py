"""Preparing text on Ray workers gives the folder of a single process, even if a worker is killed."""

import gzip
import json
import logging
import signal
import sys
from functools import partial

import pytest

from calm import register_format
from calm.data import formats, sources
from calm.data.engines import open_engine
from calm.data.prepare import prepare
from calm.data.stories import stories
from calm.errors import InputError, RunError

# A format whose reader kills its process when it reads a file for the first time.
DEADLY = """
import os, signal
from pathlib import Path
from calm import register_format

def read(path, options):
    mark = Path(f"{path}.met")
    yield path.read_text()
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

register_format(".deadly", read)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two workers on this machine; an installed package registers a format with them."""
    ray = pytest.importorskip("ray")
    site = tmp_path_factory.mktemp("site")
    (site / "deadly.py").write_text(DEADLY)
    info = site / "deadly-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deadly\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[calm.formats]\ndeadly = deadly\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        path = [str(site), *filter(None, sys.path)]
        patch.setenv("PYTHONPATH", ":".join(path))
        on_sigterm = signal.getsignal(signal.SIGTERM)
        ray.init(num_cpus=2, log_to_driver=False, logging_level="error", include_dashboard=False)
        yield ray
        ray.shutdown()
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray replaces it.


@pytest.fixture
def text(tmp_path):
    """Texts in many forms, with records without text among them."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(3):
        lines = [json.dumps({"text": story}) + "\n" for story in stories(number, 20)]
        (folder / f"{number}.jsonl").write_text('{"text": null}\n'.join(lines))
    (folder / "a.md.gz").write_bytes(gzip.compress(b"# A story\n\n" + next(iter(stories(9, 1))).encode()))
    return folder


def prepared(text, output, **settings):
    """Prepare text; all files that were written, with their contents."""
    prepare(str(text), output, **({"vocab_size": 300, "validation_fraction": 0.1, "num_proc": 1} | settings))
    files = (path for path in output.parent.rglob("*") if path.is_file())
    return {str(path.relative_to(output.parent)): path.read_bytes() for path in files}


@pytest.fixture
def no_local_reading(monkeypatch):
    """Any document that this process reads itself fails the test."""

    def rank_of(text, seed):
        raise AssertionError(f"this process read {text!r}")

    monkeypatch.setattr(sources, "rank_of", rank_of)


def test_two_workers_make_the_folder_of_one_process(cluster, text, tmp_path, small_pieces, request, caplog):
    expected = prepared(text, tmp_path / "one/out")
    request.getfixturevalue("no_local_reading")
    with caplog.at_level(logging.INFO):
        assert prepared(text, tmp_path / "two/out", engine="ray", num_proc=2) == expected
    assert "text: skipped 57 records without text" in caplog.text
    assert {"out/prepared.json", "out/train/data-00000-of-00001.arrow"} <= expected.keys()


def test_a_worker_that_is_killed_is_replaced(cluster, text, tmp_path, small_pieces, monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS))
    register_format(".deadly", lambda path, options: [path.read_text()])
    (text / "b.deadly").write_text("It goes on where it was.")
    expected = prepared(text, tmp_path / "one/out")
    assert prepared(text, tmp_path / "two/out", engine="ray", num_proc=2) == expected
    assert (text / "b.deadly.met").is_file()


def test_bad_record_read_by_a_worker_is_reported_in_one_sentence(cluster, text, tmp_path, small_pieces):
    good = (text / "2.jsonl").read_text()
    (text / "2.jsonl").write_text(f"{good}{{\n")
    before = sorted(text.iterdir())
    with pytest.raises(InputError, match=r"2\.jsonl', line 40, is not JSON .*; fix that line\."):
        prepared(text, tmp_path / "two/out", engine="ray", num_proc=2)
    assert not (tmp_path / "two/out").exists() and sorted(text.iterdir()) == before
    (text / "2.jsonl").write_text(good)
    assert prepared(text, tmp_path / "two/out", engine="ray") == prepared(text, tmp_path / "one/out")


def test_worker_that_cannot_see_the_files_is_reported(cluster, tmp_path):
    with (
        open_engine("ray", 2) as run_ahead,
        pytest.raises(RunError, match=r"a worker failed .*No such file.* All machines must see"),
    ):
        run_ahead([partial(open, tmp_path / "nowhere")])


def test_unreachable_cluster_is_reported(cluster, text, tmp_path, monkeypatch):
    def init(**_):
        raise ConnectionError("Failed to connect to Ray cluster at 1.2.3.4:5")

    monkeypatch.setattr(cluster, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "init", init)
    with pytest.raises(InputError, match=r"cannot reach the Ray cluster \(Failed .*:5\); check RAY_ADDRESS"):
        prepared(text, tmp_path / "out", engine="ray")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_missing_ray_is_reported_before_anything_is_written(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"needs ray\[data\], which is not installed"):
        prepared(text, tmp_path / "out", engine="ray")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
