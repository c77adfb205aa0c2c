"""Read volumes into batches: rows `loader_nifti`, `loader_packed`, `loader_files` and `loader_store`, peer: zlib alone.

A call reads a number of CT-like volumes (int16, smooth anatomy with 15 HU of noise) through `evaluation_batches`, which
shares all but the order with training, windows them to [0, 1] in float32 and stacks them into batches of two, with one
reading thread per pinned core and a fresh stream each time. `loader_nifti` reads .nii.gz files, `loader_packed` the
same volumes after `jaxmed.data.pack` (int16); its `compile_s` is the packing. The peer inflates the bytes of the same
.nii.gz files on as many threads and does nothing else: no loader of .nii.gz that uses zlib can be faster, and a packed
one should be. Files come from the page cache in all cases. The accuracy column holds volumes per second, and for ours
the largest difference from the volumes that were written.

`loader_files` and `loader_store` are what a host of a pod does: the shuffled training stream of prepared inputs, from
the same files through a `Preprocess`, against from a store of `jaxmed data pack` (float16, whose largest difference is
half a step of it; `compile_s` is the packing). What a host has to reach is the batch of a step over its time.
"""

import functools
import statistics
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
from timing import Measurement, alternate, emit, first_call, make_rows, measure_peak, parse_config, prepare

from jaxmed.data.inputs import PreparedField, input_source
from jaxmed.data.intensity import Intensity, to_range
from jaxmed.data.loader import LoaderConfig, Transform, evaluation_batches, make_loader
from jaxmed.data.pack import PackConfig, pack
from jaxmed.data.preprocess import Preprocess
from jaxmed.data.records import FileSource, Source
from jaxmed.data.scans import Record
from jaxmed.data.store import StoreSettings, pack_store
from jaxmed.io import nifti
from jaxmed.io.scans import ScanFiles
from jaxmed.volume import Volume

# Edge of the volumes, and how many a call reads. The accelerators' hosts read the same files.
SIZES = {"smoke": (64, 8), "cpu": (256, 8), "gpu": (256, 32), "pod": (256, 32)}
BATCH = 2
WINDOW = (-1000.0, 400.0)


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    edge, count = SIZES[config.size]
    threads = len(conditions.cores)
    peak = measure_peak()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arrays, files = write_volumes(folder, edge, count)
        compressed = sum(path.stat().st_size for path in files)
        source = FileSource({"image": files})
        packing_s = first_call(
            functools.partial(pack, source, folder / "pack", config=PackConfig(dtype="int16", threads=threads))
        )
        sources: dict[str, Source] = {
            "loader_nifti": source,
            "loader_packed": pack(source, folder / "pack", config=PackConfig(dtype="int16", threads=threads)),
        }
        preprocess = Preprocess((edge,) * 3, axes="xyz", intensity=Intensity("window", window=WINDOW))
        scans = [ScanFiles(path) for path in files]
        store_s = first_call(functools.partial(write_store, folder / "store", scans, preprocess, threads))
        stored = write_store(folder / "store", scans, preprocess, threads)
        prepared: dict[str, Source] = {"loader_files": input_source(scans, preprocess), "loader_store": stored}
        functions: dict[str, Any] = {row: functools.partial(read_all, own, threads) for row, own in sources.items()}
        functions |= {
            row: functools.partial(read_shuffled, own, preprocess, count, threads) for row, own in prepared.items()
        }
        if config.peer:
            functions["zlib"] = functools.partial(inflate_all, files, threads)
        seconds = alternate(functions, config.repeats)
        differences = {row: largest_difference(own, arrays, threads) for row, own in sources.items()}
        differences |= {row: largest_difference(own, arrays, threads, PreparedField(preprocess))
                        for row, own in prepared.items()}  # fmt: skip

    peers = {}
    if config.peer:
        rate = {"volumes_per_s": count / statistics.median(seconds["zlib"])}
        peers["zlib"] = Measurement(seconds["zlib"], accuracy=rate, versions={"zlib": zlib.ZLIB_RUNTIME_VERSION})
    raw = 2 * count * edge**3
    rows = []
    packing = {"loader_nifti": None, "loader_packed": packing_s, "loader_files": None, "loader_store": store_s}
    for row, once in packing.items():
        ours = Measurement(
            seconds[row],
            compile_s=once,
            # What must move at least once: stored voxels in, float32 batches out.
            bytes=(compressed if row in ("loader_nifti", "loader_files") else raw) + 2 * raw,
            accuracy={
                "volumes_per_s": count / statistics.median(seconds[row]),
                "largest_difference": differences[row],
            },
        )
        workload = f"{count} volumes of {edge}^3 int16, gzip to {compressed / raw:.0%}, {threads} threads"
        rows += make_rows(row, workload, {"jaxmed": ours, **peers}, conditions, peak)
    emit(rows, config.json)


