"""A beating heart and a record to go with it: short-axis cines of ellipses, and facts of people who never were."""

from pathlib import Path

import numpy as np
from jaxtyping import Float32

from jaxmed.io.numpy_files import write_npz
from jaxmed.io.tables import write_table

CONDITIONS = ("heart failure", "hypertrophy", "none of these")
# Radius of the cavity at rest (share of the image), share it shrinks by, thickness of the wall.
SHAPES = {"heart failure": (0.22, 0.12, 0.05), "hypertrophy": (0.11, 0.4, 0.1), "none of these": (0.15, 0.35, 0.06)}
SYMPTOMS = {"heart failure": "short of breath on stairs", "hypertrophy": "faint on exertion", "none of these": "none"}
TASKS = {
    "condition": {name: name for name in CONDITIONS},
    "disease": {name: "no disease" if name == "none of these" else "a disease" for name in CONDITIONS},
    "wall": {name: "a thick wall" if name == "hypertrophy" else "no thick wall" for name in CONDITIONS},
}
"""What may be asked, and the right option by condition."""
HISTORY = {"heart failure": "a heart attack years ago", "hypertrophy": "high blood pressure", "none of these": "none"}


def beating_heart(
    rng: np.random.Generator, condition: str, size: int = 32, phases: int = 8
) -> Float32[np.ndarray, "phase row column"]:
    """Draw a short-axis cine of one slice, intensities from 0 to 1: bright blood in a grey wall, in a dark chest."""
    radius, shrink, wall = (value * rng.uniform(0.85, 1.15) for value in SHAPES[condition])
    center, stretch = rng.uniform(0.42, 0.58, 2), rng.uniform(0.9, 1.1)
    row, column = np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2, indexing="ij")
    distance = np.hypot((row - center[0]) * stretch, column - center[1])
    beat = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(phases) / phases)
    inner = radius * (1 - shrink * beat)[:, None, None]
    outer = inner + wall * (1 + 0.5 * shrink * beat)[:, None, None]
    soft = 60.0  # edges of a few pixels
    blood, muscle = (1 / (1 + np.exp(soft * (distance - edge))) for edge in (inner, outer))
    image = 0.15 + 0.3 * muscle + 0.5 * blood + 0.02 * rng.standard_normal((phases, size, size))
    return np.clip(image, 0, 1).astype(np.float32)


def draw_record(rng: np.random.Generator, condition: str, confusion: float = 0.0) -> dict[str, str]:
    """Draw the facts of a person who has a condition.

    Args:
        rng: Draws them.
        condition: One of `CONDITIONS`.
        confusion: Probability that symptoms, and likewise the history, are those of any of the conditions.
    """
    facts = {
        "age": int(rng.integers(45, 80)), "sex": rng.choice(["woman", "man"]),
        "weight": int(rng.integers(55, 105)), "height": f"{rng.uniform(1.55, 1.9):.2f}",
        "systolic": int(rng.integers(110, 160)), "diastolic": int(rng.integers(65, 95)),
        "pulse": int(rng.integers(55, 95)), "symptoms": SYMPTOMS[condition], "history": HISTORY[condition],
        "smoking": rng.choice(["never", "former", "current"]), "alcohol": rng.choice(["none", "rarely", "daily"]),
    }  # fmt: skip
    for name, known in (("symptoms", SYMPTOMS), ("history", HISTORY)):
        if confusion and rng.random() < confusion:
            facts[name] = known[CONDITIONS[rng.integers(len(CONDITIONS))]]
    return {name: str(fact) for name, fact in facts.items()}


def write_cohort(folder: Path, seed: int, cases: int, task: str = "condition", confusion: float = 0.0) -> Path:
    """Write cines as .npz and a table of records, as `jaxmed mupm perturb` takes them.

    Args:
        folder: Where to.
        seed: Of all draws.
        cases: How many; conditions take turns.
        task: One of `TASKS`: what is asked.
        confusion: As of `draw_record`.
    """
    rng, rows = np.random.default_rng(seed), []
    options = "|".join(dict.fromkeys(TASKS[task].values()))
    for case in range(cases):
        condition = CONDITIONS[case % len(CONDITIONS)]
        write_npz(folder / f"case{case:03d}.npz", {"cine": beating_heart(rng, condition)})
        rows.append({
            "path": f"case{case:03d}.npz", "subject": f"subject{case:03d}", "label": TASKS[task][condition],
            "options": options, **draw_record(rng, condition, confusion),
        })  # fmt: skip
    write_table(folder / "records.csv", tuple(rows[0]), rows)
    return folder / "records.csv"
