"""Tables: separators, numbers, and complaints that name the line."""

import math

import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io.tables import (
    read_table,
    require_disjoint_subjects,
    resolve_path,
    resolve_paths,
    write_columns,
    write_table,
)

pytestmark = pytest.mark.core


def make(folder, text, name="a.csv", encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separators_marks_quotes_and_blank_lines(tmp_path, mark, encoding, end):
    lines = ["path, label", "", f'"a{mark} 1.nii",Ü', ",", '"two""s",y ']
    text = end.join(line.replace(",", mark) for line in lines)
    table = read_table(make(tmp_path, text, encoding=encoding), ("path", "label"))
    assert table.rows == (
        {"path": f"a{mark} 1.nii", "label": "Ü"},
        {"path": 'two"s', "label": "y"},
    )
    assert table.lines == (3, 5)
    assert len(table) == 2


ROWS = [["subject", "age", "Größe"], ["s 1", "70.5", "1.25"], ["s2", "61", ""], ["s3", "8e1", "2"]]


@pytest.mark.parametrize("decimal", [".", ","])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
@pytest.mark.parametrize("mark", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
def test_tables_as_programs_write_them(tmp_path, mark, encoding, decimal):
    quote = '"' if mark == decimal else ""
    for index in (False, True):
        for comment in ("", "# exported on Monday\n\n", "% two\n# lines; a, b\n"):
            rows = [[f"{quote}{cell.replace('.', decimal)}{quote}" for cell in row] for row in ROWS]
            if index:
                rows = [["", *rows[0]], *([str(i), *row] for i, row in enumerate(rows[1:]))]
            text = comment + "".join(mark.join(row) + "\r\n" for row in rows)
            table = read_table(make(tmp_path, text, encoding=encoding), ("subject", "age"))
            assert table.columns == ("subject", "age", "Größe") and table.column("subject") == ["s 1", "s2", "s3"]
            assert table.floats("age") == [70.5, 61, 80]
            assert table.floats("Größe", allow_missing=True)[::2] == [1.25, 2]
            assert table.lines[0] == 2 + comment.count("\n")
            found = [word in table.note for word in ("separated by", "decimal commas", "in Latin-1", "in UTF-")]
            is_wide = encoding in ("utf-16", "utf-16-le", "utf-32")
            assert found == [mark != ",", decimal == ",", encoding == "latin-1", is_wide]


def test_tables_between_blanks_and_headers_in_a_comment(tmp_path):
    table = read_table(make(tmp_path, "subject  age L_a\ns1   70.5   1\ns2 61 \t 2\n"), ("subject", "age"))
    assert table.floats("age") == [70.5, 61] and "blanks" in table.note
    table = read_table(make(tmp_path, "#subject\tage\ns1\t70.5\ns2\t61\n"), ("subject", "age"))
    assert table.column("subject") == ["s1", "s2"]
    # Words of one column are no columns.
    assert read_table(make(tmp_path, "path\na b.nii\nc d.nii\n")).column("path") == ["a b.nii", "c d.nii"]


@pytest.mark.parametrize("cell", ["", "NA", "n/a", "NaN", "nan", "<NA>", "#N/A", "null", "None", "."])
def test_words_for_what_was_not_measured(tmp_path, cell):
    table = read_table(make(tmp_path, f"a,b\n1,{cell}\n2,3\n"))
    assert math.isnan(table.floats("b", allow_missing=True)[0])
    with pytest.raises(InputError, match="line 2: expected a number under 'b'"):
        table.floats("b")


def test_thousands_and_mixed_decimals_are_no_numbers(tmp_path):
    for text in ("a;b\n1,234;1\n2,345;1\n", "a;b\n1,5;1\n2.5;1\n"):
        with pytest.raises(InputError, match="decimals with a point and thousands without"):
            read_table(make(tmp_path, text)).floats("a")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty file"),
        ("\n\n", "blank lines"),
        ("path,label\n", "nothing below"),
        ("path,Lable\na,1\n", "did you mean 'Lable'"),
        ("path,x\na,1\n", "found the columns path, x"),
        ("path,label\na,1\nb,\n", r"a.csv line 3: expected a value under 'label'"),
        ("path,label,path\na,1,b\n", "'path' twice"),
        ("path,,label\na,1,b\n", "column 2 without"),
        ("path,label\na,1\nb,1,2\n", "line 3: expected 2 cells, found 3"),
        ("path,label\na\n", "line 2: expected 2 cells, found 1"),
        ('path,label\n"a"b,1\n', "line 2: expected a CSV row"),
        ('path,label\n"a,1\n', "expected a CSV row"),
        ("path,label,spilt\na,1,2\n", "expected a column 'split' or none, found 'spilt'"),
        ("path\0,label\na,1\n", "not text"),
    ],
)
def test_wrong_tables_are_told(tmp_path, text, words):
    with pytest.raises(InputError, match=words) as caught:
        read_table(make(tmp_path, text), ("path", "label"), ("split", "subject"))
    assert str(caught.value).startswith(str(tmp_path / "a.csv"))


