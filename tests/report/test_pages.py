"""Pages that hold all they show."""

import re

import pytest
from jinja2 import UndefinedError
from reports import Page

from calm.report.pages import Table, page_of
from calm.report.palette import DARK, LIGHT

RUN = {
    "title": "a <b>",
    "facts": {"model": "CALM", "teacher": None, "provenance": {"words": [], "day": None, "date": None}},
    "figures": [],
    "scores": Table("a caption", ["", "BrierLM"], [["CALM", "1.00"]]),
    "notes": [],
    "stages": Table("", ["", "steps"], []),
    "pictures": [],
    "parameters": Table("", ["", "parameters"], []),
    "samples": [],
    "recipe": "seed: 1",
}


def page(**changes):
    return page_of("run.html", **{**RUN, **changes})


def test_all_that_is_shown_is_plain_text():
    table = Table("<i>caption</i>", ["", '"<y>"'], [["<z>", "<script>alert(1)</script>"]])
    text = page(scores=table, notes=["<n>"], recipe="</code></pre><script>")
    for name in ("b", "i", "y", "z", "n", "script"):
        assert f"<{name}>" not in text and Page(text).texts(name) == []
    seen = Page(text)
    assert seen.texts("title") == seen.texts("h1") == ["a <b>"]
    assert seen.texts("td") == ["<script>alert(1)</script>"] and seen.texts("th", scope="row") == ["<z>"]
    assert seen.texts("code") == ["</code></pre><script>"]


def test_a_page_asks_nothing_of_the_network_and_runs_nothing():
    text = page()
    assert not re.search(r"url\(|@import|<script|<link|https?:|\son\w+=", text)
    assert Page(text).attributes("meta", "name") == ["viewport", "color-scheme"]


def test_colours_follow_the_reader_on_a_screen_and_are_light_on_paper():
    (style,) = Page(page()).texts("style")
    light, dark = style.split("@media screen and (prefers-color-scheme: dark)", 1)
    for palette, part in ((LIGHT, light), (DARK, dark)):
        for name, colour in palette.colours.items():
            assert f"--{name}: {colour};" in part
    used = set(re.findall(r"var\(--([\w-]+)\)", style))
    assert used <= set(LIGHT.colours)
    assert not re.findall(r"#[0-9a-f]{3,8}\b", re.sub(r"--[\w-]+: #[0-9a-f]{6};", "", style))


def test_names_are_to_the_left_and_numbers_to_the_right():
    table = Table(
        "c", ["", "run", "BrierLM"], [["CALM", "2024-run", "undefined: Brier-4 below 0"]], num_names=2
    )
    seen = Page(page(scores=table))
    numbers = [(name, text) for name, own, text in seen.elements if own.get("class") == "number"]
    assert [text for name, text in numbers if "Brier" in text] == ["BrierLM", "undefined: Brier-4 below 0"]
    assert "2024-run" in seen.texts("td") and "2024-run" not in dict(map(reversed, numbers))
    (style,) = seen.texts("style")
    assert re.search(r"th, td \{[^}]*text-align: left", style)
    assert re.search(r"\.number[^{]*\{[^}]*text-align: right", style)
    assert not re.search(r"text-align: (center|justify)", style)


def test_a_table_scrolls_in_its_own_box():
    seen = Page(page())
    (box,) = [own for _, own, text in seen.elements if own.get("class") == "scroll" and "BrierLM" in text]
    assert box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] == "Scores"
    assert re.search(r"\.scroll \{ overflow-x: auto; \}", seen.texts("style")[0])


def test_columns_that_nothing_is_known_of_are_left_out():
    table = Table("c", ["", "run", "a", "b"], [["x", "", "1", ""], ["y", "", "", ""]], num_names=2)
    assert table.without_empty_columns() == Table(
        "c", ["", "run", "a"], [["x", "", "1"], ["y", "", ""]], num_names=2
    )


def test_a_value_that_is_missing_is_a_fault_and_no_gap():
    with pytest.raises(UndefinedError):
        page_of("run.html", title="a")
