"""Files of JSON lines: whole lines or none, whatever else stands in them."""

import tracemalloc
from pathlib import Path

import pytest

from ig_dist.storage.json_lines import MOST_LINE_BYTES, append, read_lines


def test_a_line_that_was_cut_off_is_ended_and_what_is_none_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    append(file, {"step": 1})
    with file.open("ab") as cut:
        cut.write(b'[]\n{"step": 2, "lo')
    append(file, {"step": 3})
    assert list(read_lines(file)) == [{"step": 1}, {"step": 3}]
    assert list(read_lines(file, last_bytes=20)) == [{"step": 3}] and not list(read_lines(file, last_bytes=3))
    assert file.read_bytes().endswith(b'"lo\n{"step": 3}\n')


def test_a_line_without_end_takes_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    append(file, {"step": 1})
    with file.open("ab") as sparse:
        sparse.truncate(64 * MOST_LINE_BYTES)
    append(file, {"step": 2})
    tracemalloc.start()
    try:
        assert list(read_lines(file)) == [{"step": 1}, {"step": 2}]
        assert tracemalloc.get_traced_memory()[1] < 16 * MOST_LINE_BYTES
    finally:
        tracemalloc.stop()


def test_where_there_is_nothing_to_append_to(tmp_path: Path) -> None:
    assert not list(read_lines(tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        append(tmp_path / "no folder" / "lines", {})
