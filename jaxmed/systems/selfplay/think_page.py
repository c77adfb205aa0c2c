"""The report of thinking, made from what the run left in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.config import read_record
from jaxmed.report.figures import curves
from jaxmed.report.masks import Panel, mask_panels
from jaxmed.report.page import Block, Figure, Note, Section, Table, Text, write_report
from jaxmed.systems.selfplay.meta_page import plane
from jaxmed.train.run_folder import read_summary

MOST_FILES = 6
MOST_IMAGES = 8
DEBATES = {
    "pixel": "A debate of the trained policy with itself, from where the game began. In every step both players name "
    "voxels to flip; the titles give the scores of both results. The better one becomes the next mask, unless both are "
    "worse than what there is and the rules keep it.",
    "patch": "A patch game of the trained policy with itself, until it was stopped or the figure ends. In every turn "
    "both players name a patch, the second when the first one's is gone; the titles give System I's mean probability "
    "in both. The mask is what has been named so far.",
}
GAMES = {
    "pixel": "The pixel game: two players propose flips of the mask, the verifier judges, the better proposal stays.",
    "patch": "The patch game (RLSP): two players name patches of the image in turn, the one whose patch shows more of "
    "the object wins, and either may end the game. The patches that a game has named are a mask; the verifier judges "
    "it after every move. So masks are made of whole patches (think.patch.game.patches), but for System I's own.",
}
STOPS = {
    "budget": "the budget was used up",
    "time": "the time was up",
    "plateau": "no better mask was found any more",
    "constant verifier": "the verifier gives every mask the same score: this is System I's answer",
}


def write_page(folder: Path) -> None:
    """Write report.html of a think run."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    rows = summary["scans"]
    sections = [Section("Notes", [Note(text) for text in summary["notes"]])]
    if summary["failed"]:
        text = f"{summary['failed']} files failed: see outputs/failed.csv for the reasons."
        sections.insert(0, Section("Failed files", [Note(text, "warning")]))
    sections += [_file_section(folder / "outputs", row, summary["game"]) for row in rows[:MOST_FILES]]
    if rows:
        sections.append(Section("Thinking", [_scores(rows), *_overlaps(rows), _table(rows)]))
    sections.append(Section("How to read this", [Text([
        GAMES[summary["game"]],
        "The score is the verifier's opinion, lowered by System I's evidence against what was changed "
        "(think.prior-weight), and not the truth: thinking finds masks that it likes. Whether they are better depends "
        "on how well the verifier's scores follow Dice, which the report of the adapt stage shows.",
        "Agreement is the share of games whose mask holds a voxel when thinking ends: voxels near a half are those "
        "that the players keep flipping.",
        "The answer is the best mask that was seen, and could have been had at any time.",
    ])]))  # fmt: skip
    write_report(
        folder / "report.html",
        title="Masks, thought about",
        subtitle=f"Self-play reasoning on {len(rows)} files, by the {summary['game']} game",
        summary=_tiles(rows, summary),
        sections=[section for section in sections if section.blocks],
        config=record["config"],
        timing=[(name, seconds, "") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _tiles(rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[tuple[str, object, str]]:
    tiles: list[tuple[str, object, str]] = [("Files", len(rows), f"{summary['failed']} failed")]
    if not rows:
        return tiles
    first, last = (float(np.mean([row[name] for row in rows])) for name in ("first_score", "score"))
    tiles.append(("Score", f"{last:.3f}", f"mean over files; {first:.3f} before thinking"))
    tiles.append(("Steps", f"{sum(row['steps'] for row in rows):,}", f"{sum(row['seconds'] for row in rows):.1f} s"))
    scored = [row for row in rows if "dice" in row]
    if scored:
        first, last = (100 * float(np.mean([row[name] for row in scored])) for name in ("first_dice", "dice"))
        tiles.append(("Dice", f"{last:.1f} %", f"{first:.1f} % before thinking, {len(scored)} files"))
    return tiles


def _file_section(outputs: Path, row: dict[str, Any], game: str) -> Section:
    try:
        with np.load(outputs / f"{row['name']}_thought.npz") as stored:
            arrays = {name: stored[name] for name in stored.files}
    except OSError:
        return Section(row["name"], [Note("The masks are no longer in this folder.", "warning")])
    blocks: list[Block] = [_masks(arrays, row)]
    if "debate_masks" in arrays:
        blocks.append(_debate(arrays, game))
    return Section(row["name"], blocks)


def _masks(arrays: dict[str, np.ndarray], row: dict[str, Any]) -> Figure:
    count = len(arrays["images"])
    shown = np.unique(np.linspace(0, count - 1, min(MOST_IMAGES, count)).round().astype(int))
    panels = []
    for place in shown:
        image, first, last = (arrays[name][place] for name in ("images", "first", "masks"))
        guide = last if last.any() else first
        outlines = {"System I": plane(first, guide), "after thinking": plane(last, guide)}
        if "truth" in arrays:
            outlines["true"] = plane(arrays["truth"][place], guide)
        panels.append(Panel(plane(image, guide), f"score {row['scores'][place]:.2f}", outlines))
        panels.append(Panel(plane(arrays["agreement"][place], guide), "agreement"))
    return mask_panels(
        panels, columns=4, limits=(0.0, 1.0),
        caption=f"Masks before and after {row['steps']:,} steps, and the share of games that hold each voxel; "
        f"{STOPS[row['stop']]}.",
        alt=f"{len(shown)} images with outlines of masks, each beside its map of agreement.",
    )  # fmt: skip


def _debate(arrays: dict[str, np.ndarray], game: str) -> Figure:
    image, masks = arrays["debate_image"], arrays["debate_masks"]
    guide = masks[-1] if masks[-1].any() else np.ones_like(masks[-1])
    panels = []
    for step, is_won in enumerate(arrays["debate_is_won"]):
        values = arrays["debate_values"][step], arrays["debate_rival_values"][step]
        flips = {"first player": arrays["debate_flips"][step], "second player": arrays["debate_rival_flips"][step]}
        title = f"{step + 1}: {values[0]:.3f} {'>' if is_won else '<'} {values[1]:.3f}"
        fills = {name: plane(flip, guide) for name, flip in flips.items()}
        panels.append(Panel(plane(image, guide), title, {"mask": plane(masks[step], guide)}, fills))
    return mask_panels(
        panels, columns=6, limits=(0.0, 1.0),
        caption=DEBATES[game],
        alt=f"{len(panels)} steps of a game: the mask and the voxels that both players would flip.",
    )  # fmt: skip


def _scores(rows: list[dict[str, Any]]) -> Figure:
    series = {
        row["name"]: (np.array(row["curve"]["steps"], float), np.array(row["curve"]["score"])) for row in rows[:8]
    }
    return curves(
        series, xlabel="steps of the game", ylabel="score",
        caption="The score of the best masks so far, mean over the images of a file.",
    )  # fmt: skip


def _overlaps(rows: list[dict[str, Any]]) -> list[Figure]:
    scored = [row for row in rows if "dice" in row][:8]
    if not scored:
        return []
    series = {
        row["name"]: (np.array(row["curve"]["steps"], float), 100 * np.array(row["curve"]["dice"])) for row in scored
    }
    return [curves(
        series, xlabel="steps of the game", ylabel="Dice (%)",
        caption="Dice of the same masks with the true ones. Where the score rises and Dice falls, thinking has found "
        "what the verifier gets wrong.",
    )]  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> Table:
    columns = ["file", "images", "steps", "seconds", "end", "score before", "score"]
    names = ["name", "images", "steps", "seconds", "stop", "first_score", "score"]
    if any("dice" in row for row in rows):
        columns += ["Dice before", "Dice"]
        names += ["first_dice", "dice"]
    return Table(columns, [[row.get(name) for name in names] for row in rows], "One line per file.")
