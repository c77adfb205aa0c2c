"""jaxmed data: a data set as training reads it fastest, and synthetic ones as files.

  jaxmed data pack --data.manifest CSV --out STORE     every record prepared once, in a few large files for pods
  jaxmed data phantoms KIND --out DIR                  a synthetic data set as the files that users have

A stage that pre-trains or adapts takes --data.store STORE instead of a manifest, or beside one whose paths are those
that were packed. STORE/records.csv is a manifest too, which names the store.
"""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jaxmed.config import Number, Seed, Size, Threads, checked
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError, nearest
from jaxmed.files import make_folder

PACK = """Prepare every record of a manifest once, and keep them in a few large files for training on many machines.

What is prepared is what a stage reads:
  --stage "SYSTEM STAGE"  takes the preprocessing of a stage, such as "tangerine pretrain"; --preset as of the stage
  --weights FILE|DIR      takes that of weights, which is what they are adapted by
and --preprocess options change it. A broken file fails alone: outputs/failed.csv names it. A call that was stopped
continues, and one whose files have changed packs these anew.

Example: jaxmed data pack --stage "tangerine pretrain" --data.manifest scans.csv --out store"""
# What a store consists of; nothing else in its folder is deleted.
OWN_NAMES = ("store.json", "records.csv", "shards", "outputs", "log.txt")


@dataclasses.dataclass(frozen=True)
class PackData:
    """Which records are packed.

    Attributes:
        manifest: CSV with the column path; its other columns stay beside the records.
        split: Only rows with this word under "split"; empty for all.
    """

    manifest: Path | None = None
    split: str = ""


@dataclasses.dataclass(frozen=True)
@checked
class Packing:
    """How a store is made.

    Attributes:
        out: Folder of the store.
        data: The records.
        input: A file, a DICOM folder, or a folder of such, instead of a manifest.
        series: SeriesInstanceUID or SeriesDescription to read from DICOM folders that hold several series.
        fill: Intensity of voxels that have none (NaN, Inf, fill values); without it they are refused.
        preprocess: From a file to a network's input; a stage that wants another refuses the store.
        dtype: Type of the stored numbers; float16 keeps three digits.
        compression: "zstd" makes files smaller, by half where much is background, and reading slower.
        shard_mb: Size of a file in MB, before compression.
        threads: That read and prepare.
        overwrite: Replace a store of other settings.
        quiet: Print nothing but errors and the place of the store.
        debug: Show the traceback of an error.
    """

    out: Path
    data: PackData = PackData()
    input: Path | None = None
    series: str = ""
    fill: float | None = None
    preprocess: Preprocess = Preprocess()
    dtype: Literal["float16", "float32"] = "float16"
    compression: Literal["none", "zstd"] = "none"
    shard_mb: Size = 256
    threads: Threads = 2
    overwrite: bool = False
    quiet: bool = False
    debug: bool = False


def packing_of(stage: str | None, preset: str | None, weights: Path | None) -> type[Packing]:
    """Return `Packing` with the preprocessing of a stage, or of weights, as its default.

    Args:
        stage: System and stage; None for none.
        preset: Of the stage; None for "paper".
        weights: Published or own weights; None for none.

    Raises:
        InputError: Both are given, the stage is unknown or prepares nothing, or the weights cannot be read.
    """
    if stage is not None and weights is not None:
        raise InputError("--stage, --weights", "one of them", "both", "drop one")
    if preset is not None and stage is None:
        raise InputError("--preset", "one of a stage", f"'{preset}' and no --stage", 'add --stage "SYSTEM STAGE"')
    preprocess = Preprocess()
    if weights is not None:
        from jaxmed.models.published.load import load_published

        preprocess = load_published(weights).preprocess
    if stage is not None:
        preprocess = _stage_preprocess(stage, preset or "paper")
    field = ("preprocess", Preprocess, dataclasses.field(default=preprocess))
    kind: Any = dataclasses.make_dataclass("Packing", [field], bases=(Packing,), frozen=True)
    return kind


def _stage_preprocess(stage: str, preset: str) -> Preprocess:
    from jaxmed.cli import STAGES, load_stage

    words = stage.split()
    if len(words) != 2:
        raise InputError("--stage", '"SYSTEM STAGE"', f"'{stage}'", nearest(stage, STAGES))
    config = getattr(load_stage(*words), preset, lambda: None)()
    if config is None:
        raise InputError("--preset", f"one of {stage}", preset)
    found = getattr(config, "preprocess", None)
    if not isinstance(found, Preprocess):
        advice = "give --weights, whose preprocessing adapt takes, or --preprocess options"
        raise InputError("--stage", "a stage with --preprocess options", stage, advice)
    return found


