"""A study of slow cells that test_study.py kills: python study_child.py FOLDER LOG SECONDS [INDEX COUNT]."""

import sys
import time
from pathlib import Path

from jaxmed.recipes.study import make_cells, run_study

AXES = {"arm": ("mae", "dino"), "fraction": (0.1, 1.0), "seed": tuple(range(10))}


def main(folder, log, seconds, index=0, count=1):
    def run_cell(cell):
        with open(log, "a") as file:
            file.write(cell.slug + "\n")
        time.sleep(float(seconds))
        offset = {"mae": 0.0, "dino": 0.03}[cell["arm"]]
        score = 0.7 + offset + 0.1 * cell["fraction"] + 0.013 * ((7 * cell["seed"] + len(cell["arm"])) % 5)
        return {"auroc": score, "loss": 1 / 3 + cell["seed"]}

    cells = make_cells(AXES)
    study = run_study(
        cells, run_cell, Path(folder), {"data": "toy"}, process_index=int(index), process_count=int(count)
    )
    if len(study.results) == len(cells):
        # Here, so that the killed starts need not load SciPy and matplotlib.
        from jaxmed.recipes.study_tables import compare, summarise, write_tables

        means = summarise(study.results, ("arm", "fraction"), "auroc")
        tests = compare(study.results, ("fraction",), "mae", "auroc")
        write_tables(Path(folder) / "outputs", study.results, means, tests)


if __name__ == "__main__":
    main(*sys.argv[1:])
