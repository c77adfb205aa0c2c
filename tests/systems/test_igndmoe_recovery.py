"""What was planted comes back: the equation that made a cohort, the change of weights over stage, and stages."""

import dataclasses

import numpy as np
import pytest

from jaxmed.models.graph_diffusion import ProgressionConfig
from jaxmed.synthesis.phantoms.connectome import CohortConfig
from jaxmed.systems.igndmoe.fitting import fit_problems
from jaxmed.systems.igndmoe.options import ATTRIBUTION, FitConfig
from jaxmed.systems.igndmoe.recovery import CANDIDATES, choices, plant, stage_correlations, stage_curve, weight_slopes

RECIPE = FitConfig(grid_steps=32, stages=64, steps=20, loops=3)
STRONG = {"reaction": 0.2, "edge_diffusivity": 1.0}
"""Of the second and third planted expert, so that a mixture is worth its parameters."""


def with_equation(recipe, equation, **fields):
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, equation=equation, **fields))


@pytest.mark.parametrize(("generator", "settings"), [("ndm", {}), ("fkpp", {})])
def test_the_equation_that_made_a_cohort_is_chosen(generator, settings):
    # In small: two cohorts, two candidates; `test_the_generator_is_chosen_...` is the study.
    planted = plant(range(2), 8, CohortConfig(mechanism=generator, subjects=45, **settings))
    chosen, errors = choices(planted, {name: with_equation(RECIPE, name) for name in ("ndm", "fkpp")})
    assert chosen == [generator] * 2
    assert {name: row.shape for name, row in errors.items()} == {"ndm": (2,), "fkpp": (2,)}
    assert np.isfinite(errors[generator]).all()
