"""From a file to a network's input and back: grids, windows, axes, and what is refused; TANGERINE's cube above all."""

import dataclasses
import json
import pickle
import struct
import zlib

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from jaxmed.arrays.bspline import bspline_weights, resize_bspline
from jaxmed.arrays.grid import reorient
from jaxmed.config import from_record, to_record
from jaxmed.data.inputs import check_scans
from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Preprocess, load
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.io.scans import ScanFiles
from jaxmed.models.published.tangerine import PREPROCESS
from jaxmed.volume import Volume

pytestmark = pytest.mark.core
# RAS+ of an axial scan: z upwards. Stored axes x, y, z are left-right, back-front, foot-head.
AXIAL = np.diag([2.0, 2.0, 3.0, 1.0])


def volume(array, affine=AXIAL):
    return Volume.make(np.asarray(array, np.float32), affine)


def ct(size=(256, 256, 256), **changes):
    return dataclasses.replace(PREPROCESS, size=size, **changes)


def in_hu(preprocess):
    """Return a function from a scan to the cube in HU, before the window."""
    bare = dataclasses.replace(preprocess, intensity=Intensity("keep"))
    return lambda scan: bare(scan)[..., 0]


def turned(preprocess, affine):
    """Return what is said of the axes of a scan."""
    return list(preprocess.prepare(volume(noise((4, 4, 4)), affine)).notes)


def noise(shape, seed=0):
    return 300 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32) - 400


# Resampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", ["clamp", "zero"])
@pytest.mark.parametrize(("old", "new"), [(20, 8), (8, 15), (8, 8), (1, 1), (2, 3)])
def test_a_constant_stays_constant(old, new, edge):
    # No axis grows to twice its size, so nothing lies outside.
    found = resize_bspline(np.full((old, 5, 3), -700.0, np.float32), (new, 4, 4), edge)
    np.testing.assert_allclose(found, -700.0, rtol=1e-6)


def test_a_linear_ramp_is_reproduced_in_the_interior():
    places = np.stack(np.meshgrid(*[np.arange(n) for n in (24, 30, 20)], indexing="ij"))
    ramp = 10.0 * places[0] - 7.0 * places[1] + 3.0 * places[2] - 500
    cube = in_hu(ct(size=(25, 16, 18)))(volume(ramp))
    d, h, w = (np.arange(n) * o / n for n, o in ((25, 20), (16, 30), (18, 24)))
    expected = 10.0 * w - 7.0 * h[:, None] + 3.0 * d[:, None, None] - 500
    # The mirrored ends ring by a quarter each voxel: after six of them less than 0.01 HU is left.
    inside = np.ix_(*[(x > 6) & (x < o - 7) for x, o in ((d, 20), (h, 30), (w, 24))])
    assert expected[inside].size > 200
    np.testing.assert_allclose(cube[inside], expected[inside], atol=0.02)


@pytest.mark.parametrize("size", [(7, 9, 5), (12, 6, 10), (16, 10, 10)])
def test_resampling_is_scipys_cubic_spline_at_the_corner_aligned_places(size):
    array = noise((8, 9, 10))
    cube = in_hu(ct(size=size))(volume(array))
    places = np.meshgrid(*[np.arange(n) * o / n for n, o in zip(size, (10, 9, 8), strict=True)], indexing="ij")
    # Beyond the field of view, half a voxel past the last centre, the last voxel is repeated.
    places = [np.where(p >= o - 0.5, o - 1, p) for p, o in zip(places, (10, 9, 8), strict=True)]
    expected = scipy.ndimage.map_coordinates(array.T.astype(np.float64), places, order=3, mode="mirror")
    np.testing.assert_allclose(cube, expected, rtol=0, atol=2e-3)


def test_the_same_size_changes_nothing():
    array = noise((6, 5, 4))
    np.testing.assert_array_equal(in_hu(ct(size=(4, 5, 6)))(volume(array)), array.T)


