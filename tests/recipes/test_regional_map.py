"""Maps and what agents need: lengths in every form of a connectome, genes standardised, what is missing named."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from jaxmed.data.connectomes import Connectome
from jaxmed.errors import InputError
from jaxmed.recipes.regional_map import MapConfig, read_agents, read_map

pytestmark = pytest.mark.core

REGIONS = ("L_a", "L_b", "L_c", "R_a", "R_b", "R_c")
LENGTHS = np.zeros((6, 6))
for u, v, length in ((0, 1, 10), (0, 2, 20), (0, 3, 30), (1, 4, 40), (2, 3, 5), (4, 5, 7)):
    LENGTHS[u, v] = LENGTHS[v, u] = length
CONNECTOME = Connectome(Path("a.csv"), REGIONS, (LENGTHS > 0).astype(np.float32))
GENE = np.array([0.2, 1.4, -0.3, 2.0, 0.9, 0.1])
MAP = "region;value;voxels;gene\n" + "".join(
    f"{name};{value};{size};{gene:g}\n".replace(".", ",")
    for name, value, size, gene in zip(
        REGIONS, (0.1, "", 0.5, 0.9, 0.2, 0.3), (100, 200, 300, 400, 500, 600), GENE, strict=True
    )
)
BARE = "\n".join(" ".join(f"{value:g}" for value in row) for row in LENGTHS)
NAMED = "\n".join([",".join(REGIONS), *(",".join(f"{value:g}" for value in row) for row in LENGTHS)])
ORDER = [3, 1, 5, 4, 0, 2]
SHUFFLED = "\n".join(
    ["\t".join(REGIONS[i] for i in ORDER), *("\t".join(f"{LENGTHS[i, j]:g}" for j in ORDER) for i in ORDER)]
)
UPPER = "\n".join(",".join(f"{value:g}" for value in row) for row in np.triu(LENGTHS))
EDGES = "source,target,weight\n" + "\n".join(
    f"{REGIONS[i]},{REGIONS[j]},{LENGTHS[i, j]:g}" for i in range(6) for j in range(i) if LENGTHS[i, j]
)


def read(tmp_path, lengths, **options):
    (tmp_path / "map.csv").write_text(MAP)
    (tmp_path / "lengths.csv").write_text(lengths)
    config = MapConfig(tmp_path / "map.csv", size="voxels", lengths=tmp_path / "lengths.csv", **options)
    columns = read_map(config, CONNECTOME._replace(regions=REGIONS), notes := [])
    graph = read_agents(config, CONNECTOME, columns, notes)
    assert graph is not None
    return columns, graph, " ".join(notes)


@pytest.mark.parametrize(
    "text", [BARE, NAMED, SHUFFLED, UPPER, EDGES], ids=["bare", "named", "shuffled", "upper", "edges"]
)
def test_lengths_come_in_every_form_of_a_connectome(tmp_path, text):
    _, graph, _ = read(tmp_path, text)
    np.testing.assert_array_equal(graph.lengths, np.where(LENGTHS > 0, LENGTHS, 1))
    np.testing.assert_array_equal(graph.sizes, [100, 200, 300, 400, 500, 600])


def test_genes_are_standardised_over_regions_as_in_the_release(tmp_path):
    _, graph, _ = read(tmp_path, NAMED, synthesis="gene")
    expected = scipy.stats.norm.cdf(scipy.stats.zscore(GENE, ddof=1))
    np.testing.assert_allclose(graph.synthesis, expected, atol=1e-6)
    np.testing.assert_allclose(graph.clearance, 0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (NAMED.replace("R_b", "x"), "lengths of every region of the connectome, found none of 'R_b'"),
        ("0,1\n1,0\n", "6 x 6 lengths, found 2 x 2"),
        (NAMED.replace("10", "0.001"), "lengths above 0.01 mm where regions are connected, found 0.001"),
        (NAMED.replace("10", ""), "a length wherever regions are connected, found an empty cell"),
    ],
)
def test_mistakes_of_lengths_are_told(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        read(tmp_path, text)


def test_what_is_not_known_is_named(tmp_path):
    columns, _, said = read(tmp_path, NAMED)
    np.testing.assert_allclose(columns["value"], [0.1, np.nan, 0.5, 0.9, 0.2, 0.3])
    assert "not scored: L_b" in said and "semicolons, with decimal commas" in said
