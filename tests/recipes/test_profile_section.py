"""The page of a profiled run."""

import dataclasses

import pytest

from jaxmed.files import write_json
from jaxmed.recipes.profile_section import profile_section
from jaxmed.report.page import render
from jaxmed.train.profile import KINDS, SUMMARY, Operation, Profile

pytestmark = pytest.mark.core


def test_a_page_says_where_the_time_of_profiled_steps_went(tmp_path):
    assert profile_section(tmp_path) == []
    shares = dict(zip(KINDS, (0.5, 0.125, 0.25, 0.1, 0.025), strict=True))
    profile = Profile(0.25, 2, shares, (Operation("dot.17", "compute", 0.2, 0.8, 6),))
    write_json(tmp_path / "profile" / SUMMARY, dataclasses.asdict(profile))
    page = render("A run", "", [], profile_section(tmp_path), {}, {}, {}, "jaxmed")
    for words in ("Profile", "input wait", "12.5%", "dot.17", "80.0%", "mean over 2 device(s)", "ui.perfetto.dev"):
        assert words in page
    assert profile.words()[0].startswith("Profile of 0.2 s: compute 50.0%, collectives 12.5%")
