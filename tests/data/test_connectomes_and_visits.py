"""Connectomes and tables of visits: every form that is read, and every mistake told in one line."""

import numpy as np
import pytest

from jaxmed.data.connectomes import ConnectomeConfig, find_regions, read_connectome
from jaxmed.data.visits import read_visits
from jaxmed.errors import InputError

MATRIX = "L_a,L_b,R_a\n0,2,1\n2,0,0\n1,0,0\n"
TABLE = "subject,age,L_a,L_b,R_a\ns1,70,1.0,1.1,1.2\ns2,61,1.3,1.0,2.0\ns1,72.5,1.2,1.3,1.5\n"
REGIONS = ("L_a", "L_b", "R_a")


def write(path, text):
    path.write_text(text)
    return path


def read(tmp_path, text, **options):
    notes = []
    return read_connectome(write(tmp_path / "a.csv", text), ConnectomeConfig(**options), notes), notes


def cohort(tmp_path, text, scaling="minmax", **options):
    notes = []
    return read_visits(write(tmp_path / "t.csv", text), REGIONS, scaling, notes, **options), notes


@pytest.mark.parametrize(
    "text",
    [
        MATRIX,
        "region,L_a,L_b,R_a\nL_a,0,2,1\nL_b,2,0,0\nR_a,1,0,0\n",
        "source,target,weight\nL_a,L_b,2\nL_a,R_a,1\n",
    ],
)
def test_a_matrix_with_names_and_a_list_of_edges_are_the_same_graph(tmp_path, text):
    found, notes = read(tmp_path, text)
    assert found.regions == REGIONS and notes == []
    np.testing.assert_array_equal(found.adjacency, [[0, 1, 0.5], [1, 0, 0], [0.5, 0, 0]])


def test_names_may_stand_in_a_file_of_their_own(tmp_path):
    labels = write(tmp_path / "labels.csv", "L_a,L_b,R_a\n")
    found, _ = read(tmp_path, "0,2,1\n2,0,0\n1,0,0\n", labels=labels)
    assert found.regions == REGIONS
    assert find_regions(("R_a",), found) == (2,)
    with pytest.raises(InputError, match=r"seeds: expected regions .* 'R_b'; did you mean 'R_a'"):
        find_regions(("R_b",), found)
    with pytest.raises(InputError, match=r"labels.csv: expected 4 names of regions, found 3"):
        read(tmp_path, "0,2,1,1\n2,0,0,1\n1,0,0,1\n1,1,1,0\n", labels=labels)