def pack_records(packing: Packing) -> int:
    """Pack, say what failed, and return 1 where something did.

    Raises:
        InputError: There is nothing to pack, or the place holds something else or cannot be written.
    """
    from jaxmed.data.scans import ANY_KIND, find_records
    from jaxmed.data.sequences import gather_cases
    from jaxmed.data.store import StoreSettings, pack_store
    from jaxmed.recipes.map_files import write_failed
    from jaxmed.train.log import Log

    out, sequences = packing.out, packing.preprocess.sequences
    records, notes = find_records(
        packing.data.manifest, packing.input, packing.data.split, packing.series, packing.fill, ANY_KIND
    )
    if packing.input is not None:
        cases, passed = gather_cases([record.scan for record in records], sequences)
        firsts, notes = {scan.path for scan in cases}, (*notes, *passed)
        records = [dataclasses.replace(record, row={"subject": record.scan.study}) for record in records
                   if record.scan.path in firsts]  # fmt: skip
    _claim(out, packing.overwrite)
    log = Log(out, packing.quiet)
    for note in notes:
        log.say(f"Note: {note}")
    settings = StoreSettings(packing.preprocess, packing.series, packing.fill, packing.dtype, packing.compression)
    size = " x ".join(map(str, settings.shape))
    found = f"{len(records):,} records" if len(records) > 1 else "One record"
    log.say(f"{found} of {size}, {settings.record_bytes / 1e6:,.3g} MB each as {settings.dtype}.")
    with log.progress("Packing", len(records), "records") as update:

        def tell(done: int, failed: int) -> None:
            update(done, f"{failed} failed" if failed else "")

        store, failed = pack_store(
            out, records, settings, shard_mb=packing.shard_mb, threads=packing.threads, tell=tell
        )
    write_failed(out / "outputs", failed)
    for one in failed:
        log.say(f"Failed: {one['reason']}")
    print(f"Store: {out} ({len(store):,} records in {len(store.shards):,} files{_also(len(failed))})")
    return int(bool(failed))


def _claim(out: Path, overwrite: bool) -> None:
    """Make the folder, or empty that of a store that is to be replaced; anything else is left alone."""
    if out.exists() and not out.is_dir():
        raise InputError(out, "a folder for the store", "a file", "choose another --out")
    held = sorted(item.name for item in out.iterdir() if not item.name.startswith(".")) if out.is_dir() else []
    if foreign := [name for name in held if name not in OWN_NAMES]:
        raise InputError(out, "a new or empty folder, or a store", f"one holding {foreign[0]}", "choose another --out")
    for name in held if overwrite else ():
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink()
    make_folder(out)


def _also(failed: int) -> str:
    return f"; {failed:,} failed, see outputs/failed.csv" if failed else ""


# Synthetic data sets -------------------------------------------------------------------------------------------------

Kind = Literal[
    "answers", "brain", "chest", "cine", "connectome", "diffusion", "heads", "pairs", "prostate", "puzzles", "retina",
    "textures",
]  # fmt: skip
SIZES: dict[str, tuple[int, ...]] = {
    "answers": (), "brain": (64, 64), "chest": (64, 64, 64), "cine": (), "connectome": (68,),
    "diffusion": (32, 32, 8), "heads": (96, 112, 96), "pairs": (24, 24, 24), "prostate": (48, 48, 16),
    "puzzles": (32, 32), "retina": (64,), "textures": (64,),
}  # fmt: skip
"""Voxels or pixels of each kind, of a connectome its regions; the edge alone where pictures are square."""


def write_phantoms(
    kind: Kind, /, *, out: Path, subjects: Number = 20, size: tuple[Size, ...] = (), seed: Seed = 0
) -> None:
    """Write a synthetic data set as the files that users have: NIfTI, PNG, CSV, bval and bvec.

    answers (of a multimodal model, a table), brain (scans or slices), chest (CT in HU), cine (beating hearts with
    records), connectome (with visits), diffusion (one scan with gradient tables), heads (label maps with T1), pairs
    (MRI with amyloid PET), prostate (T2w, DWI, ADC), puzzles (images with masks of few-shot tasks), retina (fundus
    photographs), textures (of no meaning). The same command writes the same files; one that was stopped is given again.

    Example: jaxmed data phantoms chest --subjects 40 --out chests

    Args:
        kind: What is drawn.
        out: Folder to write.
        subjects: How many; of puzzles the images of each task, of diffusion one scan is written in any case.
        size: Voxels or pixels along each axis, of a connectome its regions; empty for those of the kind.
        seed: Seed of everything that is drawn.
    """
    size = size or SIZES[kind]
    if len(size) != len(SIZES[kind]) and not (kind in ("brain", "puzzles") and len(size) == 3):
        expected = f"{len(SIZES[kind]) or 'no'} numbers for {kind}"
        raise InputError("--size", expected, " ".join(map(str, size)) or "none")
    if subjects < 1:
        raise InputError("--subjects", "one or more", subjects)
    make_folder(out)
    print(f"Written: {_WRITERS[kind](out, seed, subjects, size)}")


