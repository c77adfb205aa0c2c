"""Ways to segment, compared: a threshold that is chosen on other subjects."""

import numpy as np
import pytest

from jaxmed.recipes.segmentation_study import MEASURES, Arms, tabulate
from jaxmed.recipes.study import Cell, Result

ARMS = Arms("at once", "thinking", "random")


def test_one_threshold_is_chosen_on_the_other_subjects():
    # Anna's cases say 0.2, Ben's and Cleo's 0.5 (the base's own): what is best on one's own subject must not be taken.
    subjects = ("anna", "anna", "ben", "cleo")
    dice = {
        ARMS.base: [0.1, 0.2, 0.8, 0.7],
        f"{ARMS.above}0.2": [0.9, 0.9, 0.5, 0.2],
        "chosen level": [0.5, 0.5, 0.5, 0.5],
    }

    def results(subjects):
        cases = list(enumerate(subjects))
        rows = [
            [
                {"arm": arm, "budget": 0, "case": str(place), "subject": subject, **dict.fromkeys(MEASURES, place),
                 "dice": values[place] + 0.1 * seed}
                for arm, values in dice.items() for place, subject in cases
            ]
            for seed in range(2)
        ]  # fmt: skip
        return [Result(Cell((("seed", seed),)), {}, found) for seed, found in enumerate(rows)]

    found = tabulate(results(subjects), 0, ARMS)
    # Left out: anna, so 0.5 is best (0.75 against 0.35); ben, so 0.2 is (0.67 against 0.33), and for cleo too.
    assert found.course(ARMS.elsewhere)[0].mean == pytest.approx(np.mean([0.1, 0.2, 0.5, 0.2]) + 0.05)
    gain = found.gain("chosen level", 0, ARMS.elsewhere)
    assert gain is not None and gain.difference == pytest.approx(0.5 - 0.25)
    assert len(found.points) == 24
    assert not tabulate(results(["anna"] * 4), 0, ARMS).course(ARMS.elsewhere)
