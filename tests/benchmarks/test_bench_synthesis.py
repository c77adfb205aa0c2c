"""The benchmark of the brain generator compares like with like: PyTorch's deformation is the same."""

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.mark.peers
def test_deformations_of_pytorch_are_the_generators_and_its_images_alike():
    bench = importlib.import_module("bench_synthesis")
    work = bench.WORKLOADS["smoke"]
    peer = bench.make_torch(bench.make_labels(work.edge), 1)
    assert bench.compare(bench.settings(work), jax.random.key(3), peer) < 1e-4
    image, classes, log_bias, _ = peer.sample()
    assert image.shape == classes.shape == log_bias.shape == (work.edge,) * 3
    assert float(image.max()) == pytest.approx(1.0) and float(image.min()) >= 0


def test_labels_of_the_benchmark_are_thirty_two():
    bench = importlib.import_module("bench_synthesis")
    np.testing.assert_array_equal(np.unique(bench.make_labels(48)), np.arange(bench.NUM_LABELS))
