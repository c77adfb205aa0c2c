"""From a file to a network's input and back: one record for every system and family of published weights; on the host.

What a `Preprocess` does, in this order: it reads; cuts a fundus photograph to its disc (`crop`); turns the axes
(`axes`); changes the voxel size (`spacing`) or the number of voxels (`fit`); scales the intensities of the whole field
of view (`intensity`; `order` says when); cuts to `size`. Networks of slices, patches or windows stop before the last
step (`load`) and cut by `data.windows`. The record travels with the weights.

Where systems find their place: prostate MRI has three voxel sizes in `spacing`, "zscore" over what is "nonzero", and
`sequences` (T2w, DWI of one b-value, ADC) that `data.sequences` brings onto one grid as channels; brain MRI is "RAS" at
1 mm, "minmax", and `order` "scale-first"; PET is at 1.5 mm from the first voxel on, with a fixed `mean` and `std` and
`order` "cut-then-scale", so that what was added is scaled too. A crop to what is not 0 would be one more word of
`crop`; another rule of resampling or rounding is one more word of `interpolation`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
from jaxtyping import Bool, Float, Float32, Shaped
from PIL import Image

from jaxmed.arrays.bspline import Edge, resize_bspline
from jaxmed.arrays.grid import (
    orientation,
    reorient,
    resample_to,
    resize,
    restore,
    spaced,
    spaced_from_first,
    stretched,
)
from jaxmed.config import Length, Positive, Size, checked
from jaxmed.data.intensity import Intensity, scale, unscale
from jaxmed.data.picture_crop import crop_grid, crop_to_disc
from jaxmed.data.sequences import find_case, read_case, require_sequences
from jaxmed.data.stored import (
    Form,
    Kind,
    Stored,
    as_pixels,
    as_volumes,
    read_prepared,
    read_stored,
    require_volume,
)
from jaxmed.data.windows import cut_window, planes
from jaxmed.errors import InputError
from jaxmed.io.masks import read_mask
from jaxmed.io.scans import ScanFiles, kind_of
from jaxmed.volume import Grid, Volume, require_same_grid

Axes = Literal["RAS", "xyz", "zyx", "zxy", "yzx", "yxz", "xzy"]
SLICED = {"sagittal": 0, "coronal": 1, "axial": 2}
# What each axis of a network that keeps stored axes should run along: D, H, W.
ANATOMY = (("superior-inferior", "SI"), ("anterior-posterior", "AP"), ("left-right", "LR"))
WARMEST_AIR = -200.0  # HU: the lowest value of a chest CT is that of air, about -1000
RANGE_TOLERANCE = 1e-3  # of prepared inputs; float16 files round by less
SPACING_TOLERANCE = 0.1
UNKNOWN_FRAME = "the header states no orientation: whether the axes are as expected cannot be checked"


@dataclasses.dataclass(frozen=True)
@checked
class Preprocess:
    """How a file becomes a network's input. Called with a path, `ScanFiles`, `Volume` or array; hashable, picklable.

    Attributes:
        size: Voxels of an input along each axis: two numbers for slices and pictures, three for volumes and patches.
        channels: Last axis of the input; 3 are the colours of a picture.
        axes: "RAS" turns a volume to right, front and up, and a picture to right and up. Stored axes (x the first of
            the file, z the last) in some order keep what the file has: "zyx" is SimpleITK's array order, slices first
            for axial scans; "xyz" leaves volumes, and rows and columns of a picture, as they are.
        axis: The slices of 2D networks: axial is across z (foot to head), coronal across y, sagittal across x.
        crop: Of pictures, before everything else: "disc" cuts to the square around the disc of a fundus photograph, and
            leaves a picture without a dark rim as it is (`data.picture_crop`).
        spacing: Voxel size in mm, one number or three; of slices within their plane, their distance stays. Empty keeps
            that of the file; pictures and arrays have none and stay as they are.
        fit: How the size is reached: "crop" cuts, or extends, about the centre and keeps the voxel size; "cover" first
            scales until the size is filled; "stretch" resamples the whole field of view, each axis by itself.
        shorter: What the shorter side becomes for "cover", before it is cut; 0 takes the size.
        interpolation: Of "cover" and "stretch": "linear" (`arrays.grid`), "bspline" (`arrays.bspline`, SimpleITK's), or
            "bicubic", Pillow's of pictures, on 8 bits where they hold such. Of `spacing`: "linear" keeps the middle of
            the field of view and blurs where voxels grow; "linear-first" keeps the centre of the first voxel and never
            blurs, as MONAI does.
        edge: What stands beyond the field of view of "bspline": "clamp" repeats the last voxel, "zero" is 0.
        intensity: What becomes of the stored intensities.
        order: Intensities are scaled by statistics of the stored scan ("scale-first"), of the whole field of view at
            the network's voxel size ("scale-then-cut"), or of what is cut and extended ("cut-then-scale").
        padding: Value of added voxels; in the network's unit, but for "cut-then-scale".
        sequences: Of volumes: a word for each channel, by which the file of the sequence is found beside that of the
            others (`data.sequences`); several words for one are parted by "|", and a channel without a word is 0.
            Empty where a file holds all channels.
        missing: What becomes of a case that lacks a sequence: "refuse", or "zero" for its channel.
    """

    size: tuple[Size, ...] = (256, 256)
    channels: Size = 1
    axes: Axes = "RAS"
    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    crop: Literal["none", "disc"] = "none"
    spacing: tuple[Positive, ...] = ()
    fit: Literal["crop", "cover", "stretch"] = "crop"
    shorter: Length = 0
    interpolation: Literal["linear", "linear-first", "bspline", "bicubic"] = "linear"
    edge: Edge = "clamp"
    intensity: Intensity = Intensity()
    order: Literal["scale-first", "scale-then-cut", "cut-then-scale"] = "scale-then-cut"
    padding: float = 0.0
    sequences: tuple[str, ...] = ()
    missing: Literal["refuse", "zero"] = "refuse"

    def __post_init__(self) -> None:
        if len(self.size) not in (2, 3) or min(self.size) < 1:
            raise ValueError(f"size: expected two or three positive numbers, found {self.size}")
        if len(self.spacing) not in (0, 1, 3):
            raise ValueError(f"spacing: expected one number in mm, or three, found {self.spacing}")
        if self.axes not in get_args(Axes):
            raise ValueError(f"axes: expected RAS, or x, y and z in some order, found '{self.axes}'")
        if self.is_sliced and self.axes not in ("RAS", "xyz"):
            raise ValueError(f"axes: expected RAS or xyz for slices and pictures, found '{self.axes}'")
        if self.crop != "none" and not self.is_sliced:
            raise ValueError(f"crop: expected none for volumes of {self.size}, found {self.crop}")
        if self.edge not in get_args(Edge):
            raise ValueError(f"edge: expected clamp or zero, found '{self.edge}'")
        if self.interpolation == "linear-first" and (self.fit != "crop" or not self.spacing):
            raise ValueError(f"interpolation: expected linear to {self.fit} {self.size}, found linear-first")
        if self.interpolation == "bspline" and (self.fit != "stretch" or self.is_sliced):
            raise ValueError(f"interpolation: expected linear or bicubic to {self.fit} {self.size}, found bspline")
        if self.sequences and (self.is_sliced or len(self.sequences) != self.channels or not any(self.sequences)):
            expected = "none for slices and pictures" if self.is_sliced else f"{self.channels} words, as channels"
            raise ValueError(f"sequences: expected {expected}, found {self.sequences}")
        if self.interpolation == "bicubic" and not self.is_sliced:
            raise ValueError(f"interpolation: expected linear or bspline for volumes of {self.size}, found bicubic")

    def __call__(self, image: "Volume | ScanFiles | str | Path | np.ndarray") -> Float32[np.ndarray, "*size channel"]:
        """Return the network's input; of a volume for a 2D network all of its slices.

        Args:
            image: As of `prepare`.

        Raises:
            InputError: As of `prepare`.
        """
        return self.prepare(image).image

    def prepare(self, image: "Volume | ScanFiles | str | Path | np.ndarray") -> "Prepared":
        """Return the network's input with its place in the world, and what is unexpected about the file.

        Args:
            image: A volume; its NIfTI file, or DICOM folder or multi-frame file; a picture; an array of as many axes
                as the size has, in the order of a file, channels last. A .npy file, or a .npz file with the array
                "volume", holds for a 3D network what was prepared before: axes as the network's and values in its
                range. It is only brought to size.

        Raises:
            InputError: It cannot be read, has other axes, or holds NaN, Inf or one single value.
        """
        if isinstance(image, str | Path):
            image = ScanFiles(Path(image))
        if isinstance(image, ScanFiles) and not self.is_sliced and kind_of(image.path) == "array":
            return Prepared(self._bring_to_size(image.path), None, ())
        loaded = load(image, self)
        notes = [*loaded.notes]
        if loaded.kind == "volume" and self.axes != "RAS":
            is_known = loaded.stored.knows_frame
            notes += self.check_axes(orientation(loaded.grid.affine)) if is_known else [UNKNOWN_FRAME]
        if self.intensity.kind == "window" and loaded.extent[0] >= WARMEST_AIR > self.intensity.window[0]:
            notes.append(_not_hounsfield(*loaded.extent))
        grid = None if loaded.kind == "stack" else loaded.grid
        return Prepared(self._cut(loaded), grid, tuple(notes), loaded.cropped)

    def inverse(self, values: Float[np.ndarray, "..."], grid: Grid, cropped: Grid | None = None) -> Volume:
        """Put a map on the network's grid (attribution, reconstruction) back onto the grid of the scan, linearly.

        Args:
            values: On the whole grid `size`, in any unit; of a 2D network one for each slice, or that of a picture.
            grid: Of the scan that the input was made from; of a picture, whose plane has one voxel across, its pixels'.
            cropped: Of the square that it was cut to, where it was (`Prepared.cropped`).

        Returns:
            Float32 values on the stored axes of the scan, with its affine; 0 where the input did not reach.

        Raises:
            InputError: The map has another size.
        """
        target = self.input_grid(cropped or grid)
        shape = tuple(planes(np.empty(target.shape), self.slice_axis).shape) if self.is_sliced else self.size
        if values.shape == self.size and shape == (1, *self.size):
            values = values[None]
        if values.shape != shape:
            advice = "bring token maps to the size of the input first"
            raise InputError("cube", f"a map of shape {shape}", f"{values.shape}", advice)
        if self.is_sliced:
            values = np.moveaxis(values, 0, cast(int, self.slice_axis))
        back, affine = np.asarray(values, np.float32), target.affine
        if self.axes != "RAS":
            undo = np.argsort(self._permutation)
            back, affine = np.transpose(back, undo), affine[:, [*undo, 3]]
        if self.fit == "stretch":
            fill = None if cropped is None else 0.0
            return resample_to(Volume.make(back, affine), grid, order=1, antialias=False, fill=fill)
        return restore(Volume.make(back, affine), grid, order=1)

    def input_grid(self, grid: Grid) -> Grid:
        """Return where the voxels of the input stand in the world of a scan; of a 2D network those of its slices.

        Args:
            grid: Of the scan, in stored axes.
        """
        # Voxels that take no memory: the grid counts alone.
        turned = self.turn(Volume.make(np.broadcast_to(np.int8(0), grid.shape), grid.affine)).grid
        if self.spacing:
            turned = self._spaced(turned)
        if self.fit == "stretch" and self.interpolation == "bspline":
            affine = turned.affine.copy()
            affine[:3, :3] *= np.divide(turned.shape, self.size)
            return Grid(cast(tuple[int, int, int], self.size), affine)
        if self.fit != "crop":
            turned = stretched(turned, self._filled(turned.shape, self.slice_axis))
        size, starts = list(turned.shape), [0, 0, 0]
        inner = [axis for axis in range(3) if axis != self.slice_axis]
        for axis, count, start in zip(inner, self.size, self.starts([size[a] for a in inner]), strict=True):
            size[axis], starts[axis] = count, start
        affine = turned.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ np.array(starts, np.float64)
        return Grid((size[0], size[1], size[2]), affine)

    def turn(self, volume: Volume) -> Volume:
        """Give a volume the axes of the network; nothing is interpolated."""
        if self.axes == "RAS":
            return reorient(volume)
        order = self._permutation
        array = np.transpose(volume.array, [*order, *range(3, volume.array.ndim)])
        return Volume.make(array, volume.affine[:, [*order, 3]])

    def lay_out(self, volume: Volume, kind: Kind, axis: int | None, *, order: Literal[0, 1] = 1) -> Volume:
        """Bring a volume to the network's voxel size, or number of voxels.

        Args:
            volume: Turned.
            kind: What was read: only volumes have a voxel size.
            axis: Across the slices; None where the volume is one image.
            order: 0 for labels, 1 for intensities.
        """
        if self.spacing and kind == "volume":
            blurs = order > 0 and self.interpolation != "linear-first"
            volume = resample_to(volume, self._spaced(volume.grid), order=order, antialias=blurs, fill=None)
        return volume if self.fit == "crop" else self._stretch(volume, axis)

    def check_axes(self, codes: str) -> list[str]:
        """Warn when D, H, W do not run superior-inferior, anterior-posterior, left-right: a cube hides such errors.

        Args:
            codes: Where the stored axes point, such as "RAS".
        """
        if self.axes == "RAS":
            return []
        best = "".join("xyz"[axis] for _, pair in ANATOMY for axis in range(3) if codes[axis] in pair)
        warnings = []
        for axis, (stored, (name, letters)) in enumerate(zip(self._permutation, ANATOMY, strict=True)):
            if codes[stored] not in letters:
                found = next(other for other, pair in ANATOMY if codes[stored] in pair)
                warnings.append(
                    f"axis {'DHW'[axis]} of the cube runs {found} (stored axis {'xyz'[stored]} of {codes}), "
                    f"expected {name}; use axes='{best}' unless the weights were trained this way"
                )
        return warnings

    def check_spacing(self, volume: Volume) -> list[str]:
        """Tell when the voxels of a scan differ from the network's by more than a tenth along an axis."""
        if not self.spacing:
            return []
        own = self.turn(Volume.make(np.broadcast_to(np.int8(0), volume.grid.shape), volume.affine))
        wanted = self._spacing(own.affine)
        if np.allclose(own.spacing, wanted, rtol=SPACING_TOLERANCE, atol=0):
            return []
        sizes = [" x ".join(f"{length:.3g}" for length in one) for one in (own.spacing, wanted)]
        return [f"voxels of {sizes[0]} mm were interpolated to {sizes[1]} mm"]

    @property
    def is_sliced(self) -> bool:
        """Whether inputs are slices or pictures."""
        return len(self.size) == 2

    @property
    def volume_size(self) -> tuple[int, int, int]:
        """Voxels of an input that is a volume."""
        x, y, z = self.size
        return x, y, z

    @property
    def slice_axis(self) -> int | None:
        """Axis across the slices of a volume; None where an input is a volume."""
        return SLICED[self.axis] if self.is_sliced else None

    @property
    def form(self) -> Form:
        """What files have to hold."""
        return Form(self.size, self.channels, self.axes == "RAS")

    @property
    def channel_names(self) -> tuple[str, ...]:
        """A name for each channel: its first word, or its number."""
        words = self.sequences or ("",) * self.channels
        return tuple(word.partition("|")[0] or f"channel{number}" for number, word in enumerate(words))

    @property
    def told_spacing(self) -> str:
        """The voxel size in words."""
        return " x ".join(f"{length:g}" for length in self.spacing) + " mm" if self.spacing else "the files' voxel size"

    @property
    def _permutation(self) -> list[int]:
        """Return the stored axis of each of the network's."""
        return ["xyz".index(letter) for letter in self.axes]

    def _spacing(self, affine: Float[np.ndarray, "4 4"]) -> tuple[float, float, float]:
        stored = np.linalg.norm(affine[:3, :3], axis=0).tolist()
        wanted = self.spacing * (3 // len(self.spacing))
        x, y, z = (own if axis == self.slice_axis else wanted[axis] for axis, own in enumerate(stored))
        return x, y, z

    def _spaced(self, grid: Grid) -> Grid:
        """Return the grid of the network's voxel size."""
        place = spaced_from_first if self.interpolation == "linear-first" else spaced
        return place(grid, self._spacing(grid.affine))

    def _filled(self, shape: tuple[int, ...], axis: int | None) -> tuple[int, int, int]:
        """Return the number of voxels at which the size is filled, those across the slices as they are."""
        inner = [n for index, n in enumerate(shape[:3]) if index != axis]
        if self.fit == "stretch":
            wanted = list(self.size)
        elif self.shorter:
            # torchvision's: the longer side is cut to a whole number.
            wanted = [int(self.shorter * n / min(inner)) for n in inner]
        else:
            scale_by = max(new / old for new, old in zip(self.size, inner, strict=True))
            wanted = [max(1, round(n * scale_by)) for n in inner]
        if axis is not None:
            wanted.insert(axis, shape[axis])
        return wanted[0], wanted[1], wanted[2]

    def starts(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Return the first voxel of the cut about the centre of an image of some lengths, along each axis."""
        if self.interpolation == "bicubic":  # torchvision's rule
            return tuple(round((old - new) / 2) for old, new in zip(lengths, self.size, strict=True))
        if self.interpolation == "linear-first":  # MONAI's: of an odd number of added voxels the larger part comes last
            return tuple((old - new + 1) // 2 if new > old else old // 2 - new // 2
                         for old, new in zip(lengths, self.size, strict=True))  # fmt: skip
        return tuple(old // 2 - new // 2 for old, new in zip(lengths, self.size, strict=True))

    def _cut(self, loaded: "Loaded") -> Float32[np.ndarray, "*size channel"]:
        images = planes(loaded.volume.array, loaded.axis)
        lengths = [*images.shape[1 : 1 + len(self.size)]]
        array = images
        if lengths != [*self.size]:
            starts = self.starts(lengths)
            array = np.stack([cut_window(image, starts, self.size, self.padding) for image in images])
        if array.ndim == 1 + len(self.size):
            array = array[..., None]
        if self.order == "cut-then-scale":
            array = scale(array if self.is_sliced else array[0], self.intensity, loaded.path).array.reshape(array.shape)
        if array.shape[array.ndim - 1] != self.channels:
            expected = f"{len(self.size)} axes of space and {self.channels} channel(s)"
            raise InputError(loaded.path, expected, f"shape {loaded.volume.array.shape}")
        array = np.ascontiguousarray(array, np.float32)
        return array if self.is_sliced and loaded.kind == "volume" else array[0]

    def _bring_to_size(self, path: Path) -> Float32[np.ndarray, "x y z 1"]:
        cube = read_prepared(path)
        require_volume(path, cube)
        (low, high), (bottom, top) = (float(cube.min()), float(cube.max())), self.intensity.range
        if low < bottom - RANGE_TOLERANCE or high > top + RANGE_TOLERANCE:
            advice = "give scans in HU as NIfTI or DICOM, which are normalised here"
            raise InputError(path, f"values normalised to [{bottom:g}, {top:g}]", f"[{low:g}, {high:g}]", advice)
        cube = self._stretch(Volume.make(cube, np.eye(4)), None).array
        return np.clip(cube, bottom, top)[..., None]

    def _stretch(self, volume: Volume, axis: int | None) -> Volume:
        shape = self._filled(volume.array.shape, axis)
        match self.interpolation:
            case "linear" | "linear-first":
                return resize(volume, shape, order=1)
            case "bspline":
                affine = volume.affine.copy()
                affine[:3, :3] *= np.divide(volume.grid.shape, shape)
                return Volume.make(resize_bspline(volume.array, shape, self.edge), affine)
            case "bicubic":
                inner = [n for index, n in enumerate(shape) if index != axis]
                images = [resize_bicubic(image, (inner[0], inner[1])) for image in planes(volume.array, axis)]
                return Volume.make(np.stack(images, cast(int, axis)), stretched(volume.grid, shape).affine)


@dataclasses.dataclass(frozen=True)
class FileAxes:
    """What may differ from the preprocessing that travels with weights: how the files at hand are stored.

    Attributes:
        axes: Stored axes of the files (x the first, z the last) that become D, H, W of the model: slices, rows from the
            front to the back of the patient, columns. "weights" takes the order stored with the weights.
        edge: What stands beyond the field of view where an axis grows to twice its size or more: "clamp" repeats the
            last voxel, "zero" is 0 HU, as in the original; "weights" as above.
    """

    axes: Literal["weights", "zyx", "xyz", "zxy", "yzx", "yxz", "xzy"] = "weights"
    edge: Literal["weights", "clamp", "zero"] = "weights"

    def apply(self, preprocess: Preprocess) -> Preprocess:
        """Return the preprocessing of the weights with what is set here."""
        found: dict[str, Any] = {"axes": self.axes, "edge": self.edge}
        return dataclasses.replace(preprocess, **{name: value for name, value in found.items() if value != "weights"})


class Prepared(NamedTuple):
    """A scan, ready for a network.

    Attributes:
        image: The network's input, channels last.
        grid: Where the scan's voxels, or the pixels of a picture, stand; None for stacks, and what was prepared before.
        notes: What is unexpected about it.
        cropped: Where the square stands that a picture was cut to; None where it was not.
    """

    image: Float32[np.ndarray, "*size channel"]
    grid: Grid | None
    notes: tuple[str, ...]
    cropped: Grid | None = None


class Loaded(NamedTuple):
    """What a file holds, turned and scaled and not yet cut.

    Attributes:
        volumes: In the network's unit, axes and voxel size; more than one for a stack of volumes. A picture is one
            plane thick, and a stack of pictures has the items along its last axis of space.
        axis: Across the slices; None where each volume is one image.
        stored: What was read.
        intensity: How it was scaled.
        low: Stored intensity that became the lower end of the range.
        high: Stored intensity that became the upper end.
        extent: Least and largest stored intensity.
        cropped: Where the square stands that a picture was cut to; None where it was not.
    """

    volumes: tuple[Volume, ...]
    axis: int | None
    stored: Stored
    intensity: Intensity
    low: float
    high: float
    extent: tuple[float, float]
    cropped: Grid | None = None

    @property
    def volume(self) -> Volume:
        """The only volume, or the first one."""
        return self.volumes[0]

    @property
    def grid(self) -> Grid:
        """Of the file."""
        return self.stored.volumes[0].grid

    @property
    def kind(self) -> Kind:
        """A volume with its place in the world, a picture, a stack of pictures, or volumes without a place."""
        return self.stored.kind

    @property
    def path(self) -> Path:
        """The file."""
        return self.stored.path

    @property
    def notes(self) -> tuple[str, ...]:
        """What is unexpected about the file."""
        return self.stored.notes

    @property
    def images(self) -> list[Shaped[np.ndarray, "..."]]:
        """Every slice or picture, or the volumes."""
        return images_of(self.volumes, self.axis)

    def restore(self, array: Shaped[np.ndarray, "x y z"]) -> Volume:
        """Bring a result on the grid of `volume` back onto the grid of the file; the unit stays."""
        return restore(Volume.make(array, self.volume.affine), self.grid, order=1)

    def restore_stored(self, array: Shaped[np.ndarray, "x y z"], *, is_difference: bool = False) -> Volume:
        """Bring intensities on the grid of `volume` back onto the grid, and into the unit, of the file.

        Args:
            array: In the network's unit.
            is_difference: Whether they are distances between intensities, whose 0 stays 0.
        """
        # Beyond the field of view of the image stands the background: the shift comes last.
        restored = self.restore(unscale(array, self.intensity, self.low, self.high, is_difference=True))
        shift = float(unscale(np.zeros(1), self.intensity, self.low, self.high)[0])
        if is_difference or not shift:
            return restored
        return Volume.make(restored.array + np.float32(shift), restored.affine)

    def as_stored(self, volume: Volume) -> Shaped[np.ndarray, "..."]:
        """Return a restored volume as the file holds it: row, column for pictures, items first in arrays."""
        if self.kind in ("volume", "array"):
            return volume.array if self.kind == "volume" else volume.array[None]
        return as_pixels(volume) if self.kind == "stack" else as_pixels(volume)[0]


def images_of(volumes: Sequence[Volume], axis: int | None) -> list[Shaped[np.ndarray, "..."]]:
    """Return every slice of a volume across an axis, or the volumes."""
    return [volume.array for volume in volumes] if axis is None else [*planes(volumes[0].array, axis)]


def differences(one: Preprocess, other: Preprocess) -> dict[str, tuple[Any, Any]]:
    """Return both values of every field, those of the intensities included, in which two differ."""
    pairs = [(one, other), (one.intensity, other.intensity)]
    values = {f.name: (getattr(a, f.name), getattr(b, f.name)) for a, b in pairs for f in dataclasses.fields(a)}
    return {name: (a, b) for name, (a, b) in values.items() if a != b and name != "intensity"}


def load(
    image: Volume | ScanFiles | Path | np.ndarray,
    preprocess: Preprocess,
    fill: float | None = None,
    *,
    allow_stack: bool = False,
) -> Loaded:
    """Read a scan, turn and scale it; cutting is left to `data.windows`.

    Args:
        image: As of `Preprocess.prepare`.
        preprocess: Axes, voxel size and intensities.
        fill: Value of voxels that have none; None refuses them.
        allow_stack: Whether the first axis of a .npy file may be the item: pictures, or volumes for a 3D network.

    Raises:
        InputError: For whatever is wrong with the file: damaged, not finite, constant, of another number of axes or
            channels, of another range.
    """
    if not isinstance(image, Volume | np.ndarray):
        scan = image if isinstance(image, ScanFiles) else ScanFiles(image)
        image = scan._replace(fill=scan.fill if fill is None else fill)
    stored, cropped = _read(image, preprocess, allow_stack), None
    extent = float(stored.volumes[0].array.min()), float(stored.volumes[0].array.max())
    volumes = stored.volumes
    if preprocess.crop == "disc" and stored.kind != "volume":
        if stored.kind == "stack":
            found = f"a stack of {stored.volumes[0].array.shape[2]}"
            raise InputError(stored.path, "pictures one by one, to cut each to its disc", found, "split the file")
        square, notes = crop_to_disc(stored.volumes[0], stored.path)
        volumes, cropped = (square,), None if square is stored.volumes[0] else square.grid
        stored = stored._replace(notes=(*stored.notes, *notes))
    axis = (preprocess.slice_axis if stored.kind == "volume" else 2) if preprocess.is_sliced else None
    intensity, moved = preprocess.intensity, []
    low, high = intensity.range
    for number, volume in enumerate(volumes):
        where = f"{stored.path} item {number}" if len(stored.volumes) > 1 else str(stored.path)
        if preprocess.order == "scale-first":
            volume = Volume.make(scale(volume.array, intensity, where).array, volume.affine)
        volume = preprocess.lay_out(preprocess.turn(volume), stored.kind, axis)
        if preprocess.order == "scale-then-cut":
            array, low, high = _scaled(volume.array, intensity, where, stored.kind)
            volume = Volume.make(array, volume.affine)
        moved.append(volume)
    return Loaded(tuple(moved), axis, stored, intensity, low, high, extent, cropped)


def _read(image: Volume | ScanFiles | np.ndarray, preprocess: Preprocess, allow_stack: bool) -> Stored:
    if not (preprocess.sequences and isinstance(image, ScanFiles)):
        return read_stored(image, preprocess.form._replace(allow_stack=allow_stack))
    case = find_case(image, preprocess.sequences)
    if preprocess.missing == "refuse":
        require_sequences(case, preprocess.sequences)
    stored = read_case(case, preprocess.sequences)
    return stored._replace(notes=(*stored.notes, *preprocess.check_spacing(stored.volumes[0])))


def load_mask(path: Path, loaded: Loaded, preprocess: Preprocess, value: int | None = None) -> tuple[Volume, ...]:
    """Read the mask of a file, on the grid of `loaded.volumes`.

    Args:
        path: Of the mask: on the grid of the image, or a picture or .npy file of its shape.
        loaded: The image.
        preprocess: As it was loaded.
        value: Which label counts; None takes the larger of two values (`io.masks`), or all labels of a NIfTI map.

    Raises:
        InputError: For whatever is wrong with the file, or its grid is another.
    """
    found, grid = read_mask(path, value=value, allow_labels=True)
    if grid is None:
        form = preprocess.form._replace(channels=1, allow_stack=True)
        stored, kind = as_volumes(found.astype(np.float32), path, form)
    else:
        stored, kind = (Volume.make(found.astype(np.float32), grid.affine),), "volume"
    if kind != loaded.kind or len(stored) != len(loaded.volumes):
        other = f"{len(stored)} of kind {kind}"
        advice = "give NIfTI" if loaded.kind == "volume" else ""
        raise InputError(path, f"{len(loaded.volumes)} of kind {loaded.kind}, as {loaded.path}", other, advice)
    masks = []
    for volume in stored:
        require_same_grid(volume.grid, loaded.grid, str(path), str(loaded.path))
        volume = volume if loaded.cropped is None else crop_grid(volume, loaded.cropped)
        moved = preprocess.lay_out(preprocess.turn(volume), kind, loaded.axis)
        masks.append(Volume.make(moved.array >= 0.5, moved.affine))
    return tuple(masks)


def load_head(path: Path, loaded: Loaded, preprocess: Preprocess) -> Bool[np.ndarray, "x y z"]:
    """Read the mask of a scan, or a label map of its brain, onto the grid of `loaded.volume`.

    Raises:
        InputError: As of `load_mask`, or nothing is inside.
    """
    inside = load_mask(path, loaded, preprocess)[0].array
    if not inside.any():
        raise InputError(path, "a mask with voxels", "none", "check the mask")
    return inside


def resize_bicubic(
    image: Shaped[np.ndarray, "x y *channel"], shape: tuple[int, int]
) -> Float32[np.ndarray, "x2 y2 *channel"]:
    """Resize a picture as Pillow does; one of 8 bits in 8 bits, which rounds, and cuts overshoot off."""
    levels = np.rint(image * 255)
    is_bytes = np.abs(image * 255 - levels).max() < 1e-3 and levels.min() >= 0 and levels.max() <= 255
    pixels = levels.astype(np.uint8) if is_bytes else image.astype(np.float32)
    channels = [pixels] if image.ndim == 2 else [*np.moveaxis(pixels, 2, 0)]
    rows, columns = shape
    resized = [np.asarray(Image.fromarray(one).resize((columns, rows), Image.Resampling.BICUBIC)) for one in channels]
    array = (resized[0] if image.ndim == 2 else np.stack(resized, -1)).astype(np.float32)
    return array / np.float32(255) if is_bytes else array


def _scaled(
    array: Shaped[np.ndarray, "..."], intensity: Intensity, where: str, kind: Kind
) -> tuple[Float32[np.ndarray, "..."], float, float]:
    """Scale a volume at once, and the pictures of a stack one by one."""
    if kind != "stack":
        return scale(array, intensity, where)
    parts = np.split(array, np.size(array, 2), axis=2)
    items = [scale(part, intensity, f"{where} item {item}") for item, part in enumerate(parts)]
    return np.concatenate([item.array for item in items], axis=2), items[0].low, items[0].high


def _not_hounsfield(lowest: float, highest: float) -> str:
    return (
        f"values from {lowest:g} to {highest:g} do not look like CT in HU, where air is about -1000; "
        "apply the rescale slope and intercept first, and give no masks or other modalities"
    )