MISTAKES = {
    "not symmetric": ("L_a,L_b\n0,2\n1,0\n", "symmetric matrix, found 2 from 'L_a' to 'L_b' and 1 back"),
    "negative": ("L_a,L_b\n0,-2\n-2,0\n", "found -2 between 'L_a' and 'L_b'"),
    "without names": ("0,2\n2,0\n", "names of regions"),
    "not square": ("L_a,L_b\n0,2\n", "square matrix"),
    "ragged": ("L_a,L_b\n0,2\n2\n", "square matrix"),
    "not a number": ("L_a,L_b\n0,x\n2,0\n", "finite number in row 1, column 2, found 'x'"),
    "not finite": ("L_a,L_b\n0,nan\n2,0\n", "finite number in row 1, column 2, found 'nan'"),
    "named twice": ("L_a,L_a\n0,2\n2,0\n", "'L_a' twice"),
    "only zeros": ("L_a,L_b\n0,0\n0,0\n", "found only zeros"),
    "one region": ("L_a\n1\n", "two regions"),
    "an edge to itself": ("source,target,weight\nL_a,L_a,1\n", "line 2: .* connected with itself"),
    "an edge twice": ("source,target,weight\nL_a,L_b,1\nL_a,L_b,1\n", "line 3: .* again"),
    "blank": ("\n\n", "only blank lines"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_a_connectome_are_told(tmp_path, name):
    text, expected = MISTAKES[name]
    with pytest.raises(InputError, match=expected):
        read(tmp_path, text)


FULL = np.array([[0, 2, 1], [2, 0, 4], [1, 4, 0]])


@pytest.mark.parametrize("empty", ["0", "nan", "", "NA"])
@pytest.mark.parametrize("diagonal", ["0", "nan", "7", ""])
@pytest.mark.parametrize("cut", [np.triu, np.tril])
def test_one_triangle_is_mirrored_and_not_averaged_with_nothing(tmp_path, cut, diagonal, empty):
    kept = cut(np.ones((3, 3)), 1 if cut is np.triu else -1) > 0
    cells = [[str(FULL[i, j]) if kept[i, j] else empty for j in range(3)] for i in range(3)]
    for i in range(3):
        cells[i][i] = diagonal
    text = "L_a,L_b,R_a\n" + "\n".join(map(",".join, cells))
    for repair in (False, True):
        found, notes = read(tmp_path, text, repair=repair)
        np.testing.assert_array_equal(found.adjacency, FULL / 4)
        assert any("mirrored" in note for note in notes)
        assert any("with themselves" in note for note in notes) == (diagonal == "7")


def test_a_diagonal_of_nan_is_no_connection(tmp_path):
    found, _ = read(tmp_path, "L_a,L_b,R_a\nnan,2,1\n2,nan,0\n1,0,nan\n")
    np.testing.assert_array_equal(found.adjacency, [[0, 1, 0.5], [1, 0, 0], [0.5, 0, 0]])


def test_edges_in_both_directions_may_differ_only_where_that_is_repaired(tmp_path):
    text = "source,target,weight\nL_a,L_b,2\nL_b,L_a,{}\n"
    found, notes = read(tmp_path, text.format(2))
    np.testing.assert_array_equal(found.adjacency, [[0, 1], [1, 0]])
    assert "both directions" in notes[0]
    with pytest.raises(
        InputError, match="symmetric matrix, found 2 from 'L_a' to 'L_b' and 1 back; --data.graph.repair"
    ):
        read(tmp_path, text.format(1))


def test_names_of_a_file_and_of_the_matrix_must_be_the_same(tmp_path):
    labels = write(tmp_path / "labels.csv", "R_a\nL_a\nL_b\n")
    found, notes = read(tmp_path, MATRIX, labels=labels)
    assert found.regions == ("R_a", "L_a", "L_b") and "put into the order of labels.csv" in notes[0]
    np.testing.assert_array_equal(found.adjacency, [[0, 0.5, 0], [0.5, 0, 1], [0, 1, 0]])
    write(labels, "x\ny\nz\n")
    with pytest.raises(InputError, match="labels.csv: expected the names that a.csv has, found none 'L_a'; drop"):
        read(tmp_path, MATRIX, labels=labels)
    edges = "".join(f"{u} {v} {w}\n" for u, v, w in ((1, 2, 2), (3, 1, 1), (3, 2, 1), (4, 1, 1), (4, 2, 1)))
    write(labels, "a\nb\nc\nd\n")
    found, _ = read(tmp_path, edges, labels=labels)
    np.testing.assert_array_equal(found.adjacency[0], [0, 1, 0.5, 0.5])
    assert found.regions == ("a", "b", "c", "d")


def test_a_file_of_names_beside_a_matrix_without_them_is_pointed_to(tmp_path):
    bare = "0,2,1\n2,0,0\n1,0,0\n"
    with pytest.raises(InputError, match="names of regions, found none; add a header .* by --data.graph.labels"):
        read(tmp_path, bare)
    write(tmp_path / "a_labels.txt", "L_a\nL_b\nR_a\n")
    with pytest.raises(InputError, match=r"give --data.graph.labels \S*a_labels.txt, which lies beside it and holds 3"):
        read(tmp_path, bare)


@pytest.mark.parametrize("name", ["entorhinal", "Entorhinal"])
def test_a_region_without_its_side_is_asked_about(tmp_path, name):
    found, _ = read(tmp_path, "L_entorhinal,R_entorhinal,L_insula\n0,2,1\n2,0,0\n1,0,0\n")
    with pytest.raises(InputError, match="may be L_entorhinal or R_entorhinal: name one of them, or both"):
        find_regions((name,), found)
    with pytest.raises(InputError, match=f"'{name[0]}insula'; did you mean 'L_insula'"):
        find_regions((name[0] + "insula",), found)
    with pytest.raises(InputError) as caught:
        find_regions(("R_insula",), found)
    assert "did you mean 'L_insula'" not in str(caught.value)
    found, _ = read(tmp_path, "ctx-lh-entorhinal,entorhinal_R\n0,1\n1,0\n")
    with pytest.raises(InputError, match="may be ctx-lh-entorhinal or entorhinal_R"):
        find_regions((name,), found)


def test_what_can_be_repaired_is_repaired_when_asked_and_said(tmp_path):
    found, notes = read(tmp_path, "L_a,L_b,R_a\n0,2,-1\n1,0,0\n-1,0,0\n", repair=True)
    np.testing.assert_array_equal(found.adjacency, [[0, 1, 0], [1, 0, 0], [0, 0, 0]])
    said = " ".join(notes)
    assert "2 from 'L_a' to 'L_b'" in said and "-1 between 'L_a' and 'R_a'" in said
    assert "'R_a' has no connection" in said and "not connected; apart from its largest part: R_a" in said


def test_negative_weights_alone_are_no_connectome(tmp_path):
    with pytest.raises(InputError, match="a weight above 0, found 0 at most|a weight above 0, found -2 at most"):
        read(tmp_path, "L_a,L_b\n0,-2\n-2,0\n", repair=True)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_connectome(tmp_path / "none.csv", ConnectomeConfig(), [])
    with pytest.raises(InputError, match="--connectome"):
        read_connectome(None, ConnectomeConfig(), [])
    with pytest.raises(ValueError, match="density"):
        ConnectomeConfig(density=0.0)


def test_visits_are_scaled_sorted_and_grouped(tmp_path):
    found, notes = cohort(tmp_path, TABLE)
    assert found.subjects == ("s1", "s2") and (found.low, found.high) == (1.0, 2.0)
    np.testing.assert_allclose(found.visits.gaps, [[0, 2.5], [0, 0]])
    np.testing.assert_allclose(found.visits.values[0], [[0, 0.1, 0.2], [0.2, 0.3, 0.5]], atol=1e-6)
    np.testing.assert_array_equal(found.visits.present, [[True, True], [True, False]])
    shuffled, notes = cohort(tmp_path, TABLE.replace("s1,70,", "s1,75,"))
    assert shuffled.ages[0] == 72.5 and any("not in the order of age" in note for note in notes)
    later, notes = cohort(tmp_path, TABLE, scale=(1.0, 1.5))
    np.testing.assert_allclose(later.visits.values[1, 0, 2], 2.0)
    assert any("beyond those of the fit" in note for note in notes)
    _, notes = cohort(tmp_path, "subject,age,L_a,L_b,R_a,sex\ns1,70,1.0,1.1,1.2,1\ns2,61,1.3,1.0,2.0,0\n")
    assert any("sex" in note for note in notes) and any("seen once" in note for note in notes)


WRONG = {
    "region missing": (TABLE.replace("L_b", "L_bb"), "column for region 'L_b', found none; did you mean 'L_bb'"),
    "age missing": (TABLE.replace("s2,61,", "s2,,"), "line 3: expected a value under 'age'"),
    "age impossible": (TABLE.replace("s2,61,", "s2,610,"), "line 3: expected an age from 0 to 120 years, found 610"),
    "value no number": (TABLE.replace("1.3,1.0,2.0", "1.3,x,2.0"), "line 3: expected a number under 'L_b', found 'x'"),
    "no value at all": ("subject,age,L_a,L_b,R_a\ns1,70,,,\ns2,61,NA,,\n", "values of regions, found only empty cells"),
    "ages in months": (TABLE.replace("s1,7", "s1,84").replace("s2,61", "s2,732"), "are they months .* divide by 12"),
    "no column for a region": (TABLE.replace(",R_a", ""), "cells|column for region 'R_a', found none; give it one of"),
    "value negative": (TABLE.replace("1.3,1.0,2.0", "1.3,-1.0,2.0"), "line 3: .* under 'L_b', found -1"),
    "value far too large": (TABLE.replace("1.3,1.0,2.0", "1.3,1.0,200"), "line 3: .* under 'R_a', found 200"),
    "visit twice": (TABLE.replace("s1,72.5", "s1,70"), "one row per visit, found subject 's1' again at age 70"),
    "no differences": ("subject,age,L_a,L_b,R_a\ns1,70,1,1,1\ns2,61,1,1,1\n", "values that differ"),
    "no subject column": (TABLE.replace("subject", "name"), "subject"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_of_a_table_are_told(tmp_path, name):
    text, expected = WRONG[name]
    with pytest.raises(InputError, match=expected):
        cohort(tmp_path, text)


@pytest.mark.parametrize("cell", ["", "NA", "nan", "n/a"])
def test_what_was_not_measured_is_left_out_and_said(tmp_path, cell):
    lines = ["s1,70,{0},{0},1.2", "s1,71,{0},{0},{0}", "s2,61,1.3,{0},2.0", "s3,60,{0},{0},{0}", "s1,72.5,1.2,{0},1.5"]
    found, notes = cohort(tmp_path, "subject,age,L_a,L_b,R_a\n" + "\n".join(lines).format(cell) + "\n")
    assert found.subjects == ("s1", "s2") and (found.low, found.high) == (1.2, 2.0)
    np.testing.assert_allclose(found.visits.gaps, [[0, 2.5], [0, 0]])
    np.testing.assert_array_equal(found.visits.present, [[True, True], [True, False]])
    measured = [[[False, False, True], [True, False, True]], [[True, False, True], [False, False, False]]]
    np.testing.assert_array_equal(found.visits.measured, measured)
    np.testing.assert_allclose(found.visits.values[0], [[0, 0, 0], [0, 0, 0.375]], atol=1e-6)
    said = " ".join(notes)
    assert "10 of 15 values were not measured" in said and "Never measured: L_b." in said
    assert "left out: 's1' (line 3), 's3' (line 5)" in said


def test_units_that_may_be_others_are_asked_about_once(tmp_path):
    _, notes = cohort(tmp_path, TABLE.replace(",70,", ",0,").replace(",61,", ",0,").replace(",72.5,", ",30,"))
    assert sum("Are they months" in note for note in notes) == 1
    _, notes = cohort(tmp_path, TABLE.replace("1.0", "0.8").replace("1.1", "0.9"))
    asked = [note for note in notes if "Are they SUVR?" in note]
    assert len(asked) == 1 and asked[0].startswith("3 of 9 values are below 1, the lowest 0.8.")
    assert not any("?" in note for note in cohort(tmp_path, TABLE)[1])
    assert not any("?" in note for note in cohort(tmp_path, TABLE.replace("1.0", "0.8"), scale=(0.5, 2.0))[1])


def test_cohorts_come_in_every_form_of_tables(tmp_path):
    rows = [line.split(",") for line in TABLE.strip().split("\n")]
    text = "# exported\n" + "\n".join(";".join(cell.replace(".", ",") for cell in row) for row in rows)
    expected = cohort(tmp_path, TABLE)[0]
    path = tmp_path / "u.csv"
    for encoding in ("utf-8-sig", "utf-16", "latin-1"):
        path.write_bytes(text.encode(encoding))
        found = read_visits(path, REGIONS, "minmax", notes := [])
        np.testing.assert_array_equal(found.visits.values, expected.visits.values)
        assert "semicolons" in notes[0] and "decimal commas" in notes[0]


def test_splits_belong_to_subjects(tmp_path):
    header, *rows = TABLE.strip().split("\n")

    def with_splits(*names):
        lines = [f"{row},{name}" for row, name in zip(rows, names, strict=True)]
        return "\n".join([header + ",split", *lines]) + "\n"

    found, _ = cohort(tmp_path, with_splits("train", "test", "train"))
    assert found.splits == ("train", "test")
    with pytest.raises(InputError, match="one split for subject 's1'"):
        cohort(tmp_path, with_splits("train", "test", "test"))
    with pytest.raises(InputError, match="'exam'"):
        cohort(tmp_path, with_splits("train", "exam", "train"))


def test_values_that_are_not_to_be_scaled_lie_between_0_and_1(tmp_path):
    with pytest.raises(InputError, match="--data.scaling minmax"):
        cohort(tmp_path, TABLE, "none")


def test_real_connectomes_are_read(shared_data):
    folder = shared_data / "connectome_hcp_enigma"
    for matrix, labels, count in (
        ("strucMatrix_ctx.csv", "strucLabels_ctx.csv", 68),
        ("strucMatrix_with_sctx.csv", "strucLabels_with_sctx.csv", 82),
    ):
        notes = []
        found = read_connectome(folder / matrix, ConnectomeConfig(labels=folder / labels), notes)
        assert len(found.regions) == count and notes == [] and found.adjacency.max() == 1
    assert find_regions(("L_entorhinal", "R_entorhinal"), found)
    # The finer parcellation holds negative weights, which are told before they are repaired.
    path = folder / "strucMatrix_ctx_schaefer_100.csv"
    labels = folder / "strucLabels_ctx_schaefer_100.csv"
    with pytest.raises(InputError, match=r"weights of 0 or more, found -0.21"):
        read_connectome(path, ConnectomeConfig(labels=labels), [])
    found = read_connectome(path, ConnectomeConfig(labels=labels, repair=True), notes := [])
    assert len(found.regions) == 100 and "negative weights" in notes[0]
    template = read_connectome(shared_data / "connectome_dk86" / "mean80_fibercount.csv", ConnectomeConfig(), [])
    assert len(template.regions) == 86 and template.regions[0] == "Left-Cerebellum-Cortex"