@pytest.mark.parametrize(("old", "new", "outside"), [(8, 15, 0), (8, 16, 1), (8, 24, 1), (8, 40, 2), (8, 64, 4)])
def test_upsampling_by_two_or_more_reaches_beyond_the_field_of_view(old, new, outside):
    """The last place is old - old/new, and the field of view ends at old - 1/2."""
    clamped, zeroed = (bspline_weights(old, new, edge) for edge in ("clamp", "zero"))
    last = np.zeros(old)
    last[-1] = 1
    np.testing.assert_array_equal(clamped[: new - outside], zeroed[: new - outside])
    for row in range(new - outside, new):
        np.testing.assert_allclose(clamped[row], last, atol=1e-12)
        np.testing.assert_array_equal(zeroed[row], 0)
    if outside < new:
        assert np.abs(zeroed[new - outside - 1]).sum() > 0.9
    array = np.full((old, 4, 4), -1000.0, np.float32)
    array[0] = -900
    cubes = {edge: in_hu(ct(size=(4, 4, new), edge=edge))(volume(array)) for edge in ("clamp", "zero")}
    assert (cubes["zero"] == 0).sum() == 16 * outside
    np.testing.assert_allclose(cubes["clamp"][..., new - outside :], -1000.0, atol=0.5)


# The window ----------------------------------------------------------------------------------------------------------


def test_hounsfield_units_become_0_to_1():
    values = np.array([-3000.0, -1200.0, -200.0, 800.0, 3000.0])
    array = np.zeros((5, 2, 2), np.float32) + values[:, None, None]
    cube = ct(size=(2, 2, 5))(volume(array))
    assert cube.shape == (2, 2, 5, 1) and cube.dtype == np.float32
    np.testing.assert_allclose(cube[0, 0, :, 0], [0.0, 0.0, 0.5, 1.0, 1.0], atol=1e-7)


def test_overshoot_of_the_spline_is_clipped_after_resampling():
    array = np.full((16, 4, 4), -1200.0, np.float32)
    array[8:] = 800.0
    preprocess = ct(size=(4, 4, 24))
    raw, cube = in_hu(preprocess)(volume(array)), preprocess(volume(array))
    assert raw.min() < -1250 and raw.max() > 850
    assert cube.min() == 0.0 and cube.max() == 1.0
    np.testing.assert_allclose(cube[..., 0], np.clip((raw + 1200) / 2000, 0, 1), atol=1e-6)


# Axes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["zyx", "xyz", "zxy", "yzx", "yxz", "xzy"])
def test_axis_orders(order):
    array = noise((4, 5, 6))
    shape = tuple(array.shape["xyz".index(letter)] for letter in order)
    found = in_hu(ct(size=shape, axes=order))(volume(array))
    np.testing.assert_array_equal(found, np.einsum(f"xyz->{order}", array))


