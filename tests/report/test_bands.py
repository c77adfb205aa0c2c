"""Lines with intervals."""

import numpy as np
import pytest

from jaxmed.report.bands import Band, banded_curves

pytestmark = pytest.mark.core


def test_a_band_is_drawn_for_both_themes_and_told_in_words():
    x, middle = np.array([0.01, 0.1, 1.0]), np.array([0.6, 0.7, 0.8])
    bands = {"mae": Band(x, middle, middle - 0.1, middle + 0.1), "scratch": Band(x, middle / 2, middle / 2, middle / 2)}
    figure = banded_curves(bands, xlabel="share of labels", ylabel="AUROC", caption="c", log_x=True)
    assert b"<svg" in figure.light and figure.light != figure.dark
    assert "mae 0.8 (0.7 to 0.9), scratch 0.4 (0.4 to 0.4)" in figure.alt
    again = banded_curves(bands, xlabel="share of labels", ylabel="AUROC", caption="c", log_x=True)
    assert figure.light == again.light
