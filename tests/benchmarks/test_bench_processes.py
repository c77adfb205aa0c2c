"""What the benchmarks of saves and of several processes tell."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench_checkpoint  # noqa: E402
import bench_scaling  # noqa: E402


def test_the_share_of_a_save_is_that_of_the_interval_between_two():
    usual, beside, blocked = 0.02, 0.022, 0.11
    run = np.full(27, beside)  # 30 steps, the first three not timed
    run[[8, 18]] += blocked  # steps 10 and 20 save
    found = bench_checkpoint.overlap({"jaxmed": [run, run], "no saves": [np.full(27, usual)]}, 10)
    assert found["blocked_s"] == pytest.approx(blocked)
    assert found["share_of_interval"] == pytest.approx(blocked / (10 * beside))
    assert found["slower_beside_writing"] == pytest.approx(0.1)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_of_the_benchmark_train_as_one():
    size = (64, 8, 6)
    (times, two), (_, one) = bench_scaling.run(2, size), bench_scaling.run(1, size)
    assert len(two) == len(one) == 6 and np.all(np.diff(times) > 0)
    np.testing.assert_allclose(two, one, rtol=1e-4)
