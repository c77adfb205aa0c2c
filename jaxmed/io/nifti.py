"""NIfTI volumes, read with their place in the world and written back to it.

Which affine counts: the sform if its code is above 0, else the qform if its code is above 0, else
the bare voxel size with the origin at the first voxel (the frame is then unknown: left and right
cannot be told). When both are set and disagree, the sform wins; `describe` says so. Positions given
in metres or micrometres are turned into mm; an unstated unit is taken as mm.

Voxels keep their stored axis order; `arrays.grid.reorient` turns them to RAS.
"""

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import nibabel as nib
import numpy as np
from jaxtyping import Float64, Shaped, UInt8
from nibabel import imageglobals
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import DTypeLike

from jaxmed.contents import START, recognise
from jaxmed.errors import InputError
from jaxmed.files import atomic_path, require_file, require_room
from jaxmed.volume import (
    Grid,
    Volume,
    affine_shear,
    affine_spacing,
    check_affine,
    is_same_grid,
    require_intensities,
    require_same_grid,
)

SUFFIXES = (".nii", ".nii.gz")
SHEAR_TOLERANCE = 1e-3
MILLIMETRES = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}  # by the code in xyzt_units
WRITABLE = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4")
# Deflate cannot do better, so a header that promises more is wrong before anything is unpacked.
LARGEST_GZIP_RATIO = 1032
# Some bytes after the last voxel are harmless; of more the header tells nothing.
SPARE_BYTES = 2**28
# By how much b^2 + c^2 + d^2 of a quaternion may exceed 1: numbers written with four decimals do.
QUATERNION_TOLERANCE = 1e-3

# How far labels may be from whole numbers: by the rounding of single precision, and by half a step of a slope.
ROUNDING = 1e-3
LARGEST_LABEL_STEP = 0.25

Header = nib.Nifti1Header | nib.Nifti2Header


def read(
    path: str | Path,
    *,
    dimensions: tuple[int, ...] | None = None,
    allow_nonfinite: bool = False,
    allow_constant: bool = True,
    allow_shear: bool = False,
    fill: float | None = None,
    dtype: DTypeLike = np.float32,
) -> Volume:
    """Read a .nii or .nii.gz file, NIfTI-1 or -2, with its intensity scaling applied.

    Axes of length 1 after the third are dropped, so that a 4D file of one volume is 3D and a 5D
    vector file (x, y, z, 1, component) is 4D; a 2D file is one slice thick.

    Args:
        path: The file.
        dimensions: Numbers of axes that are welcome after dropping; None for 3 or 4.
        allow_nonfinite: Whether some voxels may be without a value: NaN, Inf, or beyond any intensity
            (`volume.LARGEST_INTENSITY`). All of them come as NaN.
        allow_constant: Whether a volume of one single value may pass.
        allow_shear: Whether array axes may be oblique to each other.
        fill: Value of voxels that have none; None refuses them.
        dtype: Type of the voxels; an integer type asks for whole numbers (labels).

    Raises:
        InputError: For whatever is wrong with the file.
    """
    path = _require(path)
    found = _inspect(path)
    wanted = tuple(dimensions or (3, 4))
    if len(found.shape) not in wanted:
        raise InputError(
            path,
            f"{' or '.join(f'{n}D' for n in wanted)} data",
            f"{len(found.shape)}D of shape {found.shape}",
            "choose one volume or channel of it" if len(found.shape) > min(wanted) else "",
        )
    shear = affine_shear(found.affine)
    if shear > SHEAR_TOLERANCE and not allow_shear:
        raise InputError(
            path,
            "an affine with orthogonal axes",
            f"a sheared one (cosine {shear:.2g} between two axes)",
            "resample it onto an orthogonal grid first",
        )
    array = _voxels(path, found, np.dtype(dtype))
    if array.dtype.kind == "f":
        array = require_intensities(array, path, fill=fill, allow_missing=allow_nonfinite)
    if not allow_constant and array.min() == array.max():
        value = array.flat[0]
        what = "all zero" if value == 0 else f"{value:g} everywhere"
        raise InputError(path, "an image with contrast", f"a constant volume, {what}")
    return Volume.make(array, found.affine)


