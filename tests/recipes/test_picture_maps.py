"""Maps of pictures: on their own pixels, as NIfTI and as a picture, also where they were cropped to a disc."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxmed.arrays.task import Task
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.scans import Record
from jaxmed.io import nifti
from jaxmed.io.scans import ScanFiles
from jaxmed.recipes.map_files import Outcome, read_input
from jaxmed.recipes.predict_stage import write_maps, write_previews
from jaxmed.report.overlay import Slices, blend, heat_colors, heat_of

pytestmark = pytest.mark.core
TASK = Task("binary", ("referable",))


@pytest.fixture(params=["xyz", "RAS"])
def written(request, tmp_path):
    """Write the map of a photograph whose disc is cut off above; its one bright patch lies below and to the right."""
    rows, columns = np.ogrid[:90, :120]
    disc = (rows - 20) ** 2 + (columns - 60) ** 2 <= 40**2
    picture = np.where(disc[..., None], np.array([200, 110, 60]), 2) + np.arange(90)[:, None, None] % 3
    Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "eye.png")
    preprocess = Preprocess((27, 27), 3, axes=request.param, crop="disc", fit="stretch", interpolation="bicubic")
    record = Record("eye", ScanFiles(tmp_path / "eye.png"), {})
    patches = np.zeros((1, 3, 3), np.float32)
    patches[(0, 2, 1) if request.param == "xyz" else (0, 1, 0)] = 2.0  # row and column, or x and y from below
    arrays = {"values": np.array([0.8], np.float32), "mapped": np.array([0]), "maps": patches}
    scan = read_input(preprocess, record)
    kept, warnings = write_maps(tmp_path, TASK, preprocess, "gradient times token", record, scan, arrays)
    assert warnings == ()
    return tmp_path, preprocess, Outcome(record, (), "", kept)


def test_a_map_lies_on_the_pixels_of_its_picture(written):
    folder, preprocess, _ = written
    stem = folder / "maps" / "eye__referable"
    shown = np.asarray(Image.open(f"{stem}.png"))
    assert shown.shape == (90, 120) and shown.max() == 255
    assert not shown[:, :20].any() and not shown[:, 101:].any() and not shown[61:].any()
    # The lowest third of the square that begins 20 rows above the picture; the middle of its columns.
    row, column = np.unravel_index(shown.argmax(), shown.shape)
    assert 34 <= row <= 61 and 47 <= column <= 74
    volume = nifti.read(f"{stem}.nii.gz")
    assert volume.array.shape == ((90, 120, 1) if preprocess.axes == "xyz" else (120, 90, 1))
    sidecar = json.loads((folder / "maps" / "eye__referable.json").read_text())
    assert sidecar["definition"] == "gradient times token"
    assert sidecar["frame"] == "the scan's own grid" and sidecar["largest"] == pytest.approx(2.0, abs=0.2)


def test_the_report_shows_it_upright(written):
    folder, preprocess, outcome = written
    (preview,) = write_previews(folder, [outcome], "top", TASK, preprocess)
    with np.load(folder / "previews" / preview.file) as stored:
        slices = Slices(
            stored["image"], stored["overlay"], tuple(stored["index"].tolist()), tuple(stored["spacing"].tolist()),
            int(stored["axis"]), float(stored["largest"]),
        )  # fmt: skip
    assert slices.image.shape == (1, 90, 120, 3) and slices.overlay.shape == (1, 90, 120)
    np.testing.assert_allclose(slices.image[0, 20, 60], np.array([202, 112, 62]) / 255, atol=1e-6)  # in its colours
    assert slices.image[0, 80, 60].max() < 0.05
    assert slices.overlay[0, 45, 60] > 0 and not slices.overlay[0, 80].any()
    heat = heat_of(slices)[0]
    assert heat.max() == 1
    # Clear where the map is 0, three quarters opaque where it is largest.
    shown, top = blend(slices.image[0], heat), np.unravel_index(heat.argmax(), heat.shape)
    np.testing.assert_array_equal(shown[80], slices.image[0, 80])
    np.testing.assert_allclose(shown[top], 0.25 * slices.image[0][top] + 0.75 * heat_colors(heat)[top][:3], atol=1e-6)