def test_binary_and_missing_files_are_told(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\x1f\x8b\xff\xfe\x80")
    with pytest.raises(InputError, match="UTF-8"):
        read_table(tmp_path / "a.csv")
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "b.csv")


def test_numbers_are_read_and_wrong_ones_named(tmp_path):
    table = read_table(make(tmp_path, "a;b;c;d\n1;2.5;;3,5\n2;-1e3;4;1\n"))
    assert table.integers("a") == [1, 2]
    assert table.floats("b") == [2.5, -1000.0]
    values = table.floats("c", allow_missing=True)
    assert math.isnan(values[0]) and values[1] == 4
    for column, words in {
        "c": "line 2: expected a number under 'c', found an empty cell",
        "d": "line 2: .* found '3,5'; write decimals with a point",
        "e": "expected a column 'e'",
    }.items():
        with pytest.raises(InputError, match=words):
            table.floats(column)
    with pytest.raises(InputError, match="whole number under 'b', found '2.5'"):
        table.integers("b")


def test_subject_in_two_splits_is_refused(tmp_path):
    require_disjoint_subjects(read_table(make(tmp_path, "subject,split\na,train\nb,test\n")))
    text = "subject,split\na,train\nb,test\na,test\nb,train\n"
    with pytest.raises(InputError, match="'a' in test and train, and 1 more"):
        require_disjoint_subjects(read_table(make(tmp_path, text)))


def test_paths_start_at_the_folder_of_the_table(tmp_path):
    (tmp_path / "here.nii").write_text("x")
    table = read_table(make(tmp_path, f"path\nhere.nii\n{tmp_path}/here.nii\n"))
    assert resolve_paths(table) == [tmp_path / "here.nii"] * 2
    assert resolve_path("/x/a.nii", tmp_path).as_posix() == "/x/a.nii"
    table = read_table(make(tmp_path, "path\nhere.nii\n1\n2\n3\n4\n"))
    with pytest.raises(InputError, match="4 of 5 missing: .*1 .line 3.*3 .line 5., ..."):
        resolve_paths(table)


def test_written_table_returns(tmp_path):
    rows = [{"a": 'x,"y"', "b": 0.1}, {"a": "ü\nz", "b": None}, {"a": "last"}]
    write_table(tmp_path / "t.csv", ("a", "b"), rows)
    table = read_table(tmp_path / "t.csv", ("a",))
    assert table.column("a") == ['x,"y"', "ü\nz", "last"]
    assert table.column("b") == ["0.1", "", ""]
    with pytest.raises(ValueError, match="c"):
        write_table(tmp_path / "u.csv", ("a",), [{"c": 1}])
    assert not (tmp_path / "u.csv").exists()


def test_columns_of_arrays_and_lists_are_written_with_gaps_as_empty_cells(tmp_path):
    columns = {"name": ("a", "b"), "x": np.array([0.5, np.nan], np.float32), "n": np.array([1, 2]), "y": [None, 2.5]}
    write_columns(tmp_path / "c.csv", columns)
    assert (tmp_path / "c.csv").read_text() == "name,x,n,y\na,0.5,1,\nb,,2,2.5\n"
    with pytest.raises(ValueError, match="shorter"):
        write_columns(tmp_path / "d.csv", {"a": [1, 2], "b": [1]})
    assert not (tmp_path / "d.csv").exists()