def write_volumes(folder: Path, edge: int, count: int) -> tuple[list[np.ndarray], tuple[Path, ...]]:
    """Write volumes that compress as CT does: air outside, smooth tissue, noise everywhere."""
    generator = np.random.default_rng(0)
    place = np.linspace(-1, 1, edge)
    radius = np.sqrt(place[:, None, None] ** 2 + place[None, :, None] ** 2 + place[None, None, :] ** 2)
    arrays, files = [], []
    for number in range(count):
        coarse = scipy.ndimage.gaussian_filter(generator.normal(0, 1, (edge // 4,) * 3), 2)
        smooth = scipy.ndimage.zoom(400 * coarse / coarse.std(), 4, order=1)
        hu = np.where(radius < 0.9, smooth, -1000) + generator.normal(0, 15, smooth.shape)
        array = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
        path = folder / f"{number}.nii.gz"
        nifti.write(path, Volume.make(array, np.eye(4)))
        arrays.append(array)
        files.append(path)
    return arrays, tuple(files)


def prepare_record(fields: dict[str, Any], generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Window a volume."""
    return {"image": to_range(fields["image"].array, *WINDOW)[..., None]}


def read_all(source: Source, threads: int) -> None:
    """Read and drop every batch, from a fresh stream that ends: none is read ahead in vain."""
    for _ in evaluation_batches(source, prepare_record, LoaderConfig(batch_size=BATCH, num_threads=threads)):
        pass


def read_shuffled(source: Source, preprocess: Preprocess, count: int, threads: int) -> None:
    """Read as many batches of the shuffled training stream as hold every volume once, from a fresh stream."""
    config = LoaderConfig(batch_size=BATCH, num_threads=threads)
    stream = make_loader(source, PreparedField(preprocess), config)(0)
    for _ in range(count // BATCH):
        next(stream)
    stream.close()


def write_store(folder: Path, scans: list[ScanFiles], preprocess: Preprocess, threads: int) -> Source:
    """Pack the volumes into a store; one that is there already is opened."""
    records = [Record(f"{number:05d}", scan, {"path": str(scan.path)}) for number, scan in enumerate(scans)]
    return pack_store(folder, records, StoreSettings(preprocess), threads=threads)[0]


def inflate_all(files: tuple[Path, ...], threads: int) -> None:
    """Inflate every file and drop the bytes."""

    def inflate(path: Path) -> int:
        return len(zlib.decompress(path.read_bytes(), wbits=31))

    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(inflate, files))


def largest_difference(
    source: Source, arrays: list[np.ndarray], threads: int, transform: Transform = prepare_record
) -> float:
    """Return the largest error against what was written, in the window's unit."""
    largest = 0.0
    for batch in evaluation_batches(source, transform, LoaderConfig(batch_size=BATCH, num_threads=threads)):
        for record, image in zip(batch["record"], batch["image"], strict=True):
            wanted = np.clip((arrays[record].astype(np.float64) - WINDOW[0]) / (WINDOW[1] - WINDOW[0]), 0, 1)
            largest = max(largest, float(np.abs(image[..., 0] - wanted).max()))
    return largest


if __name__ == "__main__":
    main()
