"""Plans of the largest models on a TPU v5p of 64 chips, a TPU v6e of 256 and eight H200: whether each fits, and how.

For every pair `jaxmed plan` compiles the real step as published, and where that does not divide or fit, other meshes,
parts of a batch and recomputation; the table says what was changed. TPUs need the libtpu wheel (extra `plan`), nothing
needs an accelerator. A pair takes gigabytes of memory, and minutes on two cores: one that takes longer than --seconds
is told as not finished. Finished pairs are kept in --json and not planned again. With --limit 1 the configured layout
alone is compiled, and others where it does not run; the largest batch is then not looked for.

    python benchmarks/plan_large.py --json plans.json --table benchmarks/results/plans.md
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import tyro
from timing import write_atomically

from jaxmed.errors import InputError
from jaxmed.models.dino import dinov2, dinov3
from jaxmed.plan import make_plan
from jaxmed.planning.topologies import find_topology
from jaxmed.recipes.plan_tables import read_outcomes, verdict
from jaxmed.recipes.pretrain_dino import released_22k
from jaxmed.systems.brainfm.stages import train as brainfm_train
from jaxmed.systems.cocolit.stages import translate as cocolit_translate
from jaxmed.systems.retfound.stages import adapt as retfound_adapt
from jaxmed.systems.retfound.stages import pretrain as retfound_pretrain
from jaxmed.systems.tangerine.stages import pretrain as tangerine_pretrain

MACHINES = ("v5p:4x4x4", "v6e:16x16", "h200x8")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is planned.

    Attributes:
        only: Models, by the names of the table; all when empty.
        machines: Machines, as of jaxmed plan.
        limit: Layouts that are compiled at most for a pair.
        seconds: That a pair may take.
        json: File that keeps the figures of every pair.
        table: File that gets the table, as Markdown.
    """

    only: tuple[str, ...] = ()
    machines: tuple[str, ...] = MACHINES
    limit: int = 6
    seconds: float = 1800.0
    json: Path = Path("plans.json")
    table: Path | None = None


def models() -> dict[str, tuple[str, str, Any]]:
    """Return system, stage and configuration of what is planned, by name."""
    return {
        "tangerine pretrain, ViT-L, 256^3": ("tangerine", "pretrain", tangerine_pretrain.paper()),
        "retfound pretrain, DINOv2 ViT-g": ("retfound", "pretrain", giant_dino()),
        "retfound adapt, DINOv2 ViT-g": (
            "retfound", "adapt", adaptation(dinov2("g", image_size=(224, 224), remat=True, scan=True))
        ),
        "retfound adapt, DINOv3 7B": ("retfound", "adapt", adaptation(dinov3("7B", remat=True, scan=True))),
        "cocolit translate, m = 64": (
            "cocolit", "translate", dataclasses.replace(cocolit_translate.paper(), dtype="bfloat16")
        ),
        "brainfm train, 160^3": ("brainfm", "train", brainfm_train.paper()),
    }  # fmt: skip


def giant_dino() -> Any:
    """Return the pre-training of ViT-g/14 by DINOv2's recipe for 22 thousand classes, 1,024 images a step."""
    dino, train = released_22k()
    encoder = dinov2("g", image_size=(224, 224), drop_path_rate=0.4, drop_path_uniform=True, remat=True, scan=True)
    config = retfound_pretrain.paper()
    loader = dataclasses.replace(config.train.loader, batch_size=1024)
    return dataclasses.replace(
        config, method="dinov2", dino=dataclasses.replace(dino, encoder=encoder), dino_optimizer=train.optimizer,
        train=dataclasses.replace(config.train, loader=loader, accumulation=1),
    )  # fmt: skip


def adaptation(encoder: Any) -> Any:
    """Return the official fine-tuning with another encoder."""
    return dataclasses.replace(retfound_adapt.paper(), encoder=dataclasses.replace(encoder, drop_path_rate=0.2))


def main() -> int:
    """Plan every pair, keep the figures, write the table."""
    options = tyro.cli(Options, description=__doc__)
    known = json.loads(options.json.read_text()) if options.json.exists() else {}
    for name, (system, stage, config) in models().items():
        for word in options.machines:
            key = f"{name} on {word}"
            if (options.only and name not in options.only) or key in known:
                continue
            print(key, file=sys.stderr, flush=True)
            try:
                known[key] = plan(system, stage, config, word, options)
            except InputError as error:
                print(f"{key}: {error}", file=sys.stderr, flush=True)
                known[key] = {"problem": str(error)}
            write_atomically(options.json, json.dumps(known, indent=1) + "\n")
    text = "\n".join([*HEAD, *(row(key, record) for key, record in known.items())]) + "\n"
    print(text)
    if options.table is not None:
        write_atomically(options.table, text)
    return 0


def plan(system: str, stage: str, config: Any, word: str, options: Options) -> dict[str, Any]:
    """Plan a pair: the configured layout first, and others where it does not run or more are asked for."""
    found = make_plan(system, stage, config, find_topology(word), options.limit, options.seconds)
    if options.limit == 1 and found["best"] is None:
        found = make_plan(system, stage, config, find_topology(word), 2, options.seconds)
    return found


HEAD = (
    "| model and machine | mesh | batch, parts, remat | GB a chip: parameters, optimiser, temporaries; of "
    "| TFLOP a chip | GB sent a chip by axis | step | utilisation | records/s | largest batch | input | plan took "
    "| verdict |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def row(key: str, record: dict[str, Any]) -> str:
    """Return the row of a pair: its best layout, or the first where none fits."""
    if "problem" in record:
        return f"| {key} |" + " |" * 11 + f" {record['problem']} |"
    outcomes = read_outcomes(record)
    one = outcomes[record["best"] if record["best"] is not None else 0]
    memory = one.memory
    parts = [memory.get(name, 0.0) / 1e9 for name in ("parameters", "optimiser", "activations and temporaries")]
    sent = ", ".join(f"{axis} {size / 1e9:.2f}" for axis, size in one.sent.items()) or "none"
    fields = {name: name for outcome in outcomes for name in outcome.changes}
    options = {name: f"{name} {outcomes[record['best'] or 0].changes.get(name, '')}" for name in fields}
    layout = one.layout
    cells = (
        key, f"{layout.data} x {layout.model}", f"{layout.batch}, {layout.accumulation}, {layout.remat}",
        f"{parts[0]:.2f}, {parts[1]:.2f}, {parts[2]:.2f}; {one.total / 1e9:.1f} of {one.capacity / 1e9:.1f}",
        f"{one.flops / 1e12:.3g}", sent, f"{one.seconds:.3g} s ({one.quickest:.3g} to {one.slowest:.3g})",
        f"{one.utilisation:.0%}", f"{one.rate:.4g} {one.unit}", str(record["largest_batch"] or "not looked for"),
        f"{one.input.get('megabytes_per_second', 0.0):.4g} MB/s", f"{record['seconds']:.0f} s",
        verdict(record, options),
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
