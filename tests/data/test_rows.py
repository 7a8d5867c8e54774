"""Datasets of the library `datasets`, in memory and saved, beside files of the same texts."""

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


def records(texts, **more):
    return [{"n": number, "text": text, **more} for number, text in enumerate(texts)]


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
    """A hub of one dataset, and a cache of its own."""
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
    """That of the texts as a single text file."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "all.txt").write_text("\n---\n".join(TEXTS))
    return prepare(str(folder), folder / "out", options=DASHES, vocab_size=300, num_proc=1).digest


@in_every_form
@pytest.mark.parametrize("texts", [TEXTS, WITH_NULLS], ids=["whole", "with nulls"])
def test_the_same_texts_in_any_form_are_the_same_prepared_text(form, texts, digest, tmp_path, caplog):
    """Records without text are skipped, and counted, in all of them alike."""
    with caplog.at_level(logging.INFO):
        data = prepare(form(tmp_path, records(texts)), tmp_path / "out", vocab_size=300, num_proc=1)
    assert data.digest == digest
    told = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    skipped = len(texts) - len(TEXTS)
    assert told == ["text: skipped 4 records without text"] * bool(skipped)
    assert json.loads((tmp_path / "out/prepared.json").read_text())["records_without_text"] == skipped


@pytest.mark.parametrize("suffix", [".md", ".rst", ".text", ""])
def test_plain_text_of_another_name_is_the_same_prepared_text(suffix, digest, tmp_path):
    (tmp_path / "texts").mkdir()
    files = [tmp_path / f"texts/{number:02}{suffix}" for number in range(len(TEXTS))]
    for file, text in zip(files, TEXTS, strict=True):
        file.write_text(text + "\n")
    sources = [tmp_path / "texts"] if suffix else files
    assert prepare(sources, tmp_path / "out", vocab_size=300, num_proc=2).digest == digest


@in_every_form
def test_a_stream_skips_the_same(form, tmp_path):
    found = find_shards([form(tmp_path, records(WITH_NULLS))], ReadingOptions())
    read = [text for shard in found for text in shard.read()]
    assert [text for text in read if text is not None] == TEXTS
    assert read.count(None) == 4


@in_every_form
@pytest.mark.parametrize("fields", ["title,text", "title, text", ["title", "text"]])
def test_several_fields(form, fields, tmp_path):
    """With a blank line between them; what is null or blank is left out."""
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
def test_a_field_that_no_record_has(form, fields, tmp_path):
    with pytest.raises(InputError, match=r"has no field 'body'; its fields are n, text\. Name another with"):
        texts_in(form(tmp_path, records(TEXTS)), tmp_path / "cache", text_field=fields)


@in_every_form
def test_a_field_of_numbers(form, tmp_path):
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
def test_nothing_but_nulls(form, tmp_path):
    with pytest.raises(InputError, match=r"there is no text in .*; give a source with text"):
        texts_in(form(tmp_path, records([None, None])), tmp_path / "cache")


@in_every_form
def test_a_text_that_is_too_long(form, tmp_path):
    with pytest.raises(InputError, match=r"is longer than 1 MB; split it, or raise --max_document_mb"):
        texts_in(form(tmp_path, records(["a" * 10**6, "b" * (10**6 + 1)])), tmp_path / "c", max_document_mb=1)


@pytest.mark.parametrize("names", ["", " ", ",", "a,,b", "a,a", [], [""], ["a", "a"]])
def test_names_of_fields(names):
    with pytest.raises(
        InputError, match=r"text_field must name one field, or several such as title,text; got"
    ):
        ReadingOptions(text_field=names)


def test_a_name_with_a_comma_is_given_in_a_list(tmp_path):
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


def test_what_a_user_has_chosen_of_a_dataset(tmp_path):
    chosen = datasets.load_from_disk(as_folder(tmp_path, records(TEXTS))).shuffle(seed=1).select(range(5))
    assert texts_in(chosen, tmp_path / "cache") == list(chosen["text"]) != TEXTS[:5]


@pytest.mark.parametrize("is_saved", [True, False])
def test_a_split_for_validation_is_held_out(is_saved, tmp_path, caplog):
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
    told = [data.tokenizer.decode(ids, skip_special_tokens=True) for ids in data.validation["input_ids"]]
    assert told == TEXTS[8:] and len(data.train) == 8
    assert "its own split 'validation' is held out" in caplog.text
    other = prepare(source, tmp_path / "other", vocab_size=300, num_proc=1, validation_sources=splits["test"])
    assert len(other.validation) == 1
    if is_saved:
        scored = held_out_data([source], data.tokenizer, ReadingOptions())
        assert len(scored.validation) == 4
        (tmp_path / "more.txt").write_text("And this.")
        both = held_out_data([source, str(tmp_path / "more.txt")], data.tokenizer, ReadingOptions())
        assert len(both.validation) == 5


def test_splits_of_which_none_is_to_train_on(tmp_path):
    splits = datasets.DatasetDict({"test": in_memory(tmp_path, records(TEXTS))})
    splits.save_to_disk(tmp_path / "saved")
    for source in (splits, str(tmp_path / "saved")):
        with pytest.raises(InputError, match=r"has no split 'train'; its splits are test\. Give one of them"):
            prepare(source, tmp_path / "out")
    assert texts_in(str(tmp_path / "saved/test"), tmp_path / "cache") == TEXTS


def test_prepared_text_is_no_source_of_text(tmp_path, capsys):
    prepare(in_memory(tmp_path, records(TEXTS)), tmp_path / "out", vocab_size=300, num_proc=1)
    with pytest.raises(
        InputError, match=r"out' is prepared text, which a recipe accepts only as its sole source"
    ):
        prepare([tmp_path / "out"], tmp_path / "again")
    with pytest.raises(InputError, match=r"has no field 'text'; its fields are input_ids"):
        prepare(tmp_path / "out/train", tmp_path / "again", num_proc=1)


@pytest.mark.parametrize("source", [["a", "b"], 3, None, {"train": ["a"]}, iter("ab")])
def test_what_is_no_source(source, tmp_path):
    with pytest.raises(InputError, match=r"a source must be a name or a dataset of .*\.from_dict"):
        prepare([source], tmp_path / "out")
    with pytest.raises(InputError, match=r"a source must be a name or a dataset of"):
        prepare(in_memory(tmp_path, records(TEXTS)), tmp_path / "out", validation_sources=[source])
    assert list(tmp_path.iterdir()) == []


def test_a_saved_dataset_below_a_folder_has_to_be_named(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a")
    as_folder(tmp_path, records(TEXTS))
    with caplog.at_level(logging.INFO):
        assert find_files(tmp_path, log_excluded=True) == [tmp_path / "a.txt"]
    assert "left out: saved datasets, which need to be named (1)" in caplog.text


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}"])
def test_a_damaged_folder(file, damage, tmp_path):
    source = as_folder(tmp_path, records(TEXTS))
    (tmp_path / "saved" / file).write_bytes(damage)
    if (file, damage) == ("dataset_info.json", b"{}"):
        assert texts_in(source, tmp_path / "cache") == TEXTS  # The features are in the Arrow file as well.
        return
    with pytest.raises(InputError, match=r"saved.*damaged") as caught:
        texts_in(source, tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "/etc/hostname", "..", ""])
def test_a_folder_that_names_files_outside(name, tmp_path):
    source = as_folder(tmp_path, records(TEXTS))
    shutil.copytree(source, tmp_path / "other")
    state = json.loads((tmp_path / "saved/state.json").read_text())
    state["_data_files"][0]["filename"] = name
    (tmp_path / "saved/state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"names a file outside its folder|is damaged"):
        texts_in(source, tmp_path / "cache")


@pytest.mark.parametrize("form", ON_DISK[2:], ids=lambda form: form.__name__)
def test_a_folder_with_a_flipped_byte(form, tmp_path):
    """Arrow trusts what it maps: a length that is wrong would be read beyond the file."""
    source = form(tmp_path, records(TEXTS))
    file = max((tmp_path / "saved").rglob("*.arrow"))
    whole = file.read_bytes()
    for place in range(0, len(whole), 97):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            texts_in(source, tmp_path / f"cache{place}")
        except InputError as error:
            assert "\n" not in str(error)


def test_splits_that_lie_outside(tmp_path):
    as_folder(tmp_path, records(TEXTS))
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/dataset_dict.json").write_text('{"splits": ["train", "../saved"]}')
    with pytest.raises(InputError, match=r"names a file outside its folder \('\.\./saved'\)"):
        texts_in(str(tmp_path / "splits"), tmp_path / "cache")


def test_records_of_a_saved_dataset(tmp_path):
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
