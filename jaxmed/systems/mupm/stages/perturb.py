"""Stage `jaxmed mupm perturb`: questions about perturbed images and records, for any model to answer."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.config import Bounds, Number, Seed, checked
from jaxmed.data.cine import montage, read_cine
from jaxmed.data.scans import Record, find_records
from jaxmed.errors import InputError, listed, nearest
from jaxmed.files import read_record, require_given
from jaxmed.io.images import read_image, write_png
from jaxmed.io.tables import write_table
from jaxmed.recipes.map_files import map_files, write_failed
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.page import Block, Note, Section, Table, Text
from jaxmed.report.pictures import picture_row
from jaxmed.synthesis.image_moves import FACTORS, ImageConfig, hold_still, perturb_images
from jaxmed.synthesis.phantoms.cine import CONDITIONS, write_cohort
from jaxmed.synthesis.record_texts import (
    FACTS,
    TEMPLATES,
    facts_of,
    facts_said,
    known_fields,
    parse,
    question,
    render,
)
from jaxmed.systems.mupm.branches import index_layout
from jaxmed.train.run_folder import RunFolder, start

TRIES_FAILED_AGAIN = True
QUESTION = "Which of these conditions will be diagnosed within the next 5 years?"
COLUMNS = ("case", "subject", "label", "branch", "draw", "index", "factor", "image", "text", "options")
SHOWN = 6


@dataclasses.dataclass(frozen=True)
@checked
class RecordData:
    """Cases.

    Attributes:
        manifest: Table with path (an image or cine: NIfTI, PNG, .npy, .npz), facts (age, sex, bmi or weight in kg and
            height in m, systolic, diastolic, pulse, symptoms, history, smoking, alcohol, findings) and where they are
            known subject, label, question and options (separated by |); further columns stay with the case.
        synthetic: Beating hearts with records, where no table is given; 0 asks for one.
    """

    manifest: Path | None = None
    synthetic: Number = 0


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Perturb images and records.

    Attributes:
        data: Cases.
        image: How images are perturbed.
        draws: Perturbations per branch.
        repeats: Identical questions beside them, to measure the noise of decoding (V_0).
        without: What is left out in turn, for `redundancy`: fields of the record (person, bmi, pressure, symptoms,
            history, habits, findings), or parts of the perturbation of images (phase, affine, noise), held still.
        shared_draws: Whether the joint branch has the very perturbations of the other two; only then does the empirical
            covariance mean something. The release draws them anew.
        question: Asked where the table has none; with a horizon in years, or about the present.
        options: Where the table has none.
        slices: Slices of a volume that are shown beside one another.
        seed: Seed of all perturbations.
    """

    data: RecordData = RecordData()
    image: ImageConfig = ImageConfig()
    draws: Annotated[int, Bounds(2, 1_000)] = 20
    repeats: Number = 0
    without: tuple[str, ...] = ()
    shared_draws: bool = False
    question: str = QUESTION
    options: tuple[str, ...] = CONDITIONS
    slices: Annotated[int, Bounds(1, 64)] = 9
    seed: Seed = 0

    def __post_init__(self) -> None:
        known = (*TEMPLATES, *FACTORS)
        for name in self.without:
            if name not in known:
                raise InputError("without", f"one of {listed(known, 9)}", f"'{name}'", nearest(name, known))
        if len(set(self.without)) < len(self.without):
            raise InputError("without", "each factor once", listed(self.without))
        if not 2 <= len(self.options) <= 26:
            raise InputError("options", "2 to 26 options", len(self.options))


def paper() -> Config:
    """Your cases, twenty perturbations of each kind within the released ranges."""
    return Config()


