"""Records: in which order they come, with which random numbers, and from which files.

The order is a pure function: the stream of all epochs is one infinite list, and `record_at` names the record at any
position of it. So nothing has to be saved to resume, and the list does not depend on workers or processes.

A source is anything with `len(source)`, `source[index]` (a dict of fields, read when asked) and `source.name(index)`
(for messages). Its repr tells the settings and the files, and is equal for equal data on another run.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from jaxmed.errors import InputError, reason_of
from jaxmed.io import nifti
from jaxmed.io.images import read_image
from jaxmed.volume import Volume

# Ends of the seed sequences, so that the order of an epoch and the seeds of its records never meet.
ORDER, RECORD = 0, 1


class Position(NamedTuple):
    """A place in the stream of all epochs.

    Attributes:
        epoch: From 0.
        index: Place within the epoch.
        record: Number of the record in its source.
    """

    epoch: int
    index: int
    record: int


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_records: int, shuffle: bool = True) -> Int[np.ndarray, " record"]:
    """Return the order of one epoch: a permutation, or 0, 1, 2, ... without shuffling.

    The array is read-only and kept for the last few epochs, since every record asks for it.
    """
    if shuffle:
        order = _generator(seed, ORDER, epoch).permutation(num_records)
    else:
        order = np.arange(num_records)
    order.flags.writeable = False
    return order


def record_at(
    seed: int, position: int, num_records: int, *, shuffle: bool = True, epoch_length: int | None = None
) -> Position:
    """Return which record stands at a position of the infinite stream.

    Args:
        seed: Seed of the order.
        position: From 0.
        num_records: Records of the source.
        shuffle: Whether each epoch has an order of its own.
        epoch_length: Records of an epoch that are used, from the front of its order; all by default.
    """
    epoch, index = divmod(position, epoch_length or num_records)
    return Position(epoch, index, int(epoch_order(seed, epoch, num_records, shuffle)[index]))


def record_seed(seed: int, epoch: int, record: int) -> np.random.Generator:
    """Return the random numbers of one record in one epoch: the same on every worker and process."""
    return _generator(seed, RECORD, epoch, record)


def _generator(seed: int, *place: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=place)))


@runtime_checkable
class Source(Protocol):
    """Records by number."""

    def __len__(self) -> int:
        """Return the number of records."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a record's fields."""
        ...

    def name(self, index: int) -> str:
        """Return the file of a record, for messages."""
        ...


def read_file(path: Path) -> Volume | Shaped[np.ndarray, "..."]:
    """Read a NIfTI file as a volume, and any other image as an array.

    Raises:
        InputError: For whatever is wrong with the file.
    """
    if path.name.lower().endswith(nifti.SUFFIXES):
        return nifti.read(path)
    return read_image(path)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class FileSource:
    """Records whose fields are files, beside plain values.

    Attributes:
        files: Per field one file per record.
        values: Per field one array with the records along its first axis.
        readers: How a field is read, where not by `read_file`.
    """

    files: Mapping[str, tuple[Path, ...]]
    values: Mapping[str, Shaped[np.ndarray, "record ..."]] = dataclasses.field(default_factory=dict)
    readers: Mapping[str, Callable[[Path], Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _same_length({**self.files, **self.values})

    def __len__(self) -> int:
        """Return the number of records."""
        return len(next(iter(self.files.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a record."""
        fields = {name: self.readers.get(name, read_file)(paths[index]) for name, paths in self.files.items()}
        return {**fields, **{name: column[index] for name, column in self.values.items()}}

    def name(self, index: int) -> str:
        """Return the record's first file."""
        return str(next(iter(self.files.values()))[index])

    def __repr__(self) -> str:
        """Return the fields and a digest of the paths and values."""
        digest = hashlib.sha256()
        for paths in self.files.values():
            digest.update("\0".join(map(str, paths)).encode(errors="backslashreplace"))
        for column in self.values.values():
            digest.update(np.ascontiguousarray(column).tobytes())
        names = ", ".join((*self.files, *self.values))
        return f"FileSource({names}; {len(self)} records, {digest.hexdigest()[:16]})"


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ArraySource:
    """Records that are rows of arrays, in memory or memory-mapped (`numpy.load(path, mmap_mode="r")`).

    Attributes:
        arrays: Per field one array with the records along its first axis.
        label: What to call them in messages.
    """

    arrays: Mapping[str, Shaped[np.ndarray, "record ..."]]
    label: str = "array"

    def __post_init__(self) -> None:
        _same_length(self.arrays)

    def __len__(self) -> int:
        """Return the number of records."""
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a record; rows of memory-mapped arrays stay on disk until they are used."""
        return {name: array[index] for name, array in self.arrays.items()}

    def name(self, index: int) -> str:
        """Return the row."""
        return f"{self.label} row {index}"

    def __repr__(self) -> str:
        """Return fields, shapes and types."""
        fields = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in self.arrays.items())
        return f"ArraySource({self.label}: {fields})"


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class SubsetSource:
    """Some records of a source, such as those of a split; their numbers count from 0 again.

    Attributes:
        source: The whole.
        indices: Which of its records, in order.
    """

    source: Source
    indices: Int[np.ndarray, " record"]

    def __post_init__(self) -> None:
        if not len(self.indices):
            raise InputError("subset", "at least one record", "none")
        if min(self.indices) < 0 or max(self.indices) >= len(self.source):
            raise InputError("subset", f"records from 0 to {len(self.source) - 1}", f"up to {max(self.indices)}")

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a record."""
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str:
        """Return the record's file."""
        return self.source.name(int(self.indices[index]))

    def __repr__(self) -> str:
        """Return the whole's repr and a digest of the rows."""
        digest = hashlib.sha256(np.asarray(self.indices, "<i8").tobytes()).hexdigest()[:16]
        return f"SubsetSource({self.source!r}; {len(self)} records, {digest})"


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class LabelledSource:
    """Records of images with their targets.

    Attributes:
        images: Records with the field "image".
        targets: One row per record.
        importance: Factor of each record's loss in training; None for ones.
    """

    images: Source
    targets: Shaped[np.ndarray, "record column"]
    importance: Shaped[np.ndarray, " record"] | None = None

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a record."""
        own = {} if self.importance is None else {"importance": self.importance[index]}
        return {**self.images[index], "target": self.targets[index], **own}

    def name(self, index: int) -> str:
        """Return the record's file."""
        return self.images.name(index)

    def __repr__(self) -> str:
        """Return the images' own."""
        return f"LabelledSource({self.images!r})"


class ForgivingSource:
    """Records of which some may be broken: these become blank images, and `reasons` says why."""

    def __init__(self, source: Source, shape: tuple[int, ...]) -> None:
        """Wrap a source.

        Args:
            source: Records with the field "image".
            shape: Shape of a blank image.
        """
        self.source, self.shape = source, shape
        self.reasons: dict[int, str] = {}

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a record, or put a blank one in its place."""
        try:
            return self.source[index]
        except (InputError, OSError, MemoryError) as error:
            self.reasons[index] = reason_of(error, self.name(index))
        return {"image": np.zeros(self.shape, np.float32)}

    def name(self, index: int) -> str:
        """Return the record's file."""
        return self.source.name(index)


def _same_length(columns: Mapping[str, Sequence[Any] | Shaped[np.ndarray, "record ..."]]) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if not lengths or 0 in lengths.values():
        raise InputError("source", "at least one record", lengths or "no field")
    if len(set(lengths.values())) > 1:
        raise InputError("source", "as many records in every field", lengths)
