"""What NODDI needs of a gradient table: shells that are shells, axes that differ."""

import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io.gradients import check_gradients
from jaxmed.physics.acquisition import (
    check_protocol,
    count_axes,
    has_two_shells,
    spans_tensors,
    spread_directions,
    two_shell_protocol,
)

pytestmark = pytest.mark.core


def turned(directions, degrees, seed=0):
    """Turn each direction by an angle about a random axis, as a moving head does."""
    noise = np.random.default_rng(seed).normal(size=directions.shape)
    across = noise - np.sum(noise * directions, axis=1, keepdims=True) * directions
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    return np.cos(np.radians(degrees)) * directions + np.sin(np.radians(degrees)) * across


def scan(*shells, num_b0=3):
    """Return the table of (b-value, directions) after some b = 0."""
    bvals = np.concatenate([np.zeros(num_b0), *(np.full(len(directions), bval) for bval, directions in shells)])
    return check_gradients(bvals, np.concatenate([np.zeros((num_b0, 3)), *(directions for _, directions in shells)]))


SIXTY, THIRTY = spread_directions(60), spread_directions(30)[:, [1, 2, 0]]
AXES = np.eye(3)


@pytest.mark.parametrize("count", [1, 3, 6, 12, 30])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("degrees", [0.0, 1.5])
def test_repetitions_and_antipodes_are_one_axis(count, sign, degrees):
    directions = spread_directions(count)
    repeated = np.concatenate([directions, sign * turned(directions, degrees), np.zeros((2, 3)), directions])
    assert count_axes(repeated) == count


FEW = {
    "three axes, ten times": np.tile(AXES, (10, 1)),
    "three axes of a head that moved": turned(np.tile(AXES, (10, 1)), 1.5),
    "three axes and their antipodes": np.concatenate([AXES, -AXES] * 5),
    "five axes": np.tile(spread_directions(5), (4, 1)),
    "a plane": np.stack([np.cos(np.arange(20)), np.sin(np.arange(20)), np.zeros(20)], axis=1),
    "a line": np.tile([[0.0, 0.6, 0.8]], (20, 1)),
}


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("needs_two_shells", [True, False])
def test_few_axes_are_refused_however_often_they_are_repeated(name, needs_two_shells):
    table = scan((1000, FEW[name]), (2500, FEW[name]))
    with pytest.raises(InputError, match="bvals: expected weighted images in 6 or more different directions"):
        check_protocol(table, "bvals", 50.0, needs_two_shells=needs_two_shells)
    assert not spans_tensors(FEW[name])


ONE_SHELL = {
    "one": scan((1000, SIXTY)),
    "one stray image": scan((1000, SIXTY), (500, SIXTY[:1])),
    "three stray images": scan((1000, SIXTY), (3000, AXES)),
    "a stray axis, often": scan((1000, SIXTY), (500, np.tile(SIXTY[:1], (20, 1)))),
    "every tenth at 1060": scan((1000, np.delete(SIXTY, np.arange(0, 60, 10), axis=0)), (1060, SIXTY[::10])),
    "every other at 1150": scan((1000, SIXTY[1::2]), (1150, SIXTY[::2])),
    "jitter of five percent": check_gradients(
        np.concatenate([[0.0], 1000 + 50 * np.cos(np.arange(60))]), np.concatenate([np.zeros((1, 3)), SIXTY])
    ),
}


@pytest.mark.parametrize("name", ONE_SHELL)
def test_one_shell_is_refused_whatever_strays_beside_it(name):
    with pytest.raises(InputError, match="expected two or more weighted shells") as caught:
        check_protocol(ONE_SHELL[name], "bvals", 50.0)
    assert "--allow-single-shell" in str(caught.value)
    assert check_protocol(ONE_SHELL[name], "bvals", 50.0, needs_two_shells=False) is not None


TWO_SHELLS = {
    "of the paper": check_gradients(*two_shell_protocol()),
    "of HCP": scan((1000, SIXTY), (2000, THIRTY), (3000, SIXTY)),
    "small": scan((711, spread_directions(8)), (2855, spread_directions(8))),
    "the same directions": scan((1000, SIXTY), (2000, SIXTY)),
    "with jitter": check_gradients(
        np.concatenate([[0.0], 1000 + 990 * (np.arange(60) % 2) + 10 * np.cos(np.arange(60))]),
        np.concatenate([np.zeros((1, 3)), SIXTY]),
    ),
    "every b a different one": check_gradients(
        np.concatenate([[0.0], np.linspace(500, 3000, 60)]), np.concatenate([np.zeros((1, 3)), SIXTY])
    ),
}


@pytest.mark.parametrize("name", TWO_SHELLS)
def test_real_shells_are_taken(name):
    check_protocol(TWO_SHELLS[name], "bvals", 50.0)


def test_a_grid_of_q_space_is_taken(shared_data):
    from jaxmed.io.gradients import read_gradients

    folder = shared_data / "dwi_human_dsi101"
    table = read_gradients(folder / "dwi.bval", folder / "dwi.bvec")
    weighted = table.bvals > 50
    assert has_two_shells(table.bvals[weighted], table.bvecs[weighted])


def test_the_note_lists_every_shell_that_it_counts():
    table = scan((700, SIXTY[:20]), (705, SIXTY[20:]), (2000, THIRTY))
    (note,) = check_protocol(table, "bvals", 50.0)
    assert note.startswith("3 different b-values make 2 shell(s) (700 to 705, 2000 s/mm^2)")
