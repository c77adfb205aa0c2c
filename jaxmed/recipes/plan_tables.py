"""What a plan shows: lines, tables, a verdict, and a page."""

from pathlib import Path
from typing import Any

from jaxmed.config import from_record
from jaxmed.files import expand_home, make_folder, write_json, write_text
from jaxmed.recipes.planned_step import Outcome
from jaxmed.report.page import Note, Section, Table, Text, Tile, render


def line(outcome: Outcome) -> str:
    """Return one line on a layout."""
    layout = outcome.layout
    remat = {None: "", True: ", remat", False: ", no remat"}[layout.remat]
    head = f"mesh {layout.data} x {layout.model}, batch {layout.batch} in {layout.accumulation}{remat}: "
    if outcome.problem:
        return head + outcome.problem
    return head + (
        f"{outcome.total / 1e9:.1f} of {outcome.capacity / 1e9:.1f} GB, {outcome.seconds * 1e3:,.1f} ms a step, "
        f"utilisation {outcome.utilisation:.0%}, {outcome.rate:,.1f} {outcome.unit}/s"
    )


def read_outcomes(record: dict[str, Any]) -> list[Outcome]:
    """Return the outcomes of a plan's record."""
    return [from_record(Outcome, one, "plan") for one in record["outcomes"]]


def print_plan(record: dict[str, Any], options: dict[str, str]) -> None:
    """Print a plan.

    Args:
        record: From `make_plan`.
        options: Changed fields to words of the command line.
    """
    outcomes = read_outcomes(record)
    shown = outcomes[record["best"] if record["best"] is not None else 0]
    print(f"{record['system']} {record['stage']} on {record['topology']}: {record['count']} x {record['chip']}\n")
    for title, rows in tables(record, shown):
        print(title)
        width = max((len(str(name)) for name, _ in rows), default=0)
        print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows), end="\n\n")
    print("Layouts\n" + "\n".join(f"  {line(one)}" for one in outcomes) + "\n")
    print("\n".join([verdict(record, options), "", "Assumptions", *(f"  {text}" for text in record["assumptions"])]))
    print("\n".join(f"  {text}" for text in shown.notes))


def verdict(record: dict[str, Any], options: dict[str, str]) -> str:
    """Return in sentences whether it fits, and what to change where it does not."""
    outcomes, best = read_outcomes(record), record["best"]
    first = outcomes[0]
    if best is None:
        return (
            f"Nothing that was tried fits {record['topology']}. Take more chips, a smaller model or input; "
            f"the closest: {min(outcomes, key=lambda one: one.total or float('inf')).problem}."
        )
    words = " ".join(options[name] for name in outcomes[best].changes if name in options)
    largest = ""
    if record["largest_batch"] is not None:
        how = "compiled" if record["is_confirmed"] else "extrapolated"
        largest = f" Largest batch that fits: {record['largest_batch']:,} ({how})."
    if best == 0:
        return f"It fits{f', with {words}' if words else ''}.{largest}"
    start = "It fits, and is quicker" if first.runs else f"As configured it does not run ({first.problem}). It fits"
    return f"{start} with {words}.{largest}"


