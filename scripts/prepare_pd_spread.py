"""Turn the Parkinson data of the agent simulator into the CSV files that `jaxmed igndmoe compare` takes.

    python scripts/prepare_pd_spread.py pd_spread_42.npz OUT
    jaxmed igndmoe compare --connectome OUT/connectome.csv --map.file OUT/map.csv --map.lengths OUT/lengths.csv \
        --map.size size --map.synthesis snca --map.clearance gba --map.weight snca_unit --out RUN

The file holds 42 regions without names (they become region01 to region42), densities and lengths of connections, sizes,
expression of SNCA and GBA as z-scores, and the atrophy of 41 regions. Source: Zheng et al., PLoS Biology 2019 (MIT).
"""

import sys
from pathlib import Path

import numpy as np

from jaxmed.io.tables import write_columns, write_table


def main() -> None:
    """Read, check the shapes, write three files."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    out = Path(sys.argv[2])
    with np.load(sys.argv[1]) as data:
        density, length = data["sconnDen"], data["sconnLen"]
        size, snca, gba = (data[name].ravel().astype(float) for name in ("ROIsize", "SNCA", "GBA"))
        atrophy = data["real_atrophy"].ravel().astype(float)
    regions = tuple(f"region{index + 1:02d}" for index in range(len(density)))
    write_columns(out / "connectome.csv", dict(zip(regions, density.T, strict=True)))
    out.mkdir(parents=True, exist_ok=True)
    np.savetxt(out / "lengths.csv", length, delimiter=",", fmt="%.6g")
    unit = (snca - snca.min()) / (snca.max() - snca.min())
    rows = [
        {
            "region": name,
            "value": atrophy[i] if i < len(atrophy) else "",
            "size": size[i],
            "snca": snca[i],
            "gba": gba[i],
            "snca_unit": unit[i],
        }
        for i, name in enumerate(regions)
    ]
    write_table(out / "map.csv", tuple(rows[0]), rows)


if __name__ == "__main__":
    main()
