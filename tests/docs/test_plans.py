"""The plan in docs/scaling.md is what its commands print."""

import contextlib
import io
import json
import re
import shlex

import pytest
from docs_pages import ROOT, examples_of

from calm.cli import main

PAGE = ROOT / "docs/scaling.md"


def rows_of(plans):
    """The rows of the table: label -> a cell for each plan."""
    autoencoders = [plan["stages"]["autoencoder"] for plan in plans]
    models = [plan["stages"]["language model"] for plan in plans]

    def ddp_and_fsdp(cell):
        return [" / ".join(cell(stage["ways"][way]) for way in ("DDP", "FSDP")) for stage in models]

    def gigabytes(way):
        return f"{way['memory']['all'] / 1e9:.1f}{'' if way['fits'] else ' (too much)'}"

    def largest(stages, ways=("DDP", "FSDP"), which="largest_microbatch"):
        return [" / ".join(f"{stage['ways'][way][which]:,}" for way in ways) for stage in stages]

    def microbatches(stage):
        return f"{stage['passes']} of {stage['microbatch_tokens']:,}"

    return {
        "": [f"{plan['devices']} H100" for plan in plans],
        "autoencoder: microbatches of a step, tokens": map(microbatches, autoencoders),
        "GB of a card, DDP": [gigabytes(stage["ways"]["DDP"]) for stage in autoencoders],
        "largest microbatch that fits": largest(autoencoders, ["DDP"]),
        "language model: microbatches of a step, tokens": map(microbatches, models),
        "GB of a card, DDP / FSDP": ddp_and_fsdp(gigabytes),
        "largest microbatch that fits, DDP / FSDP": largest(models),
        "the same with checkpointing": largest(models, which="largest_microbatch_with_checkpointing"),
        "seconds of a step: computing": [
            f"{m['ways']['DDP']['seconds_of_step']['compute']:.3f}" for m in models
        ],
        "sending, DDP / FSDP": ddp_and_fsdp(lambda way: f"{way['seconds_of_step']['communication']:.3f}"),
        "bound by, DDP / FSDP": ddp_and_fsdp(lambda way: way["bound"]),
        "tokens per second and card": ddp_and_fsdp(lambda way: f"{way['tokens_per_card']:,.0f}"),
        "days, DDP / FSDP": ddp_and_fsdp(lambda way: f"{way['seconds'] / 86400:.1f}"),
        "MWh, DDP / FSDP": ddp_and_fsdp(lambda way: f"{way['kilowatt_hours'] / 1000:.1f}"),
    }


def table_of(plans):
    lines = [f"| {' | '.join([name, *cells])} |" for name, cells in rows_of(plans).items()]
    return [lines[0].replace("|  |", "| |"), "|---|" + "---|" * len(plans), *lines[1:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the recipes of the page."""
    folder = tmp_path_factory.mktemp("plans")
    for example in examples_of(PAGE):
        if name := re.match(r"# (\w+\.yaml)\n", example.text):
            (folder / name[1]).write_text(example.text)
    return folder


@pytest.fixture(scope="module")
def plans(folder):
    """The figures that the commands print."""
    commands = re.findall(r"^calm (plan .* --json)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                main(shlex.split(command))
            figures.append(json.loads(out.getvalue()))
    for plan in figures:
        for stage in plan["stages"].values():
            for way in stage["ways"].values():
                way["tokens_per_card"] = way["tokens_per_second"] / plan["devices"]
    return figures


def test_the_table_has_what_its_commands_print(plans):
    assert len(plans) == 3
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in table_of(plans) if line not in lines] == []


def test_the_page_is_right_about_what_breaks_first(plans, folder):
    eight, many, most = (plan["stages"] for plan in plans)
    assert all(
        stage["step_tokens"] * stage["steps"] >= 10**12
        for stage in (plan["language model"] for plan in (eight, many, most))
    )
    assert not eight["autoencoder"]["ways"]["DDP"]["fits"]
    assert eight["autoencoder"]["ways"]["DDP"]["largest_microbatch"] >= 32768
    ways = eight["language model"]["ways"]
    assert not ways["DDP"]["fits"] and ways["FSDP"]["fits"] and ways["DDP"]["largest_microbatch"] >= 16384
    ways = many["language model"]["ways"]
    assert ways["DDP"]["fits"] and (ways["DDP"]["bound"], ways["FSDP"]["bound"]) == (
        "compute",
        "communication",
    )
    assert {way["bound"] for way in most["language model"]["ways"].values()} == {"communication"}
    with pytest.raises(SystemExit):
        main(["plan", str(folder / "trillion.yaml"), "--devices", "512xH100", "--vocab_size", "128256"])
