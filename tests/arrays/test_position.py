"""Position tables against an independent derivation, entries by hand, and their resizing."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jaxmed.arrays.position import resize_table, sincos, sincos_1d, sincos_2d, sincos_3d, sincos_3d_oblong

pytestmark = pytest.mark.core


def code(width, place):
    """One position's code, entry by entry, every operation in float32."""
    half = width // 2
    place = np.float32(place)
    rates = [np.float32(1) / np.power(np.float32(10000), np.float32(i) / np.float32(half)) for i in range(half)]
    entries = [np.sin(place * rate) for rate in rates] + [np.cos(place * rate) for rate in rates]
    if width % 2:
        entries.append(np.sin(place / np.float32(10000)))
    return np.array(entries, np.float32)


# Remainders of the division by three are 0, 1, 2 and 0; 50 has parts of 16, 17, 17, and 1024's are 341, 341, 342.
@pytest.mark.parametrize("width", [48, 64, 50, 96])
@pytest.mark.parametrize("edge", [2, 4])
def test_3d_table_is_the_released_one_up_to_the_last_bit(width, edge):
    table = sincos_3d(width, (edge,) * 3)
    first = width // 3
    second = first + (1 if width % 3 > 1 else 0)
    third = width - first - second
    assert table.dtype == np.float32 and table.shape == (1 + edge**3, width)
    np.testing.assert_array_equal(table[0], 0)
    for row in range(edge**3):
        d, h, w = row // edge**2, row // edge % edge, row % edge
        expected = np.concatenate([code(first, d), code(second, h), code(third, w)])
        # The functions of arrays and of numbers may differ in the last bit of a transcendental; they do not of 10000^x.
        np.testing.assert_allclose(table[1 + row], expected, rtol=0, atol=6e-8)


