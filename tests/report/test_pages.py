"""Pages that hold all they show."""

import base64
import re
import sys

import pytest

from calm.errors import InputError
from calm.report.pages import image_of, new_figure, page_of, table_of


def test_texts_are_escaped():
    assert "<title>a &lt;b&gt;</title>" in page_of("a <b>", "<p>body</p>")
    table = table_of("<x>", ["<y>"], [("<z>", ["<script>", "1"])])
    assert "&lt;script&gt;" in table and "<script>" not in table and "&lt;x&gt;" in table
    assert 'alt="a &quot;b&quot;"' in image_of(new_figure(1, 1), 'a "b"')


def test_an_image_is_part_of_the_page_and_a_file_if_one_is_named(tmp_path):
    tag = image_of(new_figure(1, 1), "a", tmp_path / "a.png")
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', tag)
    assert base64.b64decode(data) == (tmp_path / "a.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_asks_nothing_of_the_network():
    assert not re.search(r"(src|href)=|url\(", page_of("a", "b"))


def test_a_report_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'calm-lm\[report\]'"):
        new_figure(1, 1)