def smoke() -> Config:
    """In seconds: your cases, or three beating hearts, with four perturbations of each kind."""
    return Config(RecordData(synthetic=3), draws=4, repeats=2, without=("bmi", "affine"))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was written.

    Attributes:
        cases: That were perturbed.
        failed: That could not be read.
        questions: For a model to answer.
        calls: Of them per case.
        example: The first case's record and question, as stored and twice in other words.
        notes: What a reader should know.
    """

    cases: int
    failed: int
    questions: int
    calls: int
    example: tuple[str, ...]
    notes: tuple[str, ...]


class Question(NamedTuple):
    """One question to a model: which image (its number among the case's) and which words."""

    branch: str
    draw: int
    factor: str
    image: int
    text: str


def run(config: Config, folder: RunFolder) -> int | None:
    """Read every case, perturb image and record, write pictures and the manifest."""
    clock, manifest = Clock(), config.data.manifest
    if manifest is None and config.data.synthetic:
        start(folder)
        manifest = write_cohort(folder.path / "inputs" / "cases", config.seed, config.data.synthetic)
    manifest = require_given(manifest, "data.manifest")
    records, notes = find_records(manifest, None, kinds=("nifti", "picture", "array"))
    if not any(known_fields(facts_of(record.row)) for record in records):
        raise InputError(manifest, f"facts in columns such as {listed(FACTS)}", listed(records[0].row))
    log = begin(folder, notes)
    moves = {"": config.image} | {name: hold_still(config.image, name) for name in config.without if name in FACTORS}
    programs = {
        name: jax.jit(functools.partial(perturb_images, config=move), static_argnums=2) for name, move in moves.items()
    }

    def work(number: int, record: Record, tell) -> dict[str, object]:
        return _perturb_case(number, record, config, programs, folder.outputs)

    done = map_files(
        records, work, folder.outputs, log, "Perturbing", "cases", lambda row: {"questions": len(row["questions"])}
    )
    write_failed(folder.outputs, done.failed)
    clock.lap("read, perturb and write")
    rows = [question for row in done.rows for question in row["questions"]]
    write_table(folder.outputs / "questions.csv", tuple(rows[0]) if rows else COLUMNS, rows)
    example = tuple(row["text"] for row in rows if row["branch"] == "text" and not row["factor"])[:3]
    summary = Summary(
        len(done.rows), len(done.failed), len(rows), len(rows) // max(len(done.rows), 1), example, tuple(notes)
    )
    finish(folder, config, summary, clock, page)
    return 1 if done.failed else None


def plan(
    rng: np.random.Generator, facts: dict[str, str], asked: str, options: str, config: Config
) -> Iterator[Question]:
    """Yield the questions about one case in the order of the release, then identical ones and those without a factor.

    Image 0 is the unperturbed one, 1 to R belong to the image branch, R + 1 to 2 R to the joint branch, and further R
    to each factor of images that is held still, in the order of the configuration.
    """
    draws = config.draws

    def words(rng: np.random.Generator | None, without: tuple[str, ...] = ()) -> str:
        return f"{render(rng, facts, without)}\n{question(rng, asked, options)}"

    stored = words(None)
    texts = [words(rng) for _ in range(draws)]
    again = texts if config.shared_draws else [words(rng) for _ in range(draws)]
    for branch, draw in index_layout(draws):
        if draw == 0:
            yield Question(branch, 0, "", 0, stored)
        elif branch == "image":
            yield Question(branch, draw, "", draw, stored)
        elif branch == "text":
            yield Question(branch, draw, "", 0, texts[draw - 1])
        else:
            yield Question(branch, draw, "", draw if config.shared_draws else draws + draw, again[draw - 1])
    for repeat in range(1, config.repeats + 1):
        yield Question("repeat", repeat, "", 0, stored)
    last = 2 * draws
    for factor in config.without:
        if factor in known_fields(facts) and len(known_fields(facts)) > 1:
            for draw in range(1, draws + 1):
                yield Question("text", draw, factor, 0, words(rng, (factor,)))
        elif factor in FACTORS:
            for draw in range(1, draws + 1):
                yield Question("image", draw, factor, last + draw, stored)
            last += draws


def _perturb_case(number: int, record: Record, config: Config, programs, outputs: Path) -> dict[str, object]:
    cine, spacing = read_cine(record.path)
    facts = facts_of(record.row)
    options = record.row.get("options", "").split("|") if record.row.get("options") else list(config.options)
    block = "\n".join(f"{chr(ord('A') + place)}. {name.strip()}" for place, name in enumerate(options))
    rng = np.random.default_rng([config.seed, number])
    asked = record.row.get("question") or config.question
    questions = list(plan(rng, facts, asked, block, config))
    for one in questions:
        if not one.factor and parse(one.text) != facts_said(facts):
            raise InputError(record.path, "facts that can be read back from their sentences", f"{facts}")
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    moved = [np.asarray(programs[""](jax.random.split(key, 2 * config.draws), jnp.asarray(cine), spacing))]
    for place, program in enumerate([program for name, program in programs.items() if name], 1):
        keys = jax.random.split(jax.random.fold_in(key, place), config.draws)
        moved.append(np.asarray(program(keys, jnp.asarray(cine), spacing)))
    pictures = np.concatenate(moved)
    used = sorted({one.image for one in questions})
    for place in used:
        image = cine[0] if place == 0 else pictures[place - 1]
        if image.max() == image.min():
            raise InputError(record.path, "a picture after perturbation", "one value everywhere", "move it less")
        write_png(outputs / "images" / record.name / f"{place:03d}.png", montage(image, config.slices))
    rows = [
        {
            "case": record.name, "subject": record.row.get("subject") or record.name,
            "label": record.row.get("label", ""), "branch": one.branch, "draw": one.draw, "index": index,
            "factor": one.factor, "image": f"images/{record.name}/{one.image:03d}.png", "text": one.text,
            "options": "|".join(name.strip() for name in options),
        } | {name: cell for name, cell in record.row.items() if name not in ("path", *COLUMNS)}
        for index, one in enumerate(questions)
    ]  # fmt: skip
    return {"questions": rows}


def page(run: Finished[Config, Summary]) -> Page:
    """Show perturbed images and records of the first case."""
    summary, blocks = run.summary, []
    records = sorted(path for path in run.outputs.glob("*.json") if path.name != "summary.json")
    if records:
        rows = read_record(records[0])["questions"]
        names = list(dict.fromkeys(row["image"] for row in rows))[:SHOWN]
        titles = ["unperturbed", *(f"perturbed {place}" for place in range(1, len(names)))]
        pictures = {title: read_image(run.outputs / name) for title, name in zip(titles, names, strict=True)}
        caption = "The first case: unperturbed, then moved in mm about the centre, in another phase, with noise."
        blocks: list[Block] = [picture_row(pictures, caption=caption)]
    words = Table(("", "Record and question"), list(zip(("stored", "draw 1", "draw 2"), summary.example, strict=False)),
                  "The same facts in other words.")  # fmt: skip
    text = Text([
        "outputs/questions.csv has a row per question: image, text and options. jaxmed mupm answer --questions asks a "
        "model; or ask any other, write its answer into a column 'answer' or the probabilities of its options into "
        "columns p_OPTION, and give the table to jaxmed mupm propagate.",
    ])  # fmt: skip
    return Page(
        "Perturbed images and records",
        f"{summary.cases} cases, {run.config.draws} perturbations of image, of text and of both",
        [
            ("Cases", summary.cases, f"{summary.failed} failed"),
            ("Questions", summary.questions, f"{summary.calls} per case"),
        ],
        [Section("Images", blocks), Section("Words", [words]),
         Section("How to go on", [*(Note(note) for note in summary.notes), text])],
    )  # fmt: skip