@pytest.mark.parametrize("width", [48, 64, 50, 96])
def test_3d_table_equals_the_same_formula_on_whole_arrays(width):
    """The mesh as the release builds it: ranges of (w, h, d), 'ij', reshaped to (D, H, W)."""
    edge = 4
    mesh = np.meshgrid(*[np.arange(edge, dtype=np.float32)] * 3, indexing="ij")
    mesh = np.stack(mesh, axis=0).reshape(3, 1, edge, edge, edge)
    widths = [width // 3] * 3
    for spare in range(width % 3):
        widths[2 - spare] += 1
    blocks = []
    for part, axis in zip(widths, mesh, strict=True):
        half = part // 2
        rates = np.arange(half, dtype=np.float32)
        rates /= half
        rates = 1.0 / 10000**rates
        angles = np.einsum("m,d->md", axis.reshape(-1), rates)
        block = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        if part % 2:
            block = np.concatenate([block, np.sin(axis.reshape(-1) / np.float32(10000))[:, None]], axis=1)
        blocks.append(block)
    expected = np.concatenate(blocks, axis=1)
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(sincos_3d(width, (edge,) * 3)[1:], expected)


def test_entries_by_hand():
    """Width 50 on a grid of 4: parts 16, 17, 17; token (2, 3, 1) is row 1 + 2*16 + 3*4 + 1 = 46."""
    row = sincos_3d(50, (4, 4, 4))[46]
    assert row[0] == pytest.approx(math.sin(2.0), abs=1e-7)  # d = 2, omega = 1
    assert row[8 + 3] == pytest.approx(math.cos(2 / 10000 ** (3 / 8)), abs=1e-7)
    assert row[16 + 1] == pytest.approx(math.sin(3 / 10000 ** (1 / 8)), abs=2e-7)  # h = 3
    assert row[16 + 16] == pytest.approx(3e-4, abs=1e-9)  # the odd entry, sin(3 / 10000)
    assert row[33 + 8] == pytest.approx(math.cos(1.0), abs=1e-7)  # w = 1


def test_the_path_is_float32():
    """Angles of float64 round otherwise: large widths and places show it."""
    half = 170
    double = np.arange(16)[:, None] / 10000 ** (np.arange(half) / half)
    exact = np.concatenate([np.sin(double), np.cos(double)], axis=1).astype(np.float32)
    table = sincos_1d(340, np.arange(16, dtype=np.float32))
    assert (table != exact).any()
    np.testing.assert_allclose(table, exact, atol=2e-6)


def test_published_widths():
    assert sincos_3d(1024, (16, 16, 16)).shape == (4097, 1024)
    table = sincos_3d(512, (3, 3, 3))
    np.testing.assert_array_equal(table[1 + 9, :170], sincos_1d(170, np.array([1.0], np.float32))[0])
    np.testing.assert_array_equal(table[1 + 3, 170:341], sincos_1d(171, np.array([1.0], np.float32))[0])
    np.testing.assert_array_equal(table[1 + 1, 341:], sincos_1d(171, np.array([1.0], np.float32))[0])


def test_a_grid_that_is_no_cube_keeps_its_meaning():
    table = sincos_3d(48, (2, 3, 4))[1:].reshape(2, 3, 4, 48)
    for d, h, w in ((1, 2, 3), (0, 1, 2)):
        places = [sincos_1d(16, np.array([place], np.float32))[0] for place in (d, h, w)]
        np.testing.assert_array_equal(table[d, h, w], np.concatenate(places))


def test_2d_table_has_the_column_first():
    table = sincos_2d(16, (3, 5))
    assert table.shape == (16, 16) and table.dtype == np.float32
    np.testing.assert_array_equal(table[0], 0)
    for y, x in ((0, 1), (2, 4)):
        rates = 10000.0 ** (-np.arange(4) / 4)
        expected = np.concatenate([f(place * rates) for place in (x, y) for f in (np.sin, np.cos)])
        np.testing.assert_allclose(table[1 + 5 * y + x], expected, rtol=0, atol=6e-8)


def test_refused_sizes():
    with pytest.raises(ValueError, match="expected a multiple of 4"):
        sincos(6, (2, 2))
    with pytest.raises(ValueError, match="expected 6 or more"):
        sincos(5, (2, 2, 2))
    with pytest.raises(ValueError, match="2 or 3 axes"):
        sincos(48, (2,))


def test_resizing_to_the_same_grid_is_the_identity():
    table = jnp.asarray(sincos_3d(48, (4, 4, 4)))
    assert resize_table(table, (4, 4, 4), (4, 4, 4)) is table


@pytest.mark.parametrize(("old", "new"), [((4, 4, 4), (6, 6, 6)), ((4, 4, 4), (2, 3, 5)), ((3, 5), (7, 4))])
def test_resizing_is_linear_with_half_pixel_centres(old, new):
    rows = 1 + math.prod(old)
    table = np.random.default_rng(0).standard_normal((rows, 3)).astype(np.float32)
    found = resize_table(jnp.asarray(table), old, new)
    np.testing.assert_array_equal(found[0], table[0])
    axes = [(np.arange(n) + 0.5) * o / n - 0.5 for o, n in zip(old, new, strict=True)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"))
    grid = table[1:].reshape(*old, 3)
    for column in range(3):
        expected = scipy.ndimage.map_coordinates(grid[..., column].astype(np.float64), places, order=1, mode="nearest")
        np.testing.assert_allclose(found[1:, column].reshape(new), expected, atol=1e-6)


def test_a_table_of_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"expected 28 rows for a grid \(3, 3, 3\), got 9"):
        resize_table(jnp.zeros((9, 4)), (3, 3, 3), (2, 2, 2))
    with pytest.raises(ValueError, match="expected 2 axes"):
        resize_table(jnp.zeros((10, 4)), (3, 3), (2, 2, 2))


@pytest.mark.peers
@pytest.mark.parametrize("new", [6, 3, 8])
def test_resizing_equals_pytorch(new):
    import torch

    table = np.random.default_rng(0).standard_normal((65, 8)).astype(np.float32)
    grid = torch.from_numpy(table[1:]).reshape(1, 4, 4, 4, 8).permute(0, 4, 1, 2, 3)
    peer = torch.nn.functional.interpolate(grid, size=(new,) * 3, mode="trilinear", align_corners=False)
    expected = peer.permute(0, 2, 3, 4, 1).reshape(-1, 8).numpy()
    np.testing.assert_allclose(resize_table(jnp.asarray(table), (4,) * 3, (new,) * 3)[1:], expected, atol=1e-6)


@pytest.mark.parametrize("width", [768, 384])
def test_a_scrambled_table_gives_tokens_the_places_that_the_release_gives_them(width):
    grid, third = (4, 8, 8), width // 3

    def row(*place):
        omega = 10000.0 ** (-np.arange(third // 2) / (third // 2))
        return np.concatenate([np.concatenate([np.sin(p * omega), np.cos(p * omega)]) for p in place])

    clean, upstream = (sincos_3d_oblong(width, grid, layout) for layout in ("clean", "upstream"))
    assert clean.shape == upstream.shape == (257, width) and not clean[0].any() and not upstream[0].any()
    np.testing.assert_allclose(clean, sincos_3d(width, grid), rtol=0, atol=3e-6)
    for token, scrambled in (((0, 1, 0), (1, 0, 0)), ((1, 0, 0), (0, 2, 0)), ((1, 2, 3), (2, 2, 3))):
        place = 1 + np.ravel_multi_index(token, grid)
        np.testing.assert_allclose(clean[place], row(*token), rtol=0, atol=1e-6)
        np.testing.assert_allclose(upstream[place], row(*scrambled), rtol=0, atol=1e-6)
    assert len(np.unique(upstream[1:].round(5), axis=0)) == 256  # each place once
    with pytest.raises(ValueError, match="multiple of 6"):
        sincos_3d_oblong(16, grid)