def _answers(out: Path, seed: int, subjects: int, size: tuple[int, ...]) -> Path:
    from jaxmed.synthesis.phantoms.answers import AnswersConfig, write_answers

    return write_answers(out / "answers.csv", seed, AnswersConfig(cases=subjects))


def _brain(out: Path, seed: int, subjects: int, size: tuple[int, ...]) -> Path:
    from jaxmed.synthesis.phantoms.write_brain import write_brain_cohort

    return write_brain_cohort(out, seed, subjects, size)


def _chest(out: Path, seed: int, subjects: int, size: tuple[int, ...]) -> Path:
    from jaxmed.synthesis.phantoms.write_chest import write_chest_cohort

    x, y, z = size
    return write_chest_cohort(out, seed, subjects, (x, y, z))


def _cine(out: Path, seed: int, subjects: int, size: tuple[int, ...]) -> Path:
    from jaxmed.synthesis.phantoms.cine import write_cohort

    return write_cohort(out, seed, subjects)


def _connectome(out: Path, seed: int, subjects: int, size: tuple[int, ...]) -> Path:
    import jax

    from jaxmed.config import to_record
    from jaxmed.synthesis.phantoms.connectome import CohortConfig, random_connectome, simulate_cohort
    from jaxmed.synthesis.phantoms.write_connectome import region_names, write_cohort

    (regions,), config = size, CohortConfig(subjects=subjects)
    adjacency, seeds = random_connectome(seed, regions).adjacency, (0, (regions + 1) // 2)
    cohort = simulate_cohort(jax.random.key(seed), adjacency, seeds, config)
    settings = to_record(config)
    return write_cohort(out, seed, cohort, adjacency, region_names(regions), seeds, settings).table


def _diffusion(out: Path, seed: int, subjects: int, size: tuple[int, ...]) -> Path:
    from jaxmed.synthesis.phantoms.write import check_shape, write_diffusion_slab, write_slab_sidecars

    x, y, z = size
    check_shape("--size", size)
    files = write_diffusion_slab(out, seed, (x, y, z), SNR)
    write_slab_sidecars(files, SNR)
    return files.dwi


def _heads(out: Path, seed: int, subjects: int, size: tuple[int, ...]) -> Path:
    from jaxmed.synthesis.phantoms.write_heads import write_heads

    x, y, z = size
    # Smaller ones show the same head with larger voxels.
    return write_heads(out, seed, subjects, (x, y, z), spacing=192.0 / x)


def _pairs(out: Path, seed: int, subjects: int, size: tuple[int, ...]) -> Path:
    from jaxmed.synthesis.phantoms.write_amyloid import write_amyloid_cohort

    x, y, z = size
    return write_amyloid_cohort(out, seed, subjects, (x, y, z), spacing=192.0 / x)


def _prostate(out: Path, seed: int, subjects: int, size: tuple[int, ...]) -> Path:
    from jaxmed.synthesis.phantoms.write_prostate import write_prostate_cohort

    x, y, z = size
    return write_prostate_cohort(out, seed, subjects, (x, y, z))


def _puzzles(out: Path, seed: int, subjects: int, size: tuple[int, ...]) -> Path:
    from jaxmed.synthesis.phantoms.write_puzzles import Counts, write_puzzle_cohort

    some = math.ceil(subjects / 4)
    return write_puzzle_cohort(out, seed, Counts(subjects, some, some, some), size)


def _retina(out: Path, seed: int, subjects: int, size: tuple[int, ...]) -> Path:
    from jaxmed.synthesis.phantoms.write_retina import write_retina_cohort

    return write_retina_cohort(out, seed, subjects, size[0])


def _textures(out: Path, seed: int, subjects: int, size: tuple[int, ...]) -> Path:
    from jaxmed.synthesis.phantoms.write_retina import write_textures

    return write_textures(out, seed, subjects, size[0])


SNR = 30.0
"""Signal-to-noise ratio of white matter at b = 0 of a simulated diffusion scan."""
_WRITERS: dict[str, Callable[[Path, int, int, tuple[int, ...]], Path]] = {
    "answers": _answers, "brain": _brain, "chest": _chest, "cine": _cine, "connectome": _connectome,
    "diffusion": _diffusion, "heads": _heads, "pairs": _pairs, "prostate": _prostate, "puzzles": _puzzles,
    "retina": _retina, "textures": _textures,
}  # fmt: skip
COMMANDS = ("pack", "phantoms")
