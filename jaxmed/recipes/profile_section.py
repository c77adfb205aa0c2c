"""The part of a page that says where the time of profiled steps went."""

from pathlib import Path

from jaxmed.config import from_record
from jaxmed.files import read_record
from jaxmed.report.page import Section, Table, Text
from jaxmed.train.profile import KINDS, SUMMARY, Profile


def profile_section(run: Path) -> list[Section]:
    """Return the shares and the longest operations of a run that was profiled; nothing where none was."""
    place = run / "profile" / SUMMARY
    if not place.exists():
        return []
    profile = from_record(Profile, read_record(place), str(place))
    shares = Table(
        ("", "Share"),
        [(kind, f"{profile.shares[kind]:.1%}") for kind in KINDS],
        f"Of {profile.seconds:.3g} s, the mean over {profile.devices} device(s). A moment counts once, for the first "
        "of these that a device is at; collectives and memory are therefore what nothing computes behind. In the rest "
        "no device works: the host compiles, prepares or waits.",
    )
    rows = [(one.name, one.kind, one.seconds, f"{one.share:.1%}", one.count) for one in profile.operations]
    longest = Table(
        ("Operation", "Kind", "Seconds", "Share", "Runs"), rows,
        "The longest operations, on all devices together, without the time of operations inside them.",
    )  # fmt: skip
    told = "The trace is in RUN/profile: TensorBoard reads the folder, and ui.perfetto.dev the .trace.json.gz in it."
    return [Section("Profile", [shares, longest, Text([told])])]
