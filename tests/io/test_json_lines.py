"""Records by key in a file that only grows: whole lines stay, a torn last one is cut off."""

import pytest

from jaxmed.errors import InputError
from jaxmed.io.json_lines import append_lines, read_lines


def test_lines_are_kept_and_a_torn_last_one_is_cut_off(tmp_path):
    path = tmp_path / "kept" / "replies.jsonl"
    assert read_lines(path) == {}
    with append_lines(path) as append:
        append("a", {"text": "ä\nb"})
        append("b", 2)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "c", "rec')
    assert read_lines(path) == {"a": {"text": "ä\nb"}, "b": 2}
    with append_lines(path) as append:
        append("d", 4)
    assert path.read_bytes().startswith(whole) and read_lines(path) == {"a": {"text": "ä\nb"}, "b": 2, "d": 4}
    path.write_bytes(b"rubbish\n" + whole)
    with pytest.raises(InputError, match="line 1: expected a key and a record"):
        read_lines(path)
