"""Connectomes in every form that people save them in are the same matrix; what could be read in two ways is refused."""

import io
import itertools
import zipfile

import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io.connectomes import names_beside, order_by_name, read_names, read_square
from jaxmed.io.tables import read_table

pytestmark = pytest.mark.core

REGIONS = ("L_Gyrus-Süd", "L_b", "R_Gyrus-Süd", "R_b")
MATRIX = np.array([[0, 2.5, 1, 0], [2.5, 0, 0, 0.125], [1, 0, 0, 3], [0, 0.125, 3, 0]])
MARKS = {"comma": ",", "semicolon": ";", "tab": "\t", "blank": " ", "blanks": "   "}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1")


def cells_of(index, header, decimal):
    """The matrix as rows of words, with names or numbers of rows, or none, and a header of names, numbers or none."""
    body = [[f"{value:g}".replace(".", decimal) for value in row] for row in MATRIX]
    first = {"names": list(REGIONS), "numbers": ["0", "1", "2", "3"], "none": None}
    if first[index]:
        body = [[name, *row] for name, row in zip(first[index], body, strict=True)]
    above = first[header]
    if above is None:
        return body
    return [["", *above] if index != "none" else above, *body]


def read(tmp_path, text, encoding="utf-8", name="a.txt"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    notes = []
    return read_square(path, notes), " ".join(notes)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("mark", MARKS.values(), ids=MARKS)
def test_separators_encodings_comments_indices_headers_and_decimals(tmp_path, mark, encoding):
    comments = (
        "",
        "# command_history: tck2connectome tracks.tck nodes.mif\n\n",
        "% made by hand; Größe\n% in 2 steps\n",
    )
    forms = list(itertools.product(("names", "numbers", "none"), ("names", "numbers", "none"), comments, (".", ",")))
    if encoding != "utf-8":  # what a text says does not depend on how it was encoded
        forms = [
            ("names", "names", comments[2], "."),
            ("none", "names", "", ","),
            ("numbers", "none", comments[1], "."),
        ]
    for index, header, comment, decimal in forms:
        if mark == "," and decimal == ",":
            continue
        rows = cells_of(index, header, decimal)
        if mark.isspace() and mark != "\t" and rows[0][0] == "":
            rows[0] = rows[0][1:]  # nobody writes an empty cell between blanks
        text = comment + "".join(mark.join(row) + "\n" for row in rows)
        found, notes = read(tmp_path, text, encoding)
        assert found.regions == (REGIONS if "names" in (index, header) else None), (index, header, comment, text)
        np.testing.assert_array_equal(found.matrix, MATRIX)
        assert ("decimal commas" in notes) == (decimal == ",")
        assert ("separated by" in notes) == (mark != ",")
        is_plain = text.isascii() or encoding.startswith("utf-8")
        assert is_plain or encoding[:3].upper() in notes.upper()


@pytest.mark.parametrize("mark", ["\t", ";", ",", " "], ids=["tab", "semicolon", "comma", "blank"])
def test_trailing_separators_blank_lines_and_windows_ends(tmp_path, mark):
    rows = cells_of("none", "names", ".")
    text = "\r\n\r\n".join(mark.join(row) + mark for row in rows) + "\r\n"
    found, _ = read(tmp_path, text)
    assert found.regions == REGIONS
    np.testing.assert_array_equal(found.matrix, MATRIX)


def test_a_header_in_the_comment_above_is_taken_where_its_separator_says_so(tmp_path):
    for mark in (",", "\t", ";"):
        body = "\n".join(mark.join(f"{value:g}" for value in row) for row in MATRIX)
        found, notes = read(tmp_path, "# " + mark.join(REGIONS) + "\n" + body)
        assert found.regions == REGIONS and "comment above" in notes
    # Four words of a sentence are no names.
    found, _ = read(tmp_path, "# made by hand today\n" + body.replace(";", " "))
    assert found.regions is None


@pytest.mark.parametrize("seed", range(5))
def test_rows_in_another_order_than_columns_are_read_by_their_names(tmp_path, seed):
    order = np.random.default_rng(seed).permutation(4)
    lines = [",".join(["", *REGIONS])]
    lines += [",".join([REGIONS[row], *(f"{value:g}" for value in MATRIX[row])]) for row in order]
    found, notes = read(tmp_path, "\n".join(lines))
    assert found.regions == REGIONS
    np.testing.assert_array_equal(found.matrix, MATRIX)
    assert ("another order" in notes) == (list(order) != [0, 1, 2, 3])


def test_parcel_numbers_are_names_and_counts_are_not(tmp_path):
    body = "\n".join(",".join(f"{value:g}" for value in row) for row in MATRIX)
    assert read(tmp_path, "1001,1002,2001,2002\n" + body)[0].regions == ("1001", "1002", "2001", "2002")
    for counts in ("0,1,2,3\n", "1,2,3,4\n", '"0","1","2","3"\n'):
        found, _ = read(tmp_path, counts + body)
        assert found.regions is None
        np.testing.assert_array_equal(found.matrix, MATRIX)


PAIRS = [(0, 1), (0, 2), (1, 3), (2, 3)]


def edge_rows(extra="", both=False):
    """Edges as rows of words; each in both directions where `both`."""
    rows = [[REGIONS[u], REGIONS[v], f"{MATRIX[u, v]:g}", *extra] for u, v in PAIRS]
    return rows + [[row[1], row[0], *row[2:]] for row in rows] if both else rows


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("mark", MARKS.values(), ids=MARKS)
def test_lists_of_edges(tmp_path, mark, encoding):
    headers = [None, ["source", "target", "weight"], ["From", "To", "Weight"], ["region_a", "region_b", "fibres"]]
    forms = list(itertools.product(headers, (False, True), ("", "# edges\n")))
    for header, both, comment in forms if encoding == "utf-8" else forms[:2]:
        rows = ([header] if header else []) + edge_rows(both=both)
        found, notes = read(tmp_path, comment + "".join(mark.join(row) + "\n" for row in rows), encoding)
        expected = order_by_name(found, REGIONS, tmp_path, "weights")
        np.testing.assert_array_equal(expected, MATRIX)
        assert ("both directions" in notes) == both


def test_edges_with_further_columns_an_index_or_a_dictionary(tmp_path):
    text = ",source,target,weight,length\n"
    text += "".join(f"{i},{','.join(row)}\n" for i, row in enumerate(edge_rows(["12.5"])))
    found, notes = read(tmp_path, text)
    np.testing.assert_array_equal(order_by_name(found, REGIONS, tmp_path, "weights"), MATRIX)
    assert "not used: length" in notes
    for data in ("{{'weight': {}}}", "{{'length': 3.5, 'weight': {}, 'kind': 'x'}}"):
        for mark in (" ", ","):
            rows = [[*row[:2], data.format(row[2])] for row in edge_rows()]
            found, notes = read(tmp_path, "\n".join(mark.join(row) for row in rows))
            np.testing.assert_array_equal(order_by_name(found, REGIONS, tmp_path, "weights"), MATRIX)
            assert "networkx" in notes
    found, _ = read(tmp_path, "0 1 2.5\n0 2 1\n1 3 0.125\n2 3 3\n1 2 1\n")
    assert found.regions == ("0", "1", "2", "3") and found.matrix[3, 2] == 3


REFUSED = {
    "a fourth column without names": ("a b 1 2\na c 1 3\nb c 2 4\n", "name the columns source, target and weight"),
    "no weights": ("source,target\na,b\n", "a column 'weight'"),
    "no weights in dictionaries": ("a b {}\nb c {}\n", "line 1: .* 'weight'"),
    "an edge twice": ("source,target,weight\na,b,1\na,b,2\n", "line 3: .* 'a' and 'b' again"),
    "an edge to itself": ("source,target,weight\na,a,1\n", "line 2: .* connected with itself"),
    "a weight that is no number": ("source,target,weight\na,b,x\n", "line 2: expected a number under 'weight'"),
    "a ragged triangle": ("0\n1 0\n2 1 0\n", "cells in every row"),
    "one row missing": ("a,b,c\n0,1,2\n1,0,3\n", "square matrix"),
    "one name missing": ("a,b\n0,1,2\n1,0,3\n2,3,0\n", "names above|cells in every row|square"),
    "rows of other names": (",a,b\na,0,1\nc,1,0\n", "a row 'c' and a column 'b'"),
    "points and commas": ("a;b\n0;1,5\n1.5;0\n", "finite number in row 1, column 2, found '1,5'; write decimals"),
    "thousands": ('a,b\n0,"1,500"\n"1,500",0\n', "'1,500'; write decimals with a point and thousands without"),
    "a name twice": ("a,a\n0,1\n1,0\n", "'a' twice"),
    "words": ("a,b\n0,x\nx,0\n", "finite number in row 1, column 2, found 'x'"),
    "infinity": ("a,b\n0,inf\ninf,0\n", "finite number in row 1, column 2, found 'inf'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_rest_is_refused_with_the_reason(tmp_path, name):
    text, words = REFUSED[name]
    with pytest.raises(InputError, match=words):
        read(tmp_path, text)


def zipped(name):
    """Return a zip archive of one small file."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), "1,2")
    return packed.getvalue()


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (zipped("xl/workbook.xml"), "an Office document, such as .xlsx; export the table as CSV"),
        (zipped("connectome.csv"), "a zip archive; unpack it first"),
        (b"version https://git-lfs.github.com/spec/v1\noid 1", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\x93NUMPY\x01\x00", "NumPy"),
        (b"a,b\n\x00\x01\x02,1\n", "not text"),
    ],
)
def test_files_that_are_no_text_are_named(tmp_path, start, words):
    (tmp_path / "a.csv").write_bytes(start)
    with pytest.raises(InputError, match=words):
        read_square(tmp_path / "a.csv", [])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "text",
    [
        ",".join(REGIONS),
        " ".join(REGIONS),
        "\n".join(REGIONS),
        "region\n" + "\n".join(REGIONS),
        "\n".join(f"{i} {name} 70 130 180" for i, name in enumerate(REGIONS)),
        "index;name\n" + "\n".join(f"{i};{name}" for i, name in enumerate(REGIONS)),
        "region,x,y,z\n" + "\n".join(f"{name},1,2,{i}.5" for i, name in enumerate(REGIONS)),
    ],
)
def test_names_in_a_file_of_their_own(tmp_path, text, encoding):
    (tmp_path / "labels.txt").write_bytes(text.encode(encoding))
    assert read_names(tmp_path / "labels.txt", 4) == REGIONS


WORDS = ["0", "1", "2.5", "1,5", "a", "L_b", "", "nan", "-1", "inf", "#", "%", '"', "{", "{'weight': 2}", "source",
         "target", "weight", "subject", "age", "x y", "1e400", "None", "é"]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_no_text_ends_in_anything_but_a_matrix_or_one_line(tmp_path, seed):
    rng = np.random.default_rng(seed)
    for _ in range(80):
        if rng.random() < 0.4:  # nearly square
            size, mark = int(rng.integers(1, 6)), rng.choice([",", ";", "\t", " "])
            rows = rng.choice(["0", "1", "0.5", "a", "nan"], (size + rng.integers(2), size + rng.integers(2)))
            text = "\n".join(mark.join(row) for row in rows)
        else:
            marks = [",", ";", "\t", " ", "\n", "\n", "\r\n"]
            text = "".join(rng.choice(WORDS) + rng.choice(marks) for _ in range(rng.integers(1, 25)))
        (tmp_path / "a.csv").write_bytes(text.encode(rng.choice(["utf-8", "utf-16", "utf-16-le"])))
        for reader in (lambda path: read_square(path, []), lambda path: read_names(path, 3), read_table):
            try:
                reader(tmp_path / "a.csv")
            except InputError as error:
                assert "\n" not in str(error)


def test_names_of_several_words_and_too_many(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("Left Hippocampus\nRight Hippocampus\nLeft Area 1\n")
    assert read_names(path, 3) == ("Left Hippocampus", "Right Hippocampus", "Left Area 1")
    for count in (2, 4):
        with pytest.raises(InputError, match=f"{count} names of regions, found 3"):
            read_names(path, count)


def test_files_of_names_beside_a_matrix_are_found(tmp_path):
    (tmp_path / "matrix_b.csv").write_text("0,1\n1,0\n")
    for name, text in (
        ("labels_a.csv", "x,y"),
        ("labels_b.csv", "x,y"),
        ("labels_c.csv", "x,y,z"),
        ("other.csv", "x,y"),
    ):
        (tmp_path / name).write_text(text)
    found = names_beside(tmp_path / "matrix_b.csv", 2)
    assert [path.name for path in found] == ["labels_b.csv", "labels_a.csv"]