def test_a_nifti_file_is_read_as_simpleitk_reads_it(tmp_path):
    array = noise((4, 5, 6)).round()
    nifti.write(tmp_path / "scan.nii.gz", volume(array))
    found = in_hu(ct(size=(6, 5, 4)))(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(found, array.transpose(2, 1, 0))


def test_a_dicom_folder_is_read(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    stored = np.random.default_rng(0).integers(0, 2000, (5, 4, 6)).astype("<i2")
    for index, image in enumerate(stored):
        meta = pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        data = pydicom.Dataset()
        data.file_meta = meta
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.Modality = "1.2.3", "CT"
        data.Rows, data.Columns = image.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.PixelData = image.tobytes()
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 2.5 * index], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness = [0.7, 0.7], 2.5
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.save_as(tmp_path / f"{9 - index}.dcm", enforce_file_format=True)
    preprocess = ct(size=(5, 4, 6))
    np.testing.assert_array_equal(in_hu(preprocess)(tmp_path), stored - 1024.0)  # slices from foot to head
    np.testing.assert_array_equal(preprocess(ScanFiles(tmp_path)), preprocess(tmp_path))


def test_axes_of_another_order_are_told():
    preprocess = ct((4, 4, 4))
    assert turned(preprocess, AXIAL) == []
    assert turned(preprocess, np.diag([-1.0, -1.0, 1.0, 1.0])) == []
    coronal = AXIAL[:, [0, 2, 1, 3]]  # stored axes: left-right, foot-head, back-front
    found = turned(preprocess, coronal)
    assert len(found) == 2
    assert "axis D of the cube runs anterior-posterior (stored axis z of RSA)" in found[0]
    assert "axis H of the cube runs superior-inferior" in found[1] and "axes='yzx'" in found[1]
    assert turned(ct((4, 4, 4), axes="yzx"), coronal) == []


def test_values_that_cannot_be_hounsfield_units_are_told():
    assert ct((4, 4, 4)).prepare(volume(noise((8, 8, 8)))).notes == ()
    found = ct((4, 4, 4)).prepare(volume(np.abs(noise((4, 4, 4))))).notes
    assert len(found) == 1 and "do not look like CT in HU" in found[0]


# The way back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["zyx", "yzx"])
def test_inverse_puts_a_map_where_it_belongs_on_odd_grids(order):
    shape = (31, 27, 23)
    scan = volume(noise(shape))
    preprocess = ct(size=(16, 20, 24), axes=order)
    # A function of the place in the scan, linear along each axis, sampled on the cube: the way back is exact up to the
    # last voxels, which lie beyond the cube's last centre.
    axes = [np.arange(n) * shape["xyz".index(a)] / n for n, a in zip(preprocess.size, order, strict=True)]
    slopes = dict(zip("xyz", (1.0, -2.0, 0.5), strict=True))
    cube = sum(
        slopes[a] * axis.reshape([-1 if place == i else 1 for i in range(3)])
        for place, (a, axis) in enumerate(zip(order, axes, strict=True))
    )
    found = preprocess.inverse(np.asarray(cube, np.float32), scan.grid)
    x, y, z = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    expected = 1.0 * x - 2.0 * y + 0.5 * z
    inside = np.ix_(*[np.arange(n) <= axes[order.index(a)][-1] for n, a in zip(shape, "xyz", strict=True)])
    assert found.array.shape == shape and found.array.dtype == np.float32
    np.testing.assert_allclose(found.array[inside], expected[inside], atol=2e-4)
    np.testing.assert_array_equal(found.affine, scan.affine)
    with pytest.raises(InputError, match=r"cube: expected a map of shape \(16, 20, 24\), found \(4, 4, 4\)"):
        preprocess.inverse(np.zeros((4, 4, 4), np.float32), scan.grid)


def test_a_smooth_scan_survives_the_way_to_the_cube_and_back():
    x, y, z = np.meshgrid(*[np.linspace(0, 2, n) for n in (33, 29, 25)], indexing="ij")
    scan = volume(500 * np.sin(x) * np.cos(y) - 300 * z)
    preprocess = ct(size=(32, 32, 32))
    back = preprocess.inverse(in_hu(preprocess)(scan), scan.grid)
    np.testing.assert_allclose(back.array[2:-2, 2:-2, 2:-2], scan.array[2:-2, 2:-2, 2:-2], atol=1.0)


def test_the_affine_of_a_cube_leads_to_the_scans_world():
    affine = np.array([[0.0, 2.0, 0.0, -40.0], [-1.5, 0.0, 0.0, 70.0], [0.0, 0.0, 3.0, 5.0], [0.0, 0.0, 0.0, 1.0]])
    scan = volume(noise((20, 10, 8)), affine)
    preprocess = ct(size=(16, 20, 10))
    cube = preprocess.input_grid(scan.grid).affine
    # Cube voxel (d, h, w) samples stored index (w * 20/10, h * 10/20, d * 8/16).
    for d, h, w in ((0, 0, 0), (4, 6, 5), (15, 19, 9)):
        np.testing.assert_allclose(cube @ [d, h, w, 1], affine @ [w * 2.0, h * 0.5, d * 0.5, 1], atol=1e-12)


# Files and mistakes --------------------------------------------------------------------------------------------------


def test_prepared_cubes_are_read_as_they_are(tmp_path):
    cube = np.random.default_rng(0).random((6, 5, 4)).astype(np.float32)
    preprocess = ct(size=(6, 5, 4))
    np.savez(tmp_path / "a.npz", volume=cube)
    np.save(tmp_path / "b.npy", cube[None, ..., None])
    np.savez_compressed(tmp_path / "c.npz", volume=cube.astype(np.float16))
    for name, tolerance in (("a.npz", 0), ("b.npy", 0), ("c.npz", 3e-4)):
        found = preprocess(tmp_path / name)
        assert found.shape == (6, 5, 4, 1) and found.dtype == np.float32
        np.testing.assert_allclose(found[..., 0], cube, atol=tolerance)
    smaller = ct(size=(3, 5, 4))(tmp_path / "a.npz")
    assert smaller.shape == (3, 5, 4, 1) and 0 <= smaller.min() and smaller.max() <= 1


def write_cube(name, change):
    def write(folder):
        cube = change(np.random.default_rng(0).random((6, 5, 4)))
        if name.endswith(".npz"):
            np.savez(folder / name, volume=cube)
        else:
            np.save(folder / name, cube, allow_pickle=True)
        return folder / name

    return write


def cut(folder):
    path = write_cube("a.npz", lambda cube: cube)(folder)
    path.write_bytes(path.read_bytes()[:200])
    return path


def other_name(folder):
    np.savez(folder / "a.npz", scan=np.zeros((2, 2, 2)))
    return folder / "a.npz"


def poked(value):
    def change(cube):
        cube = cube.astype(np.float32)
        cube[1, 2, 3] = value
        return cube

    return change


def scan_file(change):
    def write(folder):
        nifti.write(folder / "a.nii.gz", change(noise((6, 5, 4))), allow_nonfinite=True)
        return folder / "a.nii.gz"

    return write


MISTAKES = {
    "missing": (lambda folder: folder / "none.npz", "a NumPy file, found no such file"),
    "cut": (cut, "a NumPy file of numbers, found a damaged one"),
    "not NumPy": (lambda f: (f / "a.npy").write_bytes(b"hello" * 9) and f / "a.npy", "a NumPy file of numbers"),
    "another name": (other_name, "an array named 'volume', found scan; save it with np.savez"),
    "objects": (write_cube("a.npy", lambda cube: np.array([{}, None])), "found a damaged one or one of objects"),
    "text": (write_cube("a.npy", lambda cube: np.array(["a"])), "real numbers, found <U1"),
    "complex": (write_cube("a.npz", lambda cube: cube + 1j), "real numbers, found complex128"),
    "two volumes": (write_cube("a.npz", lambda cube: np.stack([cube, cube])), r"a 3D volume, found shape (2, 6, 5, 4)"),
    "flat": (write_cube("a.npz", lambda cube: cube[0]), "a 3D volume, found shape (5, 4)"),
    "empty": (write_cube("a.npz", lambda cube: cube[:0]), "a 3D volume, found shape (0, 5, 4)"),
    "in HU": (write_cube("a.npz", lambda cube: 2000 * cube - 1200), "values normalised to [0, 1], found [-11"),
    "NaN": (write_cube("a.npz", poked(np.nan)), "finite voxels, found 1 NaN or Inf voxels of 120"),
    "Inf": (write_cube("a.npz", poked(-np.inf)), "finite voxels, found 1 NaN or Inf voxels of 120"),
    "constant": (write_cube("a.npz", np.zeros_like), "an image with contrast, found a constant volume, 0 everywhere"),
    "NaN in a scan": (scan_file(lambda array: volume(poked(np.nan)(array))), "NaN or Inf voxels of 120"),
    "constant scan": (scan_file(lambda array: volume(np.full_like(array, -5))), "a constant volume, -5 everywhere"),
    "4D scan": (scan_file(lambda array: volume(np.stack([array, array], -1))), "3D data"),
    "no image": (lambda f: (f / "a.nii.gz").write_bytes(b"hello" * 99) and f / "a.nii.gz", "a.nii.gz: expected"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_the_file(mistake, tmp_path):
    make, message = MISTAKES[mistake]
    path = make(tmp_path)
    with pytest.raises(InputError) as caught:
        ct(size=(4, 4, 4))(path)
    assert path.name in str(caught.value) and message in str(caught.value)


def test_a_volume_in_memory_is_checked_too():
    for array in (np.full((4, 4, 4), 7.0), np.where(np.arange(64).reshape(4, 4, 4) == 5, np.nan, 1.0)):
        with pytest.raises(InputError, match="volume: expected"):
            ct()(volume(array))
    with pytest.raises(InputError, match=r"volume: expected a 3D volume, found shape \(4, 4, 4, 2\)"):
        ct()(volume(noise((4, 4, 4, 2))))


@pytest.mark.parametrize("settings", [{"size": (0, 4, 4)}, {"axes": "zyy"}, {"edge": "mirror"}])
def test_settings_are_checked(settings, monkeypatch):
    with pytest.raises(Exception, match=next(iter(settings))):  # beartype refuses words that are no Literal
        ct(**settings)


def test_it_travels_to_worker_processes_and_with_weights():
    preprocess = ct(size=(4, 5, 6), edge="zero", spacing=(1.5,))
    assert pickle.loads(pickle.dumps(preprocess)) == preprocess and len({preprocess, ct(size=(4, 5, 6))}) == 2
    assert from_record(Preprocess, json.loads(json.dumps(to_record(preprocess))), "here") == preprocess


# Pictures ------------------------------------------------------------------------------------------------------------


def torchvision_input(picture, shorter, size):
    """The evaluation transform of RETFound: Resize(shorter, bicubic), CenterCrop(size), ToTensor, Normalize."""
    width, height = picture.size
    scale = shorter / min(width, height)
    wide, high = (shorter if n == min(width, height) else int(shorter * n / min(width, height)) for n in picture.size)
    assert scale and (wide, high)
    resized = picture.resize((wide, high), Image.Resampling.BICUBIC)
    top, left = round((high - size) / 2.0), round((wide - size) / 2.0)
    array = np.asarray(resized.crop((left, top, left + size, top + size)), np.float32) / np.float32(255)
    return (array - np.array(MEAN, np.float32)) / np.array(STD, np.float32)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FUNDUS = Preprocess(
    (28, 28), 3, axes="xyz", fit="cover", shorter=32, interpolation="bicubic", intensity=Intensity(mean=MEAN, std=STD)
)


@pytest.mark.parametrize("shape", [(90, 61), (50, 50), (40, 57), (61, 91)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_picture_of_colour_becomes_what_torchvision_makes_of_it(shape, suffix, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    pixels[10:30, 10:40] = 255  # whose edges overshoot
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / f"a{suffix}")
    found = FUNDUS(tmp_path / f"a{suffix}")
    assert found.shape == (28, 28, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, torchvision_input(picture, 32, 28), rtol=0, atol=1e-6)


def test_grey_pictures_become_colour_and_floats_are_resized_as_they_are(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (40, 33), np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    expected = torchvision_input(Image.fromarray(grey).convert("RGB"), 32, 28)
    np.testing.assert_allclose(FUNDUS(tmp_path / "a.png"), expected, rtol=0, atol=1e-6)
    smooth = np.random.default_rng(0).random((40, 33, 3)).astype(np.float32)
    bare = dataclasses.replace(FUNDUS, intensity=Intensity("keep"))
    resized = [np.asarray(Image.fromarray(smooth[..., c]).resize((32, 38), Image.Resampling.BICUBIC)) for c in range(3)]
    np.testing.assert_array_equal(bare(smooth), np.stack(resized, -1)[5:33, 2:30])


def png_of_16_bits(pixels):
    """Return a PNG of 16-bit colour, which Pillow reads and does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


GREY = np.random.default_rng(0).integers(0, 256, (24, 32), np.uint8)
COLOUR = np.kron(np.random.default_rng(1).integers(0, 256, (3, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
ALPHA = Image.fromarray(GREY)


def save_as(mode, path):
    """Write a picture of a mode; return what a network of three channels should see, and how near to it."""
    three = np.repeat(GREY[..., None], 3, axis=2) / 255
    match mode:
        case "grey" | "grey jpeg":
            Image.fromarray(GREY).save(path, quality=100)
            return three, 0.02 if "jpeg" in mode else 0
        case "grey and alpha":
            Image.merge("LA", [Image.fromarray(GREY), ALPHA]).save(path)
            return three, 0
        case "two values":
            Image.fromarray(GREY > 99).save(path)
            return np.repeat((GREY > 99)[..., None], 3, axis=2), 0
        case "grey of 16 bits":
            Image.fromarray(GREY.astype(np.uint16) * 200).save(path)
            return three * 255 * 200 / 65535, 1e-7
        case "colour of 16 bits":
            path.write_bytes(png_of_16_bits(COLOUR.astype(np.uint16) * 257))
            return COLOUR / 255, 1 / 255
        case "colour and alpha":
            Image.merge("RGBA", [*Image.fromarray(COLOUR).split(), ALPHA]).save(path)
            return COLOUR / 255, 0  # not laid over anything: what is transparent keeps its colour
        case "palette":
            Image.fromarray(COLOUR).quantize(16, method=Image.Quantize.MEDIANCUT).save(path)
            return COLOUR / 255, 0
        case "CMYK" | "YCbCr":
            Image.fromarray(COLOUR).convert(mode).save(path)
            return COLOUR / 255, 0.02
        case "turned":
            exif = Image.Exif()
            exif[0x0112] = 6  # the stored picture is to be turned clockwise
            Image.fromarray(np.rot90(COLOUR).copy()).save(path, exif=exif, quality=100, subsampling=0)
            return COLOUR / 255, 0.05
    raise AssertionError(mode)


MODES = {
    "grey": "png", "grey jpeg": "jpg", "grey and alpha": "png", "two values": "png", "grey of 16 bits": "png",
    "colour of 16 bits": "png", "colour and alpha": "png", "palette": "png", "CMYK": "tif", "YCbCr": "tif",
    "turned": "jpg",
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_network_of_three_channels_sees_any_picture_in_colour(mode, tmp_path):
    expected, tolerance = save_as(mode, tmp_path / f"a.{MODES[mode]}")
    found = Preprocess((24, 32), 3, axes="xyz")(tmp_path / f"a.{MODES[mode]}")
    assert found.shape == (24, 32, 3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance or 1e-7)
    if mode.startswith("grey"):
        assert (found == found[..., :1]).all()


def test_pictures_that_no_network_of_three_channels_takes_are_one_line(tmp_path):
    preprocess = Preprocess((24, 32), 3, axes="xyz")
    pages = [Image.fromarray(np.roll(GREY, shift)) for shift in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    wrong = {"pages.tif": r"a picture of 3 channels, found shape \(3, 24, 32\)"}
    for suffix in ("jpg", "png", "tif"):
        Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(content[: len(content) * 2 // 3])
        wrong[f"cut.{suffix}"] = "a whole image, found a damaged one"
    for name, message in wrong.items():
        with pytest.raises(InputError, match=f"{name}: expected {message}") as caught:
            preprocess(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "a.png").write_bytes((tmp_path / "whole.jpg").read_bytes())  # by its content, whatever its name
    assert preprocess.prepare(tmp_path / "a.png").image.shape == (24, 32, 3)
    np.savez(tmp_path / "arrays.npz", GREY)
    (tmp_path / "b.png").write_bytes((tmp_path / "arrays.npz").read_bytes())
    with pytest.raises(InputError, match=r"b\.png: expected a picture, found a NumPy archive"):
        check_scans([tmp_path / "a.png", tmp_path / "b.png"], preprocess, 0, 1)


def test_an_array_is_cut_about_its_centre_and_what_is_added_is_the_lower_end():
    array = np.arange(30.0).reshape(5, 6)
    plain = Preprocess((3, 8), intensity=Intensity("window", window=(0.0, 10.0), range=(0.0, 2.0), clip=False))
    found = plain(array)
    assert found.shape == (3, 8, 1)
    np.testing.assert_allclose(found[:, 1:7, 0], array[1:4] / 5, rtol=1e-6)
    assert not found[:, [0, 7]].any()
    with pytest.raises(InputError, match="2 axes of space and 1 channel"):
        plain(np.zeros((2, 3, 4, 5)))
    with pytest.raises(InputError, match="finite values"):
        plain(np.full((2, 3), np.nan))
    cover = Preprocess(
        (4, 4), 3, fit="cover", intensity=Intensity("window", window=(0.0, 255.0), range=(-1.0, 1.0), clip=False),
        padding=-1.0,
    )  # fmt: skip
    np.testing.assert_allclose(cover(np.full((8, 16, 3), 255.0)), np.ones((4, 4, 3)), rtol=1e-6)


def test_a_picture_stands_upright_or_as_it_is_stored(tmp_path):
    picture = np.zeros((6, 10), np.uint8)
    picture[1, 7] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    shown = Preprocess((10, 6))(tmp_path / "a.png")
    stored = Preprocess((6, 10), axes="xyz")(tmp_path / "a.png")
    assert shown[7, 4, 0] == 1 and stored[1, 7, 0] == 1
    for axes in ("RAS", "xyz"):
        loaded = load(ScanFiles(tmp_path / "a.png"), Preprocess((4, 4), axes=axes))
        np.testing.assert_array_equal(loaded.as_stored(loaded.restore(loaded.volume.array)), picture / 255)


# Volumes of our own frame --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"spacing": (4.0,)}, {"fit": "stretch"}, {"fit": "cover"}])
@pytest.mark.parametrize("size", [(12, 10, 16), (12, 10)])
def test_a_map_on_the_input_goes_back_to_its_voxels(settings, size):
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in (20, 24, 16)], indexing="ij")
    smooth = np.cos(x) * np.cos(0.7 * y) * np.cos(0.8 * z)
    scan = reorient(volume(smooth, np.diag([2.0, 2.0, 2.0, 1.0])), "SAL")
    preprocess = Preprocess(size, intensity=Intensity("keep"), **settings)
    found = preprocess(scan)
    assert found.shape == (*size, 1) if len(size) == 3 else (16, *size, 1)
    back = preprocess.inverse(found[..., 0], scan.grid)
    seen = preprocess.inverse(np.ones_like(found[..., 0]), scan.grid).array
    np.testing.assert_array_equal(back.affine, scan.affine)
    is_inside = scipy.ndimage.binary_erosion(seen > 0.999, iterations=4 if settings else 1, border_value=1)
    is_inside[[0, -1]] = is_inside[:, [0, -1]] = is_inside[:, :, [0, -1]] = False
    assert is_inside.sum() > 50
    np.testing.assert_allclose(back.array[is_inside], scan.array[is_inside], atol=0.05 if settings else 1e-6)


def test_a_volume_comes_to_frame_spacing_size_and_range(tmp_path):
    array = np.random.default_rng(0).normal(100, 10, (12, 10, 8)).astype(np.float32)
    array[:2] = 0
    scan = volume(array, np.diag([-2.0, 2.0, 2.0, 1.0]))
    nifti.write(tmp_path / "a.nii.gz", scan)
    intensity = Intensity("window", window=(0.0, 200.0))
    preprocess = Preprocess((8, 8, 8), spacing=(4.0, 4.0, 4.0), intensity=intensity, padding=0.25)
    found = preprocess(tmp_path / "a.nii.gz")
    assert found.shape == (8, 8, 8, 1) and found.dtype == np.float32
    np.testing.assert_array_equal(found, preprocess(scan))
    grid = preprocess.input_grid(scan.grid)
    assert grid.affine[0, 0] == 4 and found[0, 0, 0, 0] == 0.25
    # Zero voxels were at the low end of an axis that points left: now at its high end.
    assert found[6, 4, 4, 0] < found[1, 4, 4, 0]
    whole = Preprocess((6, 5, 4), axes="xyz", fit="stretch", intensity=Intensity("keep"))
    np.testing.assert_allclose(np.linalg.norm(whole.input_grid(scan.grid).affine[:3, :3], axis=0), 4)
    assert whole(scan).shape == (6, 5, 4, 1)


def test_the_order_of_scaling_and_cutting_decides_what_is_added():
    scan = volume(np.random.default_rng(0).normal(-50, 10, (6, 6, 6)), np.eye(4))
    fixed = Intensity("keep", mean=(-50.0,), std=(10.0,))
    cut_first = Preprocess((8, 6, 6), intensity=fixed, order="cut-then-scale")(scan)
    np.testing.assert_allclose(cut_first[[0, -1]], 5.0, rtol=1e-6)  # (0 + 50) / 10
    assert not Preprocess((8, 6, 6), intensity=fixed)(scan)[[0, -1]].any()
    whole, coarse = (
        Preprocess((3, 3, 3), spacing=(2.0,), intensity=Intensity("minmax"), order=order)(scan)
        for order in ("scale-first", "scale-then-cut")
    )
    assert coarse.max() == 1 and coarse.min() == 0 and whole.max() < 1 and whole.min() > 0


def test_channels_are_scaled_by_themselves_and_zeros_stay():
    generator = np.random.default_rng(0)
    array = np.stack([generator.normal(mean, 5, (6, 7, 8)) for mean in (100, 900, 20)], -1).astype(np.float32)
    array[:2] = 0
    found = Preprocess((6, 7, 8), 3, intensity=Intensity("zscore", inside="nonzero"))(volume(array, np.eye(4)))
    assert found.shape == (6, 7, 8, 3) and not found[:2].any()
    np.testing.assert_allclose(found[2:].mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(found[2:].std((0, 1, 2)), 1, atol=1e-4)


# Against SimpleITK ---------------------------------------------------------------------------------------------------


def simpleitk_cube(array, affine, size, kind):
    """The original: new spacing size * spacing / 256, same origin and direction, cubic B-spline, else 0 HU."""
    import SimpleITK as sitk

    image = sitk.Cast(sitk.GetImageFromArray(np.ascontiguousarray(array.T)), kind)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    x, y, z = size[::-1]
    resample = sitk.ResampleImageFilter()
    resample.SetSize((x, y, z))
    resample.SetOutputSpacing([n * s / m for n, s, m in zip(image.GetSize(), spacing, (x, y, z), strict=True)])
    resample.SetOutputOrigin(image.GetOrigin())
    resample.SetOutputDirection(image.GetDirection())
    resample.SetInterpolator(sitk.sitkBSpline)
    resample.SetDefaultPixelValue(0)
    return sitk.GetArrayFromImage(resample.Execute(image)).astype(np.float64)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((40, 36, 30), (24, 28, 20)),  # shrinks
        ((20, 21, 22), (33, 32, 31)),  # grows by less than two
        ((16, 15, 8), (16, 30, 32)),  # stays, twice exactly, twice exactly
        ((9, 8, 7), (35, 24, 27)),  # grows by more than two
    ],
)
def test_resampling_equals_simpleitk(shape, size):
    import SimpleITK as sitk

    array = noise(shape).round()
    expected = simpleitk_cube(array, AXIAL, size, sitk.sitkFloat64)
    found = in_hu(ct(size=size, edge="zero"))(volume(array))
    # Over the whole cube, edge included; SimpleITK's zeros are exactly ours.
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.01)
    clamped = in_hu(ct(size=size))(volume(array))
    np.testing.assert_allclose(clamped[expected != 0], expected[expected != 0], rtol=0, atol=0.01)


REAL = {
    "thorax": "chest_ct_heart/ct_thorax_crop.nii.gz",
    "abdomen": "abdomen_ct/ct_abdomen_pelvis_3mm.nii.gz",
    "pelvis": "sts_mr_pet_ct/STS_002/ct_image.nii.gz",
}


@pytest.mark.peers
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("edge", [96, 160])
def test_real_scans_equal_simpleitk_within_one_hounsfield_unit(name, edge, shared_data):
    import SimpleITK as sitk

    scan = nifti.read(shared_data / REAL[name])
    found = in_hu(ct(size=(edge,) * 3, edge="zero"))(scan)
    difference = np.abs(found - simpleitk_cube(scan.array, scan.affine, (edge,) * 3, sitk.sitkFloat64))
    print(f"{name} to {edge}^3: largest difference {difference.max():.4f} HU")
    assert difference.max() < 0.02
    # Files of int16 stay int16 in SimpleITK, which cuts the fraction off towards 0.
    whole = simpleitk_cube(scan.array, scan.affine, (edge,) * 3, sitk.sitkInt16)
    assert np.abs(found - whole).max() < 1.02
    assert np.mean(np.trunc(found) == whole) > 0.999


# Fixed voxel size from the first voxel on -----------------------------------------------------------------------------

MNI = np.array([[-1.0, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]])


def from_first(size=(128, 152, 128), spacing=1.5, mean=2.0, std=4.0):
    intensity = Intensity("keep", mean=(mean,), std=(std,))
    return Preprocess(size, axes="xyz", spacing=(spacing,), interpolation="linear-first", intensity=intensity,
                      order="cut-then-scale")  # fmt: skip


def test_the_grid_of_mni_space_at_another_voxel_size_is_monais():
    grid = Volume.make(np.broadcast_to(np.int8(0), (182, 218, 182)), MNI).grid
    found = from_first((122, 146, 122)).input_grid(grid)
    assert found.shape == (122, 146, 122)
    np.testing.assert_allclose(found.affine, MNI @ np.diag([1.5, 1.5, 1.5, 1]), atol=1e-12)
    padded = from_first().input_grid(grid)
    np.testing.assert_allclose(padded.affine[:3, 3], [94.5, -130.5, -76.5])


def test_voxels_are_interpolated_from_the_first_on_without_blur_and_scaled_after_padding():
    scan = volume(noise((9, 8, 7)), MNI)
    found = from_first((8, 8, 8)).prepare(scan)
    places = [np.minimum(1.5 * np.arange(count), old - 1) for count, old in ((6, 9), (6, 8), (5, 7))]
    inner = scipy.ndimage.map_coordinates(scan.array.astype(np.float64), np.meshgrid(*places, indexing="ij"), order=1)
    # 6 voxels of 8 stand in the middle, 5 after the smaller part of 3: MONAI's rule.
    expected = (np.pad(inner, [(1, 1), (1, 1), (1, 2)]) - 2) / 4
    np.testing.assert_allclose(found.image[..., 0], expected, rtol=1e-4, atol=1e-4)
    assert found.image[0, 0, 0, 0] == np.float32(-0.5)
    with pytest.raises(ValueError, match="linear-first"):
        Preprocess((8, 8, 8), interpolation="linear-first")


@pytest.mark.peers
def test_monai_spacing_and_padding_are_the_same():
    transforms = pytest.importorskip("monai.transforms")
    torch = pytest.importorskip("torch")
    data = pytest.importorskip("monai.data")
    scan = volume(noise((13, 12, 9)), MNI @ np.diag([1.1, 1, 1.2, 1]))
    image = data.MetaTensor(torch.tensor(scan.array[None]), affine=scan.affine)
    moved = transforms.DivisiblePad(8)(transforms.Spacing(1.5, padding_mode="border")(image))
    preprocess = from_first(moved.shape[1:], mean=0.0, std=1.0)
    np.testing.assert_allclose(preprocess.prepare(scan).image[..., 0], moved[0].numpy(), atol=1e-2)
    np.testing.assert_allclose(preprocess.input_grid(scan.grid).affine, moved.affine.numpy(), atol=1e-6)
