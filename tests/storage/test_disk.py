"""Files of JSON lines: what ends a line, and damaged files."""

import json

import pytest

from calm.errors import InputError
from calm.storage.disk import read_json_lines


def test_json_lines_end_only_in_line_feeds(tmp_path):
    """JSON strings may contain the other characters at which Python splits lines."""
    rows = [{"a": "one\u2028two\u2029three\x85four\x0bfive\r\nsix"}, {"a": "seven"}, {}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert read_json_lines(path) == rows
    path.write_text("")
    assert read_json_lines(path) == []


@pytest.mark.parametrize("text", ['{"a": 1}\n{', "[1]\n", "\ud800"])
def test_damaged_json_lines_are_refused(text, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(InputError, match=r"rows\.jsonl' is damaged"):
        read_json_lines(path)
    with pytest.raises(FileNotFoundError):
        read_json_lines(tmp_path / "none.jsonl")
