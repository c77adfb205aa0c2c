"""The benchmark of DINOv2 compares like with like: the recipe's step and PyTorch's give one loss, step after step."""

import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxmed.train.mesh import MeshConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.mark.peers
def test_steps_of_pytorch_are_those_of_the_recipe(monkeypatch):
    """Weights, crops, masks, clipping, AdamW and the teacher's average are the same, or later losses part."""
    bench = importlib.import_module("bench_dino")
    monkeypatch.setattr(bench, "TRAIN", dataclasses.replace(bench.TRAIN, mesh=MeshConfig(data=1)))
    ((_, dino, batch),) = bench.WORKLOADS["smoke"]
    crops, state = bench.draw_crops(dino, batch), bench.first_state(dino)
    ours, theirs = bench.jaxmed_step(dino, state, crops), bench.torch_step(dino, state, crops, 2)
    losses = np.array([(float(ours()), float(theirs())) for _ in range(6)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=2e-4)
    assert abs(losses[-1, 0] - losses[0, 0]) > 1e-2  # the weights do move


def test_operations_are_those_of_a_small_model_counted_by_hand():
    bench = importlib.import_module("bench_dino")
    ((_, dino, _),) = bench.WORKLOADS["smoke"]
    # Global crops have 4 x 4 patches and a class token, local ones 2 x 2; half of them have 30 % hidden.
    tokens = {16: 17, 4: 5}
    view = {n: 2 * 2 * t * (4 * 48**2 + 2 * 48 * 96 + 2 * t * 48) + 2 * n * 588 * 48 for n, t in tokens.items()}
    row = 2 * (48 * 64 + 64 * 64 + 64 * 256 + 256 * 256)
    expected = 4 * (2 * view[16] + (2 + 2 * 16 * 0.5 * 0.3) * row) + 3 * 2 * (view[4] + row)
    np.testing.assert_allclose(bench.count_flops(dino), expected, rtol=1e-12)
