"""Hints: the nearest word, never the other hemisphere, and lists that end."""

import pytest

from jaxmed.errors import closest, nearest, side_of

pytestmark = pytest.mark.core

# The same region on both sides, as parcellations write it.
FORMS = ["{}_insula", "ctx-{}-insula", "{}.Insula", "insula_{}", "{}-Cerebellum-Cortex", "Area {}"]
SIDES = [("L", "R"), ("l", "r"), ("lh", "rh"), ("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pair", SIDES, ids="/".join)
def test_the_other_hemisphere_is_never_suggested(form, pair):
    left, right = (form.format(side) for side in pair)
    assert (side_of(left), side_of(right)) == ("left", "right")
    for word, other in ((left, right), (right, left)):
        assert closest(word, [other, "thalamus"]) is None
        assert closest(word, [other, word + "1"]) == word + "1"
        assert "did you mean" not in nearest(word, [other])


def test_words_of_no_side_are_suggested_whatever_their_case():
    assert closest("entorhinal", ["L_entorhinal", "insula"]) == "L_entorhinal"
    assert closest("LABEL", ["Lable", "path"]) == "Lable"
    assert side_of("hippocampus") is None and side_of("left_to_right") is None
    assert side_of("LeftThalamus") == "left"


def test_long_lists_say_how_many_more_there_are():
    assert nearest("zzz", [f"a{i}" for i in range(25)]).endswith("a19 and 5 more")
