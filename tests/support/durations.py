"""What the suite costs, by folder and by system: `scripts/test --durations`.

Seconds of wall time in setup, test and teardown, summed over all workers; compilation is in them.
"""

from collections import defaultdict
from pathlib import Path, PurePosixPath

SYSTEMS = [place.parent.name for place in Path(__file__).parents[2].glob("jaxmed/systems/*/__init__.py")]
SHOWN = 25
seconds: dict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report):
    seconds[report.nodeid] += report.duration


def group(node: str) -> tuple[str, str]:
    """Return the folder of a test, and the system that it belongs to ("shared" for none)."""
    path = PurePosixPath(node.split("::")[0])
    names = [system for system in SYSTEMS if system in node.replace("_", " ").lower()]
    return str(path.parent), names[0] if names else "shared"


def pytest_terminal_summary(terminalreporter):
    folders, systems, files = defaultdict(float), defaultdict(float), defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for node, cost in seconds.items():
        folder, system = group(node)
        folders[folder] += cost
        systems[system] += cost
        files[node.split("::")[0]] += cost
        for name in (folder, system, node.split("::")[0]):
            counts[name] += 1
    write = terminalreporter.write_line
    for title, costs in (("folder", folders), ("system", systems), ("file", files), ("test", seconds)):
        write(f"\nSeconds by {title}")
        for name, cost in sorted(costs.items(), key=lambda item: -item[1])[:SHOWN]:
            write(f"{cost:8.1f}  {f'{counts[name]:5d} tests  ' if name in counts else ''}{name}")
