"""Write phantom retinas as a cohort, or textures as pictures: PNG files and the manifest that training reads."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxmed.arrays.batches import padded_rows
from jaxmed.config import to_record
from jaxmed.errors import InputError
from jaxmed.io.images import write_png
from jaxmed.synthesis.phantoms.cohort import SPLITS, check_fractions, claim_folder, plan_splits, write_manifest
from jaxmed.synthesis.phantoms.retina import GRADES, RetinaConfig, make_retina
from jaxmed.synthesis.phantoms.textures import make_texture

COLUMNS = ("path", "subject", "label", "split", "hypertension", "age", "sex", "eye")
EYES = ("left", "right")
BATCH = 50


def write_retina_cohort(
    folder: str | Path,
    seed: int,
    subjects: int,
    edge: int = 64,
    config: RetinaConfig = RetinaConfig(),
    *,
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    name: str = "retina",
) -> Path:
    """Write a cohort of phantom retinas, two eyes per subject; every split has as many of each grade, in turn.

    Subjects with hypertension are older by 10 years and more often men, so that covariates tell something about it;
    they tell nothing about the grade. What is there already stays: a second call writes nothing, and a call after an
    interruption writes what is missing.

    Args:
        folder: Gets pictures.csv, pictures.json (seed and settings) and pictures/NAME_0000_left.png and so on.
        seed: Seed of the cohort; subject i is the same whatever the number of subjects, but for the split.
        subjects: How many.
        edge: Pixels of a picture's edge.
        config: Camera and findings.
        fractions: Shares of train, validation and test; they sum to 1.
        name: Start of the subjects' names, by which those of two cohorts differ.

    Returns:
        The manifest, with the columns path (relative to it), subject, label (the grade, 0 to 4), split, hypertension (0
        or 1), age in years, sex (f or m) and eye.

    Raises:
        InputError: A setting is impossible, or the folder holds a cohort of other settings.
    """
    folder = Path(folder)
    check_fractions(subjects, fractions)
    _check_edge(edge)
    settings: dict[str, object] = {
        "seed": seed,
        "subjects": subjects,
        "edge": edge,
        "config": to_record(config),
        "fractions": list(fractions),
        "name": name,
    }
    claim_folder(folder / "pictures.json", settings)
    rows, seen = [], {split: 0 for split in SPLITS}
    for index, split in plan_splits(subjects, fractions):
        number = seen[split]
        seen[split] += 1
        subject, wound = f"{name}_{index:04d}", number % 2
        generator = np.random.default_rng([seed, index])
        age = int(np.clip(generator.normal(52 + 10 * wound, 9), 25, 95))
        sex = "m" if generator.random() < 0.4 + 0.2 * wound else "f"
        for eye in EYES:
            path = f"pictures/{subject}_{eye}.png"
            cells = (path, subject, number % GRADES, split, wound, age, sex, eye)
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
    missing = [place for place, row in enumerate(rows) if not (folder / row["path"]).exists()]
    # One compilation for the cohort; without jit every operation of a picture is dispatched on its own.
    draw = jax.jit(
        jax.vmap(lambda key, grade, wound, right: _stored(make_retina(key, grade, wound, right, edge, config).array))
    )
    root = jax.random.key(seed)
    for batch in padded_rows(len(missing), BATCH):
        chosen = [rows[missing[place]] for place in batch.index]
        keys = jax.vmap(lambda index: jax.random.fold_in(root, index))(
            jnp.array([missing[place] // len(EYES) for place in batch.index])
        )
        grades, wound = (jnp.array([row[name] for row in chosen]) for name in ("label", "hypertension"))
        pictures = draw(keys, grades, wound == 1, jnp.array([row["eye"] == "right" for row in chosen]))
        _write(folder, chosen[: batch.count], pictures)
    return write_manifest(folder / "pictures.csv", COLUMNS, rows)


def write_textures(folder: str | Path, seed: int, number: int, edge: int = 64) -> Path:
    """Write generic textures, for pre-training on pictures that are no retinas.

    Args:
        folder: Gets pictures.csv, pictures.json and pictures/texture_0000.png and so on; what is there stays.
        seed: Seed of the pictures.
        number: How many.
        edge: Pixels of a picture's edge.

    Returns:
        The manifest, with the column path.

    Raises:
        InputError: A setting is impossible, or the folder holds pictures of other settings.
    """
    folder = Path(folder)
    if number < 1:
        raise InputError("number", "1 or more", number)
    _check_edge(edge)
    claim_folder(folder / "pictures.json", {"seed": seed, "number": number, "edge": edge})
    rows: list[dict[str, object]] = [{"path": f"pictures/texture_{place:04d}.png"} for place in range(number)]
    missing = [place for place, row in enumerate(rows) if not (folder / str(row["path"])).exists()]
    draw = jax.jit(jax.vmap(lambda key: _stored(make_texture(key, edge))))  # as above
    root = jax.random.key(seed)
    for batch in padded_rows(len(missing), BATCH):
        chosen = [missing[place] for place in batch.index]
        keys = jax.vmap(lambda index: jax.random.fold_in(root, index))(jnp.array(chosen))
        _write(folder, [rows[place] for place in chosen[: batch.count]], draw(keys))
    return write_manifest(folder / "pictures.csv", ("path",), rows)


def _stored(array: Float[Array, "edge edge 3"]) -> UInt8[Array, "edge edge 3"]:
    return jnp.rint(array * 255).astype(jnp.uint8)


def _write(folder: Path, rows: list[dict[str, Any]], pictures: UInt8[Array, "picture edge edge 3"]) -> None:
    for row, picture in zip(rows, np.asarray(pictures), strict=False):  # what fills a batch has no row
        write_png(folder / row["path"], picture)


def _check_edge(edge: int) -> None:
    if edge < 8:
        raise InputError("edge", "8 pixels or more", edge)
