"""What to fine-tune on for a deployment of a known share of good images: a subset, or weights, and what each gains.

The proposal is a manifest: `--data.weight chosen` of an adaptation takes the subset, `--data.weight weight` all records
with weights under which they have the share of high quality of the deployment. What both gain is measured: the same
number of records as they come, those of the subset, and the first ones again with weights are fine-tuned on, over the
seeds of the study, and scored on a test set of the deployment's share.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from jaxmed.errors import InputError
from jaxmed.io.tables import write_table
from jaxmed.recipes.encoder_study import score_values
from jaxmed.recipes.quality_findings import Measured, over_seeds
from jaxmed.recipes.quality_grid import (
    ARMS,
    Fitter,
    GradedImages,
    GridConfig,
    Plan,
    TuningSet,
    balance_labels,
    draw_rows,
    headline,
    places_in_test,
)
from jaxmed.recipes.quality_records import draw_mixture, largest_size
from jaxmed.recipes.study import Cell, Outcome, make_cells, run_groups
from jaxmed.train.log import Log

SETS = ("as they are", "chosen", "weighted")


def deployed_test_set(data: GradedImages, deployed: float, seed: int) -> Int[np.ndarray, " record"]:
    """Draw the largest set of test records with a deployment's share of high quality."""
    rows = data.sets.cohort.rows("test")
    flags, labels = data.is_high[rows], balance_labels(data)[rows].tolist()
    subjects = data.sets.cohort.subjects[rows].astype(str).tolist()
    size = largest_size(flags, (deployed,), seed, subjects, labels)
    return rows[draw_mixture(data.sets.table.path, flags, deployed, max(size, 1), seed, subjects, labels)]


def quality_weights(is_high: np.ndarray, wanted: float) -> Float[np.ndarray, " record"]:
    """Return weights under which records have a wanted share of high quality; 1 on average where both kinds exist."""
    own = float(is_high.mean())
    high, low = wanted / own if own else 0.0, (1 - wanted) / (1 - own) if own < 1 else 0.0
    return np.where(is_high, high, low)


def run_deployment(
    config: GridConfig,
    fitter: Fitter,
    arm: str,
    data: GradedImages,
    plan: Plan,
    chosen: float,
    deployed: float,
    seed: int,
    place: Path,
    record: object,
    log: Log | None = None,
) -> dict[str, Measured]:
    """Fine-tune on records as they come, on the chosen ones, and with weights; return what the last two gain.

    Args:
        config: Seeds, and how many runs together.
        fitter: Of `quality_grid.make_fitter`.
        arm: Of `ARMS`, that is to be used.
        data: The records.
        plan: Of the study.
        chosen: Share of high quality to fine-tune with.
        deployed: That of the deployment, by which the weights go too.
        seed: Of the first repetition.
        place: Folder of these cells.
        record: What they share with the study.
        log: Where to say how far it is.

    Returns:
        By name, "chosen" and "weighted": the headline measure less that of the records as they are, over seeds; empty
        where cells failed.
    """
    cells = make_cells({"set": SETS, "seed": range(seed, seed + config.seeds)})
    rows = deployed_test_set(data, deployed, seed)
    own, task = float(data.is_high[plan.pool].mean()), data.sets.meaning.task

    def tuning_set(cell: Cell) -> TuningSet:
        share, number = chosen if cell["set"] == "chosen" else own, int(cell["seed"])
        taken = draw_rows(plan, data, share, plan.size, number)
        nearest = min(plan.validation, key=lambda one: abs(one - share), default=None)
        others = np.zeros(0, np.int64) if nearest is None else plan.validation[nearest]
        weights = quality_weights(data.is_high[taken], deployed) if cell["set"] == "weighted" else None
        return TuningSet(arm == ARMS[0], number, taken, others, weights)

    def run_group(group: Sequence[Cell]) -> list[Outcome]:
        found = fitter([tuning_set(cell) for cell in group])
        cohort, places = data.sets.cohort.take(rows), places_in_test(data, rows)
        return [Outcome(score_values(task, cohort, values[places])) for values in found]

    done = run_groups(cells, run_group, place, record, size=config.together, log=log)
    values = {(str(r.cell["set"]), int(r.cell["seed"])): r.metrics[headline(data)] for r in done.results}
    if len(values) < len(cells):
        return {}
    seeds = range(seed, seed + config.seeds)
    return {
        name: over_seeds(np.array([values[name, number] - values[SETS[0], number] for number in seeds]))
        for name in SETS[1:]
    }


def write_proposal(
    path: Path, columns: Sequence[str], data: GradedImages, plan: Plan, chosen: float, deployed: float, seed: int
) -> None:
    """Write the manifest of a study with the columns chosen (1 or 0) and weight; both empty for test records.

    Args:
        path: The table.
        columns: Of the labels.
        data: The records.
        plan: Of the study.
        chosen: Share of high quality of the subset.
        deployed: That of the deployment, by which the weights go.
        seed: Of the draw.
    """
    cohort, drawn = data.sets.cohort, set(draw_rows(plan, data, chosen, plan.size, seed).tolist())
    drawn |= {int(row) for row in plan.validation.get(chosen, [])}
    taught = cohort.rows("train", "validation")
    weights = dict(zip(taught.tolist(), quality_weights(data.is_high[taught], deployed).tolist(), strict=True))
    rows = []
    for row in range(len(cohort.scans)):
        own = {"chosen": int(row in drawn), "weight": f"{weights[row]:.6g}"} if row in weights else {}
        labels = dict(zip(columns, cohort.cells[row], strict=True))
        rows.append({"path": str(cohort.paths[row].absolute()), "subject": str(cohort.subjects[row]),
                     "split": str(cohort.splits[row]), **labels,
                     "quality": "high" if data.is_high[row] else "low", "chosen": "", "weight": "", **own})  # fmt: skip
    clash = sorted({"quality", "chosen", "weight"} & set(columns))
    if clash:
        raise InputError("label.columns", "names other than quality, chosen and weight", ", ".join(clash))
    write_table(path, list(rows[0]), rows)
