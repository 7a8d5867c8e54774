"""Datasets of the library `datasets`, in memory, saved or on the hub: the same text as from files."""

import json
import logging
import shutil

import datasets
import pytest
from toy import failure

from calm.cli import main
from calm.data import shards
from calm.data.files import find_files
from calm.data.options import ReadingOptions
from calm.data.prepare import prepare
from calm.data.prepared import held_out_data, load_prepared
from calm.data.records import load_records
from calm.data.shards import find_shards
from calm.data.sources import load_documents
from calm.data.stories import stories
from calm.errors import InputError

TEXTS = list(stories(0, 12))
WITH_NULLS = [TEXTS[0], None, TEXTS[1], "", " \n", *TEXTS[2:], None]
DASHES = ReadingOptions(separator="---")


def records(texts, **fields):
    return [{"n": number, "text": text, **fields} for number, text in enumerate(texts)]


def as_jsonl(path, rows):
    file = path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def as_parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path / "texts.parquet")
    return str(path / "texts.parquet")


def as_folder(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path / "saved")
    return str(path / "saved")


def as_several_files(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path / "saved", num_shards=min(3, len(rows)))
    return str(path / "saved")


def as_folder_of_splits(path, rows):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path / "saved")
    return str(path / "saved")


def as_hub_dataset(path, rows):
    as_jsonl(path, rows)
    return "someone/texts"


def in_memory(path, rows):
    return datasets.Dataset.from_list(rows)


def in_memory_splits(path, rows):
    return datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})


def as_torch(path, rows):
    return datasets.Dataset.from_list(rows).with_format("torch")


def as_iterable(path, rows):
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)


def as_generated(path, rows):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


FORMS = (as_jsonl, as_parquet, as_folder, as_several_files, as_folder_of_splits, as_hub_dataset, in_memory,
         in_memory_splits, as_torch, as_iterable, as_generated)  # fmt: skip
