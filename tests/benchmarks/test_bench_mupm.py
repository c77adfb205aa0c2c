"""Drawn answers against probabilities in the benchmark of MUPM: what is estimated, and how many answers it takes."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("bench_mupm")


@pytest.mark.parametrize("answers", [2, 4, 16])
def test_the_noise_of_decoding_is_taken_off_without_bias(bench, answers):
    rng = np.random.default_rng(0)
    shares = rng.dirichlet((3.0, 2.0, 1.0), 40)
    found = bench.draw_estimates(rng, shares, answers, 60, trials=4000)
    truth = shares.var(0).sum()  # wordings are drawn from the pool with replacement
    assert abs(found.mean() - truth) < 4 * found.std() / np.sqrt(len(found))
    # Without the correction the noise of decoding is a part of it: between the two is a large difference.
    noise = (shares * (1 - shares)).mean(0).sum() / answers
    assert noise > 8 * found.std() / np.sqrt(len(found))


def test_answers_without_noise_cost_as_many_passes_as_are_drawn_to_a_wording(bench):
    # One wording of five is answered otherwise: the share p of 20 wordings gives 20 / 19 x 2 p (1 - p).
    shares = np.eye(2)[(np.arange(100) % 5 == 0).astype(int)]
    plan = bench.equal_error(np.random.default_rng(0), shares, 20)
    assert plan.answers == 2 and 0.7 < plan.passes / (2 * 20) < 1.4
    slope = 20 / 19 * 2 * (1 - 2 * 0.2)
    assert plan.error == pytest.approx(slope * np.sqrt(0.2 * 0.8 / 20), rel=0.15)


def test_the_plan_has_the_error_of_the_probabilities(bench):
    rng = np.random.default_rng(0)
    shares = rng.dirichlet((9.0, 6.0, 3.0), 200)
    plan = bench.equal_error(rng, shares, 20)
    found = bench.draw_estimates(rng, shares, plan.answers, plan.passes // plan.answers)
    assert found.std() == pytest.approx(plan.error, rel=0.25)
    assert plan.passes > 10 * 20  # this noise is larger than the variance that is looked for
