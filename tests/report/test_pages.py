"""Pages: self-contained, escaped, and laid out for screen and print."""

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


def html_of(**changes):
    return page_of("run.html", **{**RUN, **changes})


def test_everything_shown_is_escaped():
    table = Table("<i>caption</i>", ["", '"<y>"'], [["<z>", "<script>alert(1)</script>"]])
    text = html_of(scores=table, notes=["<n>"], recipe="</code></pre><script>")
    for name in ("b", "i", "y", "z", "n", "script"):
        assert f"<{name}>" not in text and Page(text).texts(name) == []
    parsed = Page(text)
    assert parsed.texts("title") == parsed.texts("h1") == ["a <b>"]
    assert parsed.texts("td") == ["<script>alert(1)</script>"] and parsed.texts("th", scope="row") == ["<z>"]
    assert parsed.texts("code") == ["</code></pre><script>"]


def test_page_loads_nothing_and_runs_no_script():
    text = html_of()
    assert not re.search(r"url\(|@import|<script|<link|https?:|\son\w+=", text)
    assert Page(text).attributes("meta", "name") == ["viewport", "color-scheme"]


def test_colours_follow_the_scheme_on_screen_and_are_light_in_print():
    (style,) = Page(html_of()).texts("style")
    light, dark = style.split("@media screen and (prefers-color-scheme: dark)", 1)
    for palette, css in ((LIGHT, light), (DARK, dark)):
        for name, colour in palette.colours.items():
            assert f"--{name}: {colour};" in css
    used = set(re.findall(r"var\(--([\w-]+)\)", style))
    assert used <= set(LIGHT.colours)
    assert not re.findall(r"#[0-9a-f]{3,8}\b", re.sub(r"--[\w-]+: #[0-9a-f]{6};", "", style))


def test_names_are_left_aligned_and_numbers_right_aligned():
    table = Table(
        "c", ["", "run", "BrierLM"], [["CALM", "2024-run", "undefined: Brier-4 below 0"]], num_names=2
    )
    parsed = Page(html_of(scores=table))
    numbers = [
        (name, text) for name, attributes, text in parsed.elements if attributes.get("class") == "number"
    ]
    assert [text for name, text in numbers if "Brier" in text] == ["BrierLM", "undefined: Brier-4 below 0"]
    assert "2024-run" in parsed.texts("td") and "2024-run" not in dict(map(reversed, numbers))
    (style,) = parsed.texts("style")
    assert re.search(r"th, td \{[^}]*text-align: left", style)
    assert re.search(r"\.number[^{]*\{[^}]*text-align: right", style)
    assert not re.search(r"text-align: (center|justify)", style)


def test_a_table_scrolls_in_its_own_box():
    parsed = Page(html_of())
    (box,) = [
        attributes
        for _, attributes, text in parsed.elements
        if attributes.get("class") == "scroll" and "BrierLM" in text
    ]
    assert box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] == "Scores"
    assert re.search(r"\.scroll \{ overflow-x: auto; \}", parsed.texts("style")[0])


def test_empty_columns_are_left_out():
    table = Table("c", ["", "run", "a", "b"], [["x", "", "1", ""], ["y", "", "", ""]], num_names=2)
    assert table.without_empty_columns() == Table(
        "c", ["", "run", "a"], [["x", "", "1"], ["y", "", ""]], num_names=2
    )


def test_missing_value_is_an_error():
    with pytest.raises(UndefinedError):
        page_of("run.html", title="a")