in_every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
ON_DISK = FORMS[:5]


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """A hub with one dataset, and a cache for each test."""
    original = datasets.load_dataset

    def load(name, config, split, streaming):
        assert (name, config, split) == ("someone/texts", None, "train")
        cache = str(tmp_path / "cache")
        file = str(tmp_path / "texts.jsonl")
        return original("json", data_files=file, split=split, streaming=streaming, cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def texts_in(source, cache, **options):
    return list(load_documents([source], ReadingOptions(**options), cache_dir=str(cache)).texts["text"])


@pytest.fixture(scope="module")
def digest(tmp_path_factory):
    """The digest of the texts prepared from a single text file."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "all.txt").write_text("\n---\n".join(TEXTS))
    return prepare(str(folder), folder / "out", options=DASHES, vocab_size=300, num_proc=1).digest


@in_every_form
@pytest.mark.parametrize("texts", [TEXTS, WITH_NULLS], ids=["all texts", "with nulls"])
def test_texts_in_any_form_give_the_same_prepared_text(form, texts, digest, tmp_path, caplog):
    """Records without text are skipped, and counted, in all of them alike."""
    with caplog.at_level(logging.INFO):
        data = prepare(form(tmp_path, records(texts)), tmp_path / "out", vocab_size=300, num_proc=1)
    assert data.digest == digest
    messages = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    skipped = len(texts) - len(TEXTS)
    assert messages == ["text: skipped 4 records without text"] * bool(skipped)
    assert json.loads((tmp_path / "out/prepared.json").read_text())["records_without_text"] == skipped


@pytest.mark.parametrize("suffix", [".md", ".rst", ".text", ""])
def test_plain_text_of_any_suffix_gives_the_same_prepared_text(suffix, digest, tmp_path):
    (tmp_path / "texts").mkdir()
    files = [tmp_path / f"texts/{number:02}{suffix}" for number in range(len(TEXTS))]
    for file, text in zip(files, TEXTS, strict=True):
        file.write_text(text + "\n")
    sources = [tmp_path / "texts"] if suffix else files
    assert prepare(sources, tmp_path / "out", vocab_size=300, num_proc=2).digest == digest


@in_every_form
def test_streams_skip_the_same_records(form, tmp_path):
    parts = find_shards([form(tmp_path, records(WITH_NULLS))], ReadingOptions())
    documents = [text for shard in parts for text in shard.read()]
    assert [text for text in documents if text is not None] == TEXTS
    assert documents.count(None) == 4


@in_every_form
@pytest.mark.parametrize("fields", ["title,text", "title, text", ["title", "text"]])
def test_several_fields_are_joined(form, fields, tmp_path):
    """With a blank line between them; null and blank fields are left out."""
    rows = [
        {"text": "told", "title": "One"},
        {"text": "told too", "title": None},
        {"text": " ", "title": "Three"},
        {"text": None, "title": ""},
    ]
    documents = load_documents(
        [form(tmp_path, rows)], ReadingOptions(text_field=fields), cache_dir=str(tmp_path / "cache")
    )
    assert list(documents.texts["text"]) == ["One\n\ntold", "told too", "Three"]
    assert documents.num_skipped == 1


@in_every_form
@pytest.mark.parametrize("fields", ["body", "text,body"])
def test_missing_field_is_refused(form, fields, tmp_path):
    with pytest.raises(InputError, match=r"has no field 'body'; its fields are n, text\. Name another with"):
        texts_in(form(tmp_path, records(TEXTS)), tmp_path / "cache", text_field=fields)


@in_every_form
def test_field_of_numbers_is_refused(form, tmp_path):
    with pytest.raises(InputError, match=r"(field|column) 'n'.* not text"):
        texts_in(form(tmp_path, records(TEXTS)), tmp_path / "cache", text_field="text,n")


def test_a_row_is_named_by_its_number_in_the_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_PART_BYTES", 3000)
    rows = datasets.Dataset.from_list(records([*TEXTS[:9], "x" * 10**6 + "y"]))
    rows.save_to_disk(tmp_path / "saved")
    parts = find_shards([str(tmp_path / "saved")], ReadingOptions(max_document_mb=1))
    assert len(parts) > 2
    with pytest.raises(InputError, match=r"the text of '.*saved', row 9, is longer than 1 MB"):
        [text for part in parts for text in part.read()]


@in_every_form
def test_dataset_of_nulls_is_refused(form, tmp_path):
    with pytest.raises(InputError, match=r"there is no text in .*; give a source with text"):
        texts_in(form(tmp_path, records([None, None])), tmp_path / "cache")


@in_every_form
def test_too_long_text_is_refused(form, tmp_path):
    with pytest.raises(InputError, match=r"is longer than 1 MB; split it, or raise --max_document_mb"):
        texts_in(form(tmp_path, records(["a" * 10**6, "b" * (10**6 + 1)])), tmp_path / "c", max_document_mb=1)


@pytest.mark.parametrize("names", ["", " ", ",", "a,,b", "a,a", [], [""], ["a", "a"]])
def test_invalid_names_of_fields_are_refused(names):
    with pytest.raises(
        InputError, match=r"text_field must name one field, or several such as title,text; got"
    ):
        ReadingOptions(text_field=names)


def test_name_of_a_field_with_a_comma_is_given_in_a_list(tmp_path):
    source = datasets.Dataset.from_dict({"a,b": TEXTS})
    assert texts_in(source, tmp_path, text_field=["a,b"]) == TEXTS


def test_the_order_of_sources_is_kept(tmp_path):
    rows = records(TEXTS)
    sources = [
        in_memory(tmp_path, rows[:3]),
        as_parquet(tmp_path, rows[3:5]),
        as_several_files(tmp_path, rows[5:9]),
        as_hub_dataset(tmp_path, rows[9:11]),
        in_memory(tmp_path, rows[11:]),
    ]
    for num_proc in (1, 2):
        documents = load_documents(
            sources, ReadingOptions(), cache_dir=str(tmp_path / f"cache{num_proc}"), num_proc=num_proc
        )
        assert list(documents.texts["text"]) == TEXTS


def test_shuffled_selection_of_a_dataset_is_read_in_its_order(tmp_path):
    chosen = datasets.load_from_disk(as_folder(tmp_path, records(TEXTS))).shuffle(seed=1).select(range(5))
    assert texts_in(chosen, tmp_path / "cache") == list(chosen["text"]) != TEXTS[:5]


@pytest.mark.parametrize("is_saved", [True, False])
def test_validation_split_of_a_dataset_is_held_out(is_saved, tmp_path, caplog):
    splits = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(records(TEXTS[:8])),
            "validation": datasets.Dataset.from_list(records([None, *TEXTS[8:]])),
            "test": datasets.Dataset.from_list(records(["never read"])),
        }
    )
    splits.save_to_disk(tmp_path / "saved")
    source = str(tmp_path / "saved") if is_saved else splits
    with caplog.at_level(logging.INFO):
        data = prepare(source, tmp_path / "out", vocab_size=300, num_proc=1)
    held_out = [data.tokenizer.decode(ids, skip_special_tokens=True) for ids in data.validation["input_ids"]]
    assert held_out == TEXTS[8:] and len(data.train) == 8
    assert "its own split 'validation' is held out" in caplog.text
    given = prepare(source, tmp_path / "given", vocab_size=300, num_proc=1, validation_sources=splits["test"])
    assert len(given.validation) == 1
    if is_saved:
        scored = held_out_data([source], data.tokenizer, ReadingOptions())
        assert len(scored.validation) == 4
        (tmp_path / "more.txt").write_text("And this.")
        combined = held_out_data([source, str(tmp_path / "more.txt")], data.tokenizer, ReadingOptions())
        assert len(combined.validation) == 5


def test_splits_without_a_training_split_are_refused(tmp_path):
    splits = datasets.DatasetDict({"test": in_memory(tmp_path, records(TEXTS))})
    splits.save_to_disk(tmp_path / "saved")
    for source in (splits, str(tmp_path / "saved")):
        with pytest.raises(InputError, match=r"has no split 'train'; its splits are test\. Give one of them"):
            prepare(source, tmp_path / "out")
    assert texts_in(str(tmp_path / "saved/test"), tmp_path / "cache") == TEXTS


def test_prepared_text_is_refused_as_a_source(tmp_path, capsys):
    prepare(in_memory(tmp_path, records(TEXTS)), tmp_path / "out", vocab_size=300, num_proc=1)
    with pytest.raises(
        InputError, match=r"out' is prepared text, which a recipe accepts only as its sole source"
    ):
        prepare([tmp_path / "out"], tmp_path / "again")
    with pytest.raises(InputError, match=r"has no field 'text'; its fields are input_ids"):
        prepare(tmp_path / "out/train", tmp_path / "again", num_proc=1)


@pytest.mark.parametrize("source", [["a", "b"], 3, None, {"train": ["a"]}, iter("ab")])
def test_invalid_sources_are_refused(source, tmp_path):
    with pytest.raises(InputError, match=r"a source must be a name or a dataset of .*\.from_dict"):
        prepare([source], tmp_path / "out")
    with pytest.raises(InputError, match=r"a source must be a name or a dataset of"):
        prepare(in_memory(tmp_path, records(TEXTS)), tmp_path / "out", validation_sources=[source])
    assert list(tmp_path.iterdir()) == []


def test_saved_dataset_below_a_folder_has_to_be_named(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a")
    as_folder(tmp_path, records(TEXTS))
    with caplog.at_level(logging.INFO):
        assert find_files(tmp_path, log_excluded=True) == [tmp_path / "a.txt"]
    assert "left out: saved datasets, which need to be named (1)" in caplog.text


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}"])
def test_damaged_saved_dataset_is_refused(file, damage, tmp_path):
    source = as_folder(tmp_path, records(TEXTS))
    (tmp_path / "saved" / file).write_bytes(damage)
    if (file, damage) == ("dataset_info.json", b"{}"):
        assert texts_in(source, tmp_path / "cache") == TEXTS  # The features are in the Arrow file as well.
        return
    with pytest.raises(InputError, match=r"saved.*damaged") as caught:
        texts_in(source, tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "/etc/hostname", "..", ""])
def test_saved_dataset_that_names_outside_files_is_refused(name, tmp_path):
    source = as_folder(tmp_path, records(TEXTS))
    shutil.copytree(source, tmp_path / "other")
    state = json.loads((tmp_path / "saved/state.json").read_text())
    state["_data_files"][0]["filename"] = name
    (tmp_path / "saved/state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"names a file outside its folder|is damaged"):
        texts_in(source, tmp_path / "cache")


@pytest.mark.parametrize("form", ON_DISK[2:], ids=lambda form: form.__name__)
def test_flipped_byte_in_a_saved_dataset_does_not_crash(form, tmp_path):
    """Arrow trusts the file that it maps: with a wrong length, it would read beyond its end."""
    source = form(tmp_path, records(TEXTS))
    file = max((tmp_path / "saved").rglob("*.arrow"))
    original = file.read_bytes()
    for offset in range(0, len(original), 97):
        file.write_bytes(original[:offset] + bytes([original[offset] ^ 255]) + original[offset + 1 :])
        try:
            texts_in(source, tmp_path / f"cache{offset}")
        except InputError as error:
            assert "\n" not in str(error)


def test_splits_outside_their_folder_are_refused(tmp_path):
    as_folder(tmp_path, records(TEXTS))
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/dataset_dict.json").write_text('{"splits": ["train", "../saved"]}')
    with pytest.raises(InputError, match=r"names a file outside its folder \('\.\./saved'\)"):
        texts_in(str(tmp_path / "splits"), tmp_path / "cache")


def test_records_of_a_saved_dataset_are_read(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    source = as_folder(tmp_path, rows)
    assert list(load_records([source])) == [(f"'{source}', row {i}", row) for i, row in enumerate(rows)]


def test_the_command_line_takes_a_saved_dataset_and_several_fields(tmp_path, capsys):
    source = as_folder(tmp_path, records(TEXTS, title="A title"))
    command = ["prepare", source, "--vocab_size", "300", "--num_proc", "1"]
    main([*command, "--output", str(tmp_path / "a"), "--text_field", "title,text"])
    main([*command, "--output", str(tmp_path / "b"), "--text_field", "[title, text]"])
    a, b = (load_prepared(tmp_path / name) for name in "ab")
    assert a.digest == b.digest
    assert a.tokenizer.decode(a.train[0]["input_ids"], skip_special_tokens=True).startswith("A title\n\n")
    wrong = [*command, "--output", str(tmp_path / "c"), "--text_field", "titel,text"]
    assert "has no field 'titel'; its fields are n, text, title" in failure(capsys, *wrong)
    assert not (tmp_path / "c").exists()
