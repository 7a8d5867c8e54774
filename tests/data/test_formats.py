"""The table of file formats, and formats that are registered from outside the package."""

import gzip
import importlib
import runpy
import sys
from pathlib import Path

import pytest

import calm
from calm.cli import main
from calm.data import formats
from calm.data.files import find_files
from calm.data.formats import FORMATS, format_of, known_suffixes, read_documents, read_records
from calm.data.options import ReadingOptions
from calm.data.prepared import load_prepared
from calm.data.shards import find_shards
from calm.data.stories import stories
from calm.errors import InputError

EXAMPLE = Path(__file__).parents[2] / "examples/a_data_source_of_your_own.py"


@pytest.fixture(autouse=True)
def undo_registrations(monkeypatch):
    """Formats that a test registers are gone afterwards."""
    monkeypatch.setattr(formats, "FORMATS", dict(FORMATS))
    formats._load_installed.cache_clear()
    yield
    formats._load_installed.cache_clear()


def film(number):
    """A story as the text of a subtitle file."""
    lines = [line for line in next(iter(stories(number, 1))).split(". ") if line]
    times = "00:00:{0:02},000 --> 00:00:{0:02},900"
    return "\n".join(f"{n}\n{times.format(n)}\n<i>{line}</i>\nand on.\n" for n, line in enumerate(lines))


@pytest.fixture
def films(tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    for number in range(11):
        (folder / f"{number}.srt").write_text(film(number))
    (folder / "last.SRT.gz").write_bytes(gzip.compress(film(11).encode()))
    return folder


def test_subtitles_are_unknown_until_they_are_registered(films):
    with pytest.raises(InputError, match=r"holds no \.txt, .*, \.jsonl, \.parquet file"):
        find_files(films)
    assert list(read_documents(films / "0.srt", ReadingOptions())) == [film(0).strip()]  # As plain text.
    runpy.run_path(str(EXAMPLE))
    assert len(find_files(films)) == 12 and known_suffixes()[-1] == ".srt"


def test_registered_format_is_read_by_its_reader(films):
    runpy.run_path(str(EXAMPLE))
    story = next(iter(stories(11, 1)))
    (document,) = read_documents(films / "last.SRT.gz", ReadingOptions())
    assert document == "\n".join(f"{line} and on." for line in story.split(". "))
    shards = find_shards([str(films)], ReadingOptions())
    assert [document for shard in shards for document in shard.read()][-1] == document


def test_mistakes_in_a_registered_format_are_reported(films, capsys):
    runpy.run_path(str(EXAMPLE))
    (films / "5.srt").write_text("Not a film.\n")
    with pytest.raises(SystemExit):
        main(["prepare", str(films), "--output", str(films.parent / "out"), "--num_proc", "1"])
    assert f"calm: error: '{films}/5.srt' holds no subtitles; check that it" in capsys.readouterr().err
    (films / "5.srt").write_bytes(b"1\n00:00:01,000 --> 00:00:02,000\ncaf\xe9\n")
    with pytest.raises(InputError, match=r"5\.srt' is not UTF-8 \(line 3"):
        list(read_documents(films / "5.srt", ReadingOptions()))
    (films / "5.srt.gz").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"5\.srt\.gz': it is damaged"):
        list(read_documents(films / "5.srt.gz", ReadingOptions()))
    with pytest.raises(InputError, match=r"0\.srt' has no records; examples come in \.jsonl or \.parquet f"):
        list(read_records(films / "0.srt"))


@pytest.fixture
def install_format(tmp_path, monkeypatch):
    """Installs a package that registers a format by an entry point."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def install(name, text, suffix):
        dist_info = tmp_path / f"site/{name}-1.0.dist-info"
        dist_info.mkdir(parents=True)
        (tmp_path / f"site/{name}.py").write_text(text)
        (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (dist_info / "entry_points.txt").write_text(f"[calm.formats]\n{suffix} = {name}\n")
        importlib.invalidate_caches()

    yield install
    for name in ("subtitles", "broken"):
        sys.modules.pop(name, None)


def test_command_line_finds_a_format_by_its_entry_point(install_format, films, tmp_path):
    install_format("subtitles", EXAMPLE.read_text(), "srt")
    main(["prepare", str(films), "--output", str(tmp_path / "out"), "--vocab_size", "300",
          "--validation_fraction", "0.2", "--num_proc", "2"])  # fmt: skip
    data = load_prepared(tmp_path / "out")
    assert len(data.train) + len(data.validation) >= 12
    assert "and on." in data.tokenizer.decode(data.train[0]["input_ids"])


def test_format_that_cannot_be_imported_is_skipped(install_format, tmp_path, caplog):
    install_format("broken", "import a_module_that_is_not_there", "srt")
    (tmp_path / "a.txt").write_text("a")
    assert list(read_documents(tmp_path / "a.txt", ReadingOptions())) == ["a"]
    assert "skipping the format 'srt' of broken: No module named 'a_module_that_is_not_" in caplog.text


def test_registered_format_can_supply_records(tmp_path):
    def records(path):
        yield f"'{path}', card 1", {"prompt": "a", "completion": "b"}

    calm.register_format(".cards", lambda path, options: ["a", " "], records)
    (tmp_path / "a.cards").write_text("")
    assert list(read_documents(tmp_path / "a.cards", ReadingOptions())) == ["a"]
    ((location, record),) = read_records(tmp_path / "a.cards")
    assert location.endswith("a.cards', card 1") and record["completion"] == "b"
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InputError, match=r"examples come in \.jsonl or \.parquet or \.cards files"):
        list(read_records(tmp_path / "a.txt"))


def test_longest_matching_suffix_wins():
    calm.register_format(".book.txt", lambda path, options: ["a book"])
    assert list(read_documents(Path("a.book.txt.xz"), ReadingOptions())) == ["a book"]
    assert format_of(Path("a.txt")) is FORMATS[".txt"] and format_of(Path("a.book")) is None


@pytest.mark.parametrize("suffix", ["srt", ".SRT", ".", "", ".gz"])
def test_invalid_suffixes_are_refused(suffix):
    with pytest.raises(ValueError, match=f"begin with a dot, .* got {suffix!r}"):
        calm.register_format(suffix, lambda path, options: [])
