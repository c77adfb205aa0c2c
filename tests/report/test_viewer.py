"""The viewer of volumes: what a page carries, and that a browser shows, scrolls and tells it without an error."""

import base64
import gzip
import hashlib
import io
import re

import matplotlib
import nibabel as nib
import numpy as np
import pytest
from browser import Browser, find_chromium
from PIL import Image

from jaxmed.report import viewer, volumes
from jaxmed.report.figures import MapStyle
from jaxmed.report.page import Section, Text, render
from jaxmed.report.volumes import color_table, make_layer, view_volumes
from jaxmed.volume import Volume

AFFINE = np.array([[2.0, 0, 0, -60], [0, 2, 0, -72], [0, 0, 3, -54], [0, 0, 0, 1]])
SHAPE = (60, 72, 36)
HOSTILE = "</script><script>alert('x')</script>\"'&"


@pytest.fixture(scope="module")
def ball():
    """Return a ball of 100 HU in air, and a map of it that is .8 on the right and .2 on the left."""
    x, y, z = (AFFINE[:3, :3] @ np.indices(SHAPE).reshape(3, -1) + AFFINE[:3, 3:]).reshape(3, *SHAPE)
    inside = x**2 + y**2 + z**2 < 50**2
    scan = Volume.make(np.where(inside, 100.0, 0.0).astype(np.float32), AFFINE)
    sides = Volume.make(np.where(x > 0, 0.8, 0.2).astype(np.float32), AFFINE)
    return {"Scan": scan, "Side": sides}, inside


@pytest.fixture(scope="module")
def page(ball):
    maps, inside = ball
    styles = {"Scan": MapStyle("HU", (0.0, 100.0), "gray"), "Side": MapStyle(limits=(0.0, 1.0))}
    shown = view_volumes(maps, caption="A ball of 100 HU.", styles=styles, mask=inside, whole=("Scan",))
    return render("A page", "", sections=[Section("Maps", shown)])


def unpack(layer):
    return nib.Nifti1Image.from_bytes(gzip.decompress(layer.file))


@pytest.mark.core
def test_a_layer_holds_values_within_half_a_step_and_leaves_out_what_is_masked():
    values = np.random.default_rng(0).uniform(-1, 3, (5, 6, 7)).astype(np.float32)
    where = values > -0.5
    layer = make_layer("Map", Volume.make(values, AFFINE), where, MapStyle("mm", (0.0, 2.0)))
    image = unpack(layer)
    found, step = np.asarray(image.dataobj), 2 / 254
    assert layer.low == 0 and layer.high == 2 and layer.unit == "mm"
    np.testing.assert_allclose(image.affine, AFFINE)
    np.testing.assert_allclose(found[where], values[where].clip(0, 2), atol=step / 2 + 1e-6)
    np.testing.assert_allclose(found[~where], -step, rtol=1e-5)
    assert layer == make_layer("Map", Volume.make(values, AFFINE), where, MapStyle("mm", (0.0, 2.0)))


@pytest.mark.core
def test_too_many_voxels_are_thinned_out_and_it_is_said(monkeypatch):
    monkeypatch.setattr(volumes, "MOST_VOXELS", 200)
    values = np.arange(10 * 12 * 8, dtype=np.float32).reshape(10, 12, 8)
    (shown,) = view_volumes({"Map": Volume.make(values, AFFINE)}, caption="A ramp.")
    image = unpack(shown.layers[0])
    assert image.shape == (5, 6, 4) and shown.caption == "A ramp. Every second voxel along each axis is shown."
    # The place of a voxel that is kept is its old one.
    np.testing.assert_allclose(image.affine @ [1, 1, 1, 1], AFFINE @ [2, 2, 2, 1])
    low, high = np.percentile(values, [1, 99])
    step = (high - low) / 254
    np.testing.assert_allclose(np.asarray(image.dataobj), values[::2, ::2, ::2].clip(low, high), atol=step)


@pytest.mark.core
@pytest.mark.parametrize(("whole", "number"), [((), 0), (("Scan",), 1)])
def test_a_map_is_chosen_at_first_where_it_lies_over_a_scan(ball, whole, number):
    (shown,) = view_volumes(ball[0], caption="", mask=ball[1], whole=whole)
    text = render("A page", "", sections=[Section("Maps", [shown])])
    assert re.findall(r'<option value="(\d)" selected>', text) == [str(number)]


@pytest.mark.core
def test_a_single_slice_gets_no_viewer():
    assert view_volumes({"Map": Volume.make(np.eye(3)[..., None].astype(np.float32), AFFINE)}, caption="") == []


@pytest.mark.core
def test_voxels_that_are_not_finite_are_not_shown():
    values = np.ones((3, 3, 3), np.float32)
    values[0, 0, 0], values[1, 1, 1] = np.nan, 5
    image = unpack(view_volumes({"Map": Volume.make(values, AFFINE)}, caption="")[0].layers[0])
    steps = np.asarray(image.dataobj.get_unscaled())
    assert steps[0, 0, 0] == 0 and (np.delete(steps.ravel(), 0) > 0).all()


