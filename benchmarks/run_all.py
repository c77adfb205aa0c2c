"""Run every benchmark of this folder, print one table, rewrite RESULTS.md and results/SIZE.jsonl.

Each script runs in a process of its own, one after another, so that none inherits another's
memory, threads or compiled code. Exit code 1 when a script failed; the others' rows are kept.
"""

import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from timing import LOAD_LIMIT, write_atomically

FOLDER = Path(__file__).resolve().parent

INTRODUCTION = """# Benchmark results

Written by `benchmarks/run_all.py`; do not edit. Each section is the last run of that size.
`ratio` is the peer's median time over jaxmed's: above 1 means that jaxmed is faster. `of peak` is
the larger of arithmetic rate over a measured float32 matmul and memory rate over a measured copy.
`once` is what is spent before the first call: compilation for jaxmed, the peer's own preparation
for a peer. An asterisk marks a run that began at a load above 1.5.
"""


@dataclasses.dataclass(frozen=True)
class RunAllConfig:
    """Which benchmarks to run.

    Attributes:
        size: Workload passed to every script.
        peer: Also run the peers.
        only: Scripts to run, by the part of the name after `bench_`; all when empty. Rows of
            scripts that are left out are kept from the last run.
        repeats: Timed calls; each script's own default when absent.
        cores: CPU cores to pin to; all when absent.
        settle_s: Longest wait, before each script, for the load that the last one left behind.
    """

    size: Literal["smoke", "cpu", "gpu", "pod"] = "smoke"
    peer: bool = False
    only: tuple[str, ...] = ()
    repeats: int | None = None
    cores: int | None = None
    settle_s: float = 180.0


def main() -> int:
    """Run, collect, write; returns the exit code."""
    config = tyro.cli(RunAllConfig, description=__doc__)
    scripts = select_scripts(config.only)
    rows, failed = [], []
    for script in scripts:
        if config.size != "smoke":
            settle(config.settle_s)
        print(f"running {script.name}", file=sys.stderr, flush=True)
        found = run_script(script, config)
        if found is None:
            failed.append(script.name)
        else:
            rows += found
    if rows:
        write_results(rows, config)
        print(render_table(rows))
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed or not rows else 0


def select_scripts(only: Sequence[str]) -> list[Path]:
    """List the scripts to run, in order of name.

    Raises:
        ValueError: If a name in `only` has no script.
    """
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(FOLDER.glob("bench_*.py"))}
    unknown = sorted(set(only) - set(scripts))
    if unknown:
        raise ValueError(f"only: expected names among {sorted(scripts)}, got {unknown}")
    return [path for name, path in scripts.items() if not only or name in only]


def settle(limit_s: float) -> None:
    """Wait until the one-minute load is a third below the limit, or the time is over."""
    end = time.monotonic() + limit_s
    while os.getloadavg()[0] > LOAD_LIMIT / 1.5 and time.monotonic() < end:
        time.sleep(2)


def run_script(script: Path, config: RunAllConfig) -> list[dict[str, Any]] | None:
    """Run one script and read its rows; None when it failed."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.jsonl"
        command = [sys.executable, str(script), "--size", config.size, "--json", str(output)]
        command += ["--peer"] if config.peer else []
        command += ["--repeats", str(config.repeats)] if config.repeats else []
        command += ["--cores", str(config.cores)] if config.cores else []
        # The rows come by file; standard output would only repeat them above the table.
        finished = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if finished.returncode or not output.exists():
            return None
        return read_rows(output)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; an absent file has none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def write_results(rows: list[dict[str, Any]], config: RunAllConfig, folder: Path = FOLDER) -> None:
    """Write the rows of this size and its section of RESULTS.md.

    Args:
        rows: New rows; they replace those of the same name.
        config: What was run.
        folder: Holds `RESULTS.md` and `results/`.
    """
    path = folder / "results" / f"{config.size}.jsonl"
    names = {row["name"] for row in rows}
    # A run of everything starts afresh, so that a row that is gone disappears.
    kept = [row for row in read_rows(path) if config.only and row["name"] not in names]
    merged = sorted(kept + rows, key=lambda row: row["name"])
    write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in merged))

    page = folder / "RESULTS.md"
    sections = read_sections(page)
    sections[config.size] = render_section(merged, config)
    ordered = [sections[size] for size in ("smoke", "cpu", "gpu", "pod") if size in sections]
    write_atomically(page, "\n".join([INTRODUCTION, *ordered]))


def read_sections(page: Path) -> dict[str, str]:
    """Split a results page into size and section; an absent page has none."""
    if not page.exists():
        return {}
    parts = page.read_text().split("\n## ")[1:]
    return {part.split()[0]: "## " + part.rstrip("\n") + "\n" for part in parts}


def render_section(rows: Sequence[dict[str, Any]], config: RunAllConfig) -> str:
    """Render one size: date, machine, command, table, accuracy, versions."""
    devices = "; ".join(dict.fromkeys(row["device"] for row in rows))
    versions = {name: version for row in rows for name, version in row["versions"].items()}
    command = f"python benchmarks/run_all.py --size {config.size}"
    command += " --peer" if config.peer else ""
    command += f" --only {' '.join(config.only)}" if config.only else ""
    command += f" --repeats {config.repeats}" if config.repeats else ""
    command += f" --cores {config.cores}" if config.cores else ""
    return (
        f"## {config.size}\n\n"
        f"- date: {datetime.date.today().isoformat()}\n"
        f"- machine: {devices}\n"
        f"- command: `{command}`\n"
        f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}\n\n"
        f"{render_table(rows)}\n"
    )


def render_table(rows: Sequence[dict[str, Any]]) -> str:
    """Render rows as one Markdown table."""
    header = ["name", "workload", "implementation", "median", "min - max", "n", "once", "of peak"]
    header += ["ratio", "accuracy"]
    cells = [header, ["---"] * len(header), *(render_row(row) for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def render_row(row: dict[str, Any]) -> list[str]:
    """Render one row's cells, in the order of the header."""
    unit = row["unit"]
    mark = "*" if row["load"] > LOAD_LIMIT else ""
    accuracy = ", ".join(f"{name} {value:.3g}" for name, value in (row["accuracy"] or {}).items())
    return [
        row["name"],
        row["workload"],
        row["implementation"],
        f"{row['median']:.3g} {unit}{mark}",
        f"{row['min']:.3g} - {row['max']:.3g}",
        str(row["n"]),
        _or_dash(row["compile_s"], "{:.3g} s"),
        _or_dash(row["fraction_of_peak"], "{:.1%}"),
        _or_dash(row["ratio_to_peer"], "{:.2f}"),
        accuracy or "-",
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    sys.exit(main())
