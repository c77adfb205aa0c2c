"""Turn an ENIGMA table of cortical effect sizes into the CSV files that `jaxmed igndmoe compare` takes.

    python scripts/prepare_enigma.py EFFECTS.csv CONNECTOME_DK86 CONNECTOME_HCP OUT
    jaxmed igndmoe compare --connectome OUT/connectome.csv --map.file OUT/map.csv --map.more-is better \
        --map.lengths OUT/lengths.csv --map.size size --map.weight functional_strength --out RUN

Fibre counts and lengths of the 68 cortical regions come from the first folder (mean80_fibercount.csv and
mean80_fiberlength.csv, 86 regions). Growth in weighted FKPP is modulated by functional strength, the sum of a region's
positive correlations, scaled to [0, 1], from the second folder. The tables hold no region sizes and no gene expression:
agents get regions of equal size and equal synthesis and clearance.
"""

import csv
import sys
from pathlib import Path

import numpy as np

from jaxmed.io.tables import read_table, write_columns, write_table

SIZE = 1000.0
"""Voxels of every region."""


def main() -> None:
    """Read, bring all into one order of regions, write three files."""
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    effects, structural, functional, out = map(Path, sys.argv[1:])
    table = read_table(effects, ("Structure", "d_icv"))
    found = dict(zip(table.column("Structure"), table.floats("d_icv"), strict=True))
    names, counts = read_matrix(structural / "mean80_fibercount.csv")
    _, lengths = read_matrix(structural / "mean80_fiberlength.csv")
    cortical = [i for i, name in enumerate(names) if name.startswith("ctx-")]
    regions = tuple(names[i].replace("ctx-lh-", "L_").replace("ctx-rh-", "R_") for i in cortical)
    square = np.ix_(cortical, cortical)
    matrix = (counts + counts.T)[square] / 2
    write_columns(out / "connectome.csv", dict(zip(regions, matrix.T, strict=True)))
    np.savetxt(out / "lengths.csv", ((lengths + lengths.T) / 2)[square], delimiter=",", fmt="%.6g")
    strength = functional_strength(functional)
    rows = [
        {"region": name, "value": found[name], "size": SIZE, "functional_strength": strength[name]} for name in regions
    ]
    write_table(out / "map.csv", tuple(rows[0]), rows)


def read_matrix(path: Path) -> tuple[list[str], np.ndarray]:
    """Return names and a matrix with a header; a file without one has no names."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    is_header = any(character.isalpha() for character in rows[0][0])
    return (rows[0] if is_header else []), np.array(rows[is_header:], float)


def functional_strength(folder: Path) -> dict[str, float]:
    """Return each cortical region's sum of positive correlations, on [0, 1]."""
    labels = [cell for line in (folder / "funcLabels_ctx.csv").read_text().split() for cell in line.split(",")]
    matrix = np.loadtxt(folder / "funcMatrix_ctx.csv", delimiter=",")
    np.fill_diagonal(matrix, 0.0)
    strength = np.maximum(matrix, 0.0).sum(axis=1)
    unit = (strength - strength.min()) / (strength.max() - strength.min())
    return dict(zip(labels, map(float, unit), strict=True))


if __name__ == "__main__":
    main()