def tables(record: dict[str, Any], shown: Outcome) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return titles and rows of what is told of one layout."""
    memory = [(name, f"{size / 1e9:,.3f} GB") for name, size in shown.memory.items()]
    memory += [("at most at once", f"{shown.total / 1e9:,.3f} GB of {shown.capacity / 1e9:,.1f} GB")]
    if not shown.seconds:
        return [("Memory of a chip", memory)]
    done = [
        ("operations of products, a chip", f"{shown.flops / 1e12:,.4g} TFLOP"),
        ("operations as traced, all chips", f"{shown.traced / 1e12:,.4g} TFLOP"),
        ("memory traffic, a chip", f"{shown.bytes / 1e9:,.4g} GB"),
        *((f"messages along {axis}, a chip", f"{size / 1e9:,.4g} GB") for axis, size in shown.sent.items()),
    ]
    messages = [
        (
            f"{kind} along {axis}, {dtype}",
            f"{calls:,.0f} calls, {payload / 1e6:,.1f} MB held, {sent / 1e6:,.1f} MB sent",
        )
        for kind, axis, dtype, calls, payload, sent in shown.messages
    ]
    time_rows = [(name, f"{seconds * 1e3:,.2f} ms") for name, seconds in shown.parts.items()]
    time_rows += [
        ("a step", f"{shown.seconds * 1e3:,.2f} ms ({shown.quickest * 1e3:,.2f} to {shown.slowest * 1e3:,.2f})"),
        ("utilisation of the peak", f"{shown.utilisation:.1%}, bound by {shown.bound}"),
        (f"{shown.unit} a second", f"{shown.rate:,.2f}"),
    ]
    needs = [(name.replace("_", " "), f"{value:,.2f}") for name, value in shown.input.items()]
    return [
        (f"Memory of a chip (mesh {shown.layout.data} x {shown.layout.model})", memory), ("Work of a step", done),
        ("Messages of a step", messages), ("Predicted time", time_rows), ("Input that the hosts must deliver", needs),
    ]  # fmt: skip


def write_page(folder: Path, record: dict[str, Any], options: dict[str, str]) -> Path:
    """Write the figures and the page of a plan into a folder; return the page."""
    outcomes = read_outcomes(record)
    shown = outcomes[record["best"] if record["best"] is not None else 0]
    tiles: list[Tile] = [
        ("Memory of a chip", f"{shown.total / 1e9:.1f} GB", f"of {shown.capacity / 1e9:.1f} GB for a program"),
        ("Step", f"{shown.seconds:.3g} s", f"predicted; {shown.quickest:.3g} to {shown.slowest:.3g} s"),
        ("Utilisation", f"{shown.utilisation:.0%}", "of the published peak of products"),
        ("Rate", f"{shown.rate:.4g}", f"{shown.unit} each second"),
    ]
    rows = [
        (one.layout.data, one.layout.model, one.layout.batch, one.layout.accumulation,
         {None: "none", True: "yes", False: "no"}[one.layout.remat], one.total / 1e9 or None,
         one.seconds or None, one.utilisation or None, one.rate or None, one.problem or "fits")
        for one in outcomes
    ]  # fmt: skip
    columns = ("data", "model", "batch", "parts", "remat", "GB a chip", "s a step", "utilisation", "rate", "verdict")
    kind = "info" if record["best"] is not None else "warning"
    sections = [
        Section("Verdict", [Note(verdict(record, options), kind)]),
        Section("Layouts that were compiled", [Table(columns, rows, "One row for each, the configured one first.")]),
        *(Section(title, [Table(("what", "how much"), found)]) for title, found in tables(record, shown) if found),
        Section("What this assumes", [Text([*record["assumptions"], *shown.notes, record["chip"]])]),
    ]
    title = f"Plan: {record['system']} {record['stage']}"
    subtitle = f"The step of this stage compiled for {record['topology']}, {record['count']} chips, without running it"
    command = f"jaxmed plan {record['system']} {record['stage']} --topology {record['topology']}"
    text = render(
        title, subtitle, tiles, sections, record["config"], {"plan": record["seconds"]}, record["versions"], command
    )  # fmt: skip
    make_folder(folder)
    write_json(folder / "plan.json", record)
    write_text(folder / "report.html", text)
    return folder / "report.html"


def write_outputs(record: dict[str, Any], options: dict[str, str], file: str | None, folder: str | None) -> None:
    """Write what was asked for: the figures as JSON, and a page."""
    if file is not None:
        place = expand_home(file).absolute()
        make_folder(place.parent)
        write_json(place, record)
    if folder is not None:
        print(f"Report: {write_page(expand_home(folder).absolute(), record, options)}")