@pytest.mark.core
def test_colours_are_matplotlibs_and_the_lowest_is_clear():
    table = color_table("viridis")
    assert table["I"][:2] == [0, 1] and table["I"][-1] == 255 and table["A"] == [0] + [255] * (len(table["I"]) - 1)
    ends = np.rint(255 * matplotlib.colormaps["viridis"]([0.0, 1.0])[:, :3])
    assert [[table[name][place] for name in "RGB"] for place in (1, -1)] == ends.tolist()
    # Where nothing lies beneath, the lowest is drawn all the same.
    assert [table[name][0] for name in "RGB"] == [0, 0, 0]


@pytest.mark.core
def test_only_a_page_with_a_viewer_carries_the_library_and_may_run_it(page):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}' blob:" in policy and "unsafe-inline" not in policy.split("script-src")[1]
    library = re.search(r'id="viewer-library">([^<]*)<', page)[1]
    vendored = (viewer.FOLDER / "niivue" / "niivue.umd.js").read_bytes()
    assert gzip.decompress(base64.b64decode(library)) == vendored
    plain = render("A page", "", sections=[Section("Words", [Text(["None."])])])
    assert "<script" not in plain and "script-src" not in plain


@pytest.mark.core
def test_the_vendored_library_is_the_one_its_version_names():
    folder = viewer.FOLDER / "niivue"
    version, digest = (folder / "VERSION").read_text().split()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert hashlib.sha256((folder / "niivue.umd.js").read_bytes()).hexdigest() == digest
    assert (folder / "LICENSE").read_text().startswith("BSD 2-Clause License")


@pytest.mark.core
def test_names_cannot_end_an_element():
    cube = Volume.make(np.arange(27, dtype=np.float32).reshape(3, 3, 3), AFFINE)
    text = render("A page", "", sections=[Section("Maps", view_volumes({HOSTILE: cube}, caption=HOSTILE))])
    assert "alert('x')" not in text and text.count("<script>") == 1


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium here: the viewer is not tried in a browser")
    folder = tmp_path_factory.mktemp("viewer")
    (folder / "page.html").write_text(page)
    with Browser(program, folder / "profile") as browser:
        browser.open(folder / "page.html")
        yield browser


def told(browser) -> tuple[list[float], dict[str, float]]:
    """Return the place and the values under the viewer."""
    text = browser.ask("document.querySelector('output').textContent")
    place, values = text.split(" mm: ")
    numbers = [float(number) for number in re.findall(r"[xyz] (-?[\d.]+)", place)]
    return numbers, {name: float(value) for name, value in re.findall(r"(Scan|Side) ([-\d.]+)", values)}


def test_a_browser_shows_the_volumes_and_their_values(browser):
    figure = "document.querySelector('figure.viewer')"
    assert browser.ask(f"{figure}.hidden") is False
    browser.ask(f"{figure}.querySelector('button').click()")
    browser.wait(f"{figure}.dataset.state !== undefined")
    assert browser.ask(f"{figure}.dataset.state") == "open", browser.console
    box = "(box => [box.x, box.y, box.width, box.height])(document.querySelector('canvas').getBoundingClientRect())"
    left, top, width, height = browser.ask(box)
    # The axial plane stands first, the subject's right on the left of it.
    places = {"right": (0.1, 0.8), "left": (0.2, 0.2)}
    for x, value in places.values():
        browser.click(left + x * width, top + 0.5 * height)
        # 255 steps from 0 to 1, told in three digits.
        nearest = round(round(value * 254) / 254, 3)
        browser.wait(f"document.querySelector('output').textContent.includes('Side {nearest}')", 10)
        place, values = told(browser)
        assert (place[0] > 0) == (value == 0.8)
        assert values["Scan"] == 100
    picture = np.asarray(Image.open(io.BytesIO(browser.picture())).convert("RGB"), float)
    for x, value in places.values():
        # Just above the cross.
        pixel = picture[int(top + 0.5 * height) - 12, int(left + x * width) - 12]
        expected = 255 * np.array(matplotlib.colormaps["viridis"](value)[:3])
        np.testing.assert_allclose(pixel, expected, atol=12)

    # Outside of the ball the scan of 0 HU is the lowest grey that is shown.
    np.testing.assert_allclose(picture[int(top + 0.5 * height) - 12, int(left + 0.01 * width)], 0, atol=12)

    before, _ = told(browser)
    browser.mouse("mouseWheel", left + 0.15 * width, top + 0.5 * height, deltaX=0, deltaY=100)
    browser.wait(f"!document.querySelector('output').textContent.includes('z {before[2]:g} mm')", 5)
    after, _ = told(browser)
    assert after[2] != before[2] and np.allclose(after[:2], before[:2], atol=2)

    browser.ask("(s => { s.value = '0'; s.dispatchEvent(new Event('change')); })(document.querySelector('select'))")
    assert "Side" not in browser.ask("document.querySelector('output').textContent")
    assert [line for line in browser.console if line[0] in ("error", "warning")] == []
