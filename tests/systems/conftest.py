"""What the tests of whole stages share."""

import pytest

from jaxmed.report import drawing
from jaxmed.report.themes import LIGHT


@pytest.fixture(autouse=True, scope="module")
def draw_once():
    """Draw pages in the light theme alone: the dark one is the same drawing again, and report's tests look at both."""
    encode, last = drawing._encode, []

    def encode_light(draw, theme, form):
        if theme is LIGHT:
            last[:] = [encode(draw, theme, form)]
        return last[0]

    drawing._encode = encode_light
    yield
    drawing._encode = encode