def describe(path: str | Path) -> dict[str, object]:
    """Say what a file's header holds, without reading its voxels.

    Returns:
        shape, dtype, spacing (mm), orientation (such as "RAS"; None when the frame is unknown),
        form ("sform", "qform" or "pixdim": where the affine came from), sform_code, qform_code,
        forms_agree (None unless both are set), shear (largest cosine between two axes).
    """
    path = _require(path)
    found = _inspect(path)
    codes = "".join(str(code) for code in nib.aff2axcodes(found.affine))
    return {
        "shape": found.shape,
        "dtype": found.header.get_data_dtype().name,
        "spacing": affine_spacing(found.affine),
        "orientation": codes if found.form != "pixdim" else None,
        "form": found.form,
        "sform_code": int(found.header["sform_code"]),
        "qform_code": int(found.header["qform_code"]),
        "forms_agree": found.forms_agree,
        "shear": affine_shear(found.affine),
    }


def write(
    path: str | Path,
    volume: Volume,
    *,
    reference: str | Path | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Write a volume, wholly or not at all.

    Integers keep their type, booleans become uint8, everything else float32. A NIfTI-1 header
    holds the affine as float32, so one that came from a NIfTI-1 sform returns exactly; the qform
    is written where it can say the same (orthogonal axes). Both carry code 1, scanner.

    Args:
        path: A .nii or .nii.gz file.
        volume: What to write.
        reference: The input that the volume was made from. It must have the same grid; its NIfTI
            version, unit, codes, sform and qform are copied bit by bit, so that the affine
            returns exactly even where float32 or an oblique qform would round it.
        allow_nonfinite: Whether NaN and Inf may be written.

    Raises:
        InputError: When the volume cannot be written, or is on another grid than its reference.
    """
    path = Path(path)
    if not path.name.lower().endswith(SUFFIXES):
        advice = f"use one of {', '.join(SUFFIXES)}"
        raise InputError(path, "a NIfTI file name", f"the suffix '{path.suffix}'", advice)
    array = _storable(volume.array)
    if not allow_nonfinite and array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = array.size - int(np.isfinite(array).sum())
        raise InputError(path, "finite voxels to write", f"{bad} NaN or Inf of {array.size}")
    if reference is None:
        header = _new_header(volume)
    else:
        header = _reference_header(volume, Path(reference), str(path))
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    header.set_data_dtype(array.dtype)
    # Without an affine nibabel leaves the forms in the header as they are.
    content = image_class(array, None, header, dtype=array.dtype).to_bytes()
    if path.name.lower().endswith(".gz"):
        # Level 3: float maps hardly shrink further, and the time triples at the default of 9.
        content = gzip.compress(content, 3, mtime=0)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


class _Found(NamedTuple):
    """What a header says, checked."""

    header: Header
    shape: tuple[int, ...]
    affine: Float64[np.ndarray, "4 4"]
    form: str
    forms_agree: bool | None


def pack_steps(
    steps: UInt8[np.ndarray, "x y z"], affine: Float64[np.ndarray, "4 4"], slope: float, intercept: float
) -> bytes:
    """Return a compressed NIfTI-1 file of bytes that stand for intercept + slope * step, the same every time.

    Args:
        steps: Voxels.
        affine: Voxel index to world position, RAS+, in mm.
        slope: Between two steps.
        intercept: Value of step 0.
    """
    image = nib.Nifti1Image(steps, affine)
    image.header.set_slope_inter(slope, intercept)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), 9, mtime=0)


def _require(path: str | Path) -> Path:
    return require_file(path, "a NIfTI file", SUFFIXES, ("nifti", "pair", "gzip"))


def _inspect(path: Path) -> _Found:
    header = _header(path)
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        kind = "RGB" if dtype.fields else "complex" if dtype.kind == "c" else str(dtype)
        raise InputError(path, "voxels of one real number", f"{kind} data", "convert it first")
    shape = tuple(int(n) for n in header.get_data_shape())
    if not shape or min(shape) < 1:
        raise InputError(path, "at least one voxel", f"shape {shape}", "make the file again")
    _check_size(path, header, shape, dtype)
    # A 4D file of one volume, and the unused time axis of a 5D vector file.
    shape = shape[:3] + (1,) * (3 - len(shape)) + tuple(n for n in shape[3:] if n > 1)
    return _Found(header, shape, *_place(path, header, shape))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep nibabel's logger still, whoever listens: a root handler of another library would print what it says."""
    before, imageglobals.logger.disabled = imageglobals.logger.disabled, True
    try:
        yield
    finally:
        imageglobals.logger.disabled = before


def _header(path: Path) -> Header:
    start = _start(path)
    for header_class, size, magic, dim in (
        (nib.Nifti1Header, 348, slice(344, 348), slice(40, 42)),
        (nib.Nifti2Header, 540, slice(4, 12), slice(16, 24)),
    ):
        order: Literal["little", "big"] = "little" if start[:1] != b"\0" else "big"
        if start[:4] != size.to_bytes(4, order):
            continue
        if len(start) < size:
            raise InputError(path, "a whole NIfTI file", "one that ends in its header", "copy again")
        if start[magic][:2] != b"n+":
            advice = "convert Analyze and .hdr/.img pairs first"
            raise InputError(path, "a NIfTI file", "a header of another format", advice)
        # By this number nibabel guesses the order of bytes, which the first four tell already.
        axes = int.from_bytes(start[dim], order, signed=True)
        if not 1 <= axes <= 7:
            raise InputError(path, "1 to 7 axes (dim[0])", axes, "make the file again")
        try:
            # nibabel prints what it mends; a user should see one line or none.
            with _silent():
                stored = header_class(start[:size], endianness="<" if order == "little" else ">", check=False)
                header = header_class(start[:size], stored.endianness)
        except (HeaderDataError, ValueError, OverflowError) as error:
            raise InputError(path, "a valid NIfTI header", error, "make the file again") from error
        offset = float(header["vox_offset"])
        if not (np.isfinite(offset) and offset >= header.single_vox_offset and offset == int(offset)):
            expected = f"voxels from byte {header.single_vox_offset} on or later (vox_offset)"
            raise InputError(path, expected, f"{offset:g}", "repair the header, or make the file again")
        for name in ("sform_code", "qform_code"):
            if int(stored[name]) > 0 and int(header[name]) != int(stored[name]):
                raise InputError(path, f"an {name} from 0 to 5", int(stored[name]), "repair the header")
        # nibabel makes voxel sizes of 0 to 1, which only says the right thing of axes of one voxel.
        lengths = np.asarray(stored["dim"][1:4], np.int64)
        header["pixdim"][1:4] = np.where((lengths > 1) & (stored["pixdim"][1:4] == 0), 0, header["pixdim"][1:4])
        return header
    found = recognise(start)
    name, advice = (found.name, found.advice) if found else ("something that is not an image", "check the path")
    raise InputError(path, "a NIfTI file", name, advice)


def _start(path: Path) -> bytes:
    """Return the first bytes of the volume, unpacked where the name says that it is packed."""
    with path.open("rb") as file:
        start = file.read(START)
    is_named_gzip = path.name.lower().endswith(".gz")
    if start[:2] == b"\x1f\x8b" and not is_named_gzip:
        raise InputError(path, "a NIfTI file", "a gzip file named .nii", f"rename it to {path.name}.gz")
    if start[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path) as file:
                start = file.read(START)
        except (EOFError, OSError, zlib.error) as error:
            raise _damaged(path, error) from error
        if not start:
            raise InputError(path, "a NIfTI file", "a gzip file of nothing", "make it again")
        if (found := recognise(start)) is not None and found.kind != "nifti":
            raise InputError(path, "a NIfTI file", f"{found.name} (packed with gzip)", found.advice)
    elif is_named_gzip:
        found = recognise(start)
        name = found.name if found else "a file that is not gzip"
        advice = f"rename it to {path.name[:-3]}" if found and found.kind == "nifti" else "check the path"
        raise InputError(path, "a NIfTI file packed with gzip", name, advice)
    return start


def _check_size(path: Path, header: Header, shape: tuple[int, ...], dtype: np.dtype) -> None:
    # Python integers: a damaged header may promise more than 64 bits hold.
    wanted = header.get_data_offset() + dtype.itemsize * int(np.prod(np.array(shape, object)))
    size = path.stat().st_size
    is_gzip = path.name.lower().endswith(".gz")
    if wanted > size * (LARGEST_GZIP_RATIO if is_gzip else 1):
        raise InputError(
            path,
            f"{wanted} bytes for shape {shape}",
            f"{size} in a truncated file",
            "copy it again",
        )
    require_room(path, wanted, size if is_gzip else None)


def _place(path: Path, header: Header, shape: tuple[int, ...]) -> tuple[Float64[np.ndarray, "4 4"], str, bool | None]:
    unit = int(header["xyzt_units"]) & 7
    if unit not in MILLIMETRES:
        raise InputError(path, "a spatial unit of m, mm or um", f"the code {unit}")
    scale = np.diag([MILLIMETRES[unit]] * 3 + [1.0])
    sform = header.get_sform() if int(header["sform_code"]) > 0 else None
    qform = None
    if int(header["qform_code"]) > 0:
        try:
            qform = _qform(header)
        except (HeaderDataError, ValueError) as error:
            if sform is None:
                raise InputError(path, "a valid qform", error, "repair the header") from error
    if sform is not None:
        check_affine(np.asarray(sform, np.float64), str(path))
        agree = None
        if qform is not None:
            grids = [Grid((shape[0], shape[1], shape[2]), scale @ form) for form in (sform, qform)]
            agree = is_same_grid(*grids)
        return scale @ np.asarray(sform, np.float64), "sform", agree
    if qform is not None:
        return scale @ np.asarray(qform, np.float64), "qform", None
    spacing = np.abs(header["pixdim"][1:4].astype(np.float64))
    if not (np.isfinite(spacing).all() and spacing.min() > 0):
        advice = "repair the header: it has neither an sform nor a qform"
        raise InputError(path, "voxel sizes above 0 (pixdim)", spacing.tolist(), advice)
    return scale @ np.diag([*spacing, 1.0]), "pixdim", None


def _qform(header: Header) -> Float64[np.ndarray, "4 4"]:
    """Return the affine of the qform; a quaternion that is too long by rounding is shortened, as nifti_clib does."""
    names = ("quatern_b", "quatern_c", "quatern_d")
    numbers = np.array([float(header[name]) for name in (*names, "qoffset_x", "qoffset_y", "qoffset_z")])
    spacing = header["pixdim"][1:4]
    if not (np.isfinite([*numbers, *spacing]).all() and spacing.min() > 0):
        raise ValueError("a quaternion, offsets and voxel sizes of which one is not finite, or a size that is 0")
    squared = float(np.sum(numbers[:3] ** 2))
    if squared > 1 + QUATERNION_TOLERANCE:
        raise ValueError(f"b^2 + c^2 + d^2 = {squared:g} of its quaternion, which is at most 1")
    if squared > 1:
        header = header.copy()
        for name, value in zip(names, numbers[:3] / np.sqrt(squared) * (1 - 1e-7), strict=True):
            header[name] = value
    return np.asarray(header.get_qform(), np.float64)


def _voxels(path: Path, found: _Found, dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    header = found.header
    raw_dtype = header.get_data_dtype()
    count, offset = int(np.prod(found.shape)), header.get_data_offset()
    try:
        if path.name.lower().endswith(".gz"):
            content = _inflate(path, offset + count * raw_dtype.itemsize)
            raw = np.frombuffer(content, raw_dtype, count, offset)
        else:
            raw = np.fromfile(path, raw_dtype, count, offset=offset)
    except (EOFError, OSError, zlib.error) as error:
        raise _damaged(path, error) from error
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise InputError(path, "a finite intensity scaling", error, "repair scl_inter") from error
    slope, intercept = slope or 1.0, intercept or 0.0
    if (slope, intercept) != (1.0, 0.0):
        # Scaled in double precision: float32 would round twice.
        raw = apply_read_scaling(raw, np.float64(slope), np.float64(intercept))
    raw = raw.reshape(found.shape, order="F")
    if dtype.kind in "iu":
        raw = _whole(path, raw, np.iinfo(dtype), abs(slope))
    with np.errstate(over="ignore"):  # beyond float32 becomes Inf, which is counted and refused
        return _row_major(raw, dtype.newbyteorder("="))


def _whole(path: Path, raw: Shaped[np.ndarray, "..."], limits: np.iinfo, step: float) -> Shaped[np.ndarray, "..."]:
    """Return labels; stored with a slope, they come back up to half a step of it, and are rounded."""
    expected = f"whole numbers from {limits.min} to {limits.max} (labels)"
    if raw.dtype.kind == "f":
        if not np.isfinite(raw).all():
            bad = raw.size - int(np.isfinite(raw).sum())
            raise InputError(path, expected, f"{bad} NaN or Inf voxels of {raw.size}", "repair them first")
        whole = np.rint(raw)
        deviation = float(np.abs(raw - whole).max())
        if deviation > min(max(step / 2 if step < 1 else 0.0, ROUNDING), LARGEST_LABEL_STEP):
            found = f"fractions, {deviation:.2g} away from whole numbers"
            raise InputError(path, expected, found, "give labels, not an image or probabilities")
        raw = whole
    if raw.min() < limits.min or raw.max() > limits.max:
        raise InputError(path, expected, f"values in [{raw.min():g}, {raw.max():g}]")
    return raw


def _inflate(path: Path, wanted: int) -> bytearray:
    """Unpack so many bytes, and read on to the end of the file: all sums are checked, and no damaged voxel passes."""
    content = bytearray(wanted)
    with gzip.open(path) as file:
        filled, view = 0, memoryview(content)
        while filled < wanted:
            # In parts, or gzip takes as much memory again.
            count = file.readinto(view[filled : filled + 2**24])
            if not count:
                raise EOFError("the stream ends before the last voxel")
            filled += count
        while count := len(file.read(2**20)):
            filled += count
            if filled > 2 * wanted + SPARE_BYTES:
                found = f"more than {filled} when unpacked"
                raise InputError(path, f"about {wanted} bytes, as the header says", found, "make the file again")
    return content


def _row_major(array: Shaped[np.ndarray, "x y ..."], dtype: np.dtype) -> Shaped[np.ndarray, "x y ..."]:
    """Copy to C order, plane by plane: a plane fits the cache, and 256^3 takes 25 ms instead of 160."""
    result = np.empty(array.shape, dtype)
    for y in range(array.shape[1]):
        result[:, y] = np.asarray(array[:, y].T, dtype, order="C").T
    return result


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(path, "a whole NIfTI file", f"a damaged one ({error})", "copy it again")


def _storable(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind == "c":
        raise InputError("volume.array", "real numbers to write", f"{array.dtype}")
    if array.dtype.newbyteorder("=").str[1:] in WRITABLE:
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _new_header(volume: Volume) -> Header:
    header = nib.Nifti1Header() if max(volume.array.shape) < 2**15 else nib.Nifti2Header()
    header.set_data_shape(volume.array.shape)
    header.set_xyzt_units("mm")
    header.set_zooms(volume.spacing + (1.0,) * (volume.array.ndim - 3))
    header.set_sform(volume.affine, code=1)
    header.set_qform(volume.affine, code=1, strip_shears=True)
    written = Grid(volume.grid.shape, np.asarray(header.get_qform(), np.float64))
    if not is_same_grid(written, volume.grid):
        header["qform_code"] = 0
    return header


def _reference_header(volume: Volume, reference: Path, name: str) -> Header:
    reference = _require(reference)
    found = _inspect(reference)
    x, y, z = found.shape[:3]
    require_same_grid(volume, Grid((x, y, z), found.affine), name, str(reference))
    header = type(found.header)()
    header.set_data_shape(volume.array.shape)
    fields = ["sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"]
    fields += ["quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"]
    for field in fields:
        header[field] = found.header[field]
    # Entry 0 is the handedness of the qform, entry 4 the time step of a series of that length.
    kept = 5 if volume.array.shape[3:] == found.shape[3:] else 4
    header["pixdim"][:kept] = found.header["pixdim"][:kept]
    return header
