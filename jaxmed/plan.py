"""jaxmed plan: whether a stage's step fits a machine, and how quick it will be there, without the machine.

  jaxmed plan SYSTEM STAGE --topology v5p:4x4x4 [--preset paper] [--json FILE] [--out FOLDER] [--limit N] [options]

The real step of the stage is compiled ahead of time, here, for the machine: v5p:4x4x4, v5e:16x16, v6e:16x16 (with the
libtpu wheel, extra plan), h100x8, h200x8 (as a program of so many CPU devices) or cpu:8. What is printed: memory of a
chip by part, operations, bytes, messages by axis of the mesh, predicted time and utilisation with what they assume, the
best of several layouts, the largest batch that fits, and what the hosts must deliver. No data and no weights are read.

  --topology T   the machine
  --json FILE    the figures as JSON
  --out FOLDER   a page and the figures
  --limit N      layouts that are compiled at most (6); 1 looks at the configuration alone
  options        of the stage: jaxmed SYSTEM STAGE --help. Sizes come from them, never from --weights
"""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxmed.config import from_record, to_record, walk
from jaxmed.errors import InputError
from jaxmed.files import read_record, write_json
from jaxmed.planning.topologies import Topology, find_topology

LIMIT = 6
INSTALL = "pip install 'jaxmed[plan]'"


@dataclasses.dataclass(frozen=True)
class Found:
    """A plan.

    Attributes:
        system: First word of the stage.
        stage: Its second word.
        topology: The machine, as it was written.
        chip: In words, with the source of its figures.
        count: Chips.
        config: Of the stage, as it was asked for.
        outcomes: What was compiled, in order; the first is the configuration that was asked for, as near as it divides.
        best: Number of the best one that runs; None where none does.
        largest_batch: Largest batch of the best layout that fits, and whether it was compiled; None where unknown.
        is_confirmed: Whether that batch was compiled too.
        assumptions: Of the predictions.
        versions: Of the software.
        seconds: That the plan took.
    """

    system: str
    stage: str
    topology: str
    chip: str
    count: int
    config: Any
    outcomes: tuple[dict[str, Any], ...]
    best: int | None
    largest_batch: int | None
    is_confirmed: bool
    assumptions: tuple[str, ...]
    versions: dict[str, str]
    seconds: float


def make_plan(
    system: str, stage: str, config: Any, topology: Topology, limit: int = LIMIT, seconds: float | None = None
) -> dict[str, Any]:
    """Compile and count in a process of its own, whose devices are set before jax starts.

    Args:
        system: First word of the stage.
        stage: Its second word.
        config: Its configuration.
        topology: The machine.
        limit: Layouts that are compiled at most.
        seconds: After which the process is killed; None waits as long as it takes.

    Returns:
        The record of a `Found`.

    Raises:
        InputError: The machine needs a package that is not here, the stage refuses, or the compiler was killed.
    """
    if topology.kind == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu", "the wheel that compiles for TPUs", "none", INSTALL)
    with tempfile.TemporaryDirectory(prefix="jaxmed-plan-") as place:
        request, result = Path(place) / "request.json", Path(place) / "result.json"
        asked = {"system": system, "stage": stage, "config": to_record(config), "topology": topology.word}
        write_json(request, asked | {"limit": limit})
        command = [sys.executable, "-m", "jaxmed.plan", str(request), str(result)]
        try:
            done = subprocess.run(command, env=child_environment(topology), check=False, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise InputError("plan", f"a compiled step within {seconds:g} s", "none", "take --limit 1") from error
        found = read_record(result) if result.exists() else {}
    if "error" in found:
        raise InputError(*found["error"])
    if done.returncode or not found:
        advice = (
            "see the lines above; a killed compiler lacks memory: take a smaller model or fewer chips, or --limit 1"
        )
        raise InputError("plan", "a compiled step", f"a compiler that ended with {done.returncode}", advice)
    return found


def child_environment(topology: Topology) -> dict[str, str]:
    """Return the environment in which jax has the devices that a machine is planned with, and no others."""
    count = 1 if topology.kind == "tpu" else topology.count
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    # A stored program may be that of another road: convolutions choose theirs by whether programs are stored.
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}".strip(),
        "TPU_SKIP_MDS_QUERY": "1",
    }


# The process of its own ----------------------------------------------------------------------------------------------


def work(request: Path, result: Path) -> int:
    """Read a request, make its plan and write it; a mistake of the user's is written too."""
    from jaxmed.recipes.stage import load_stage
    from jaxmed.train.log import keep_speaking

    record = read_record(request)
    module = load_stage(record["system"], record["stage"])
    config = from_record(module.Config, record["config"], str(request))
    try:
        with keep_speaking():
            found = search(record["system"], record["stage"], module, config, record["topology"], record["limit"])
    except InputError as error:
        write_json(result, {"error": [error.where, error.expected, error.found, error.advice]})
        return 2
    write_json(result, to_record(found))
    return 0


def search(system: str, stage: str, module: Any, config: Any, word: str, limit: int) -> Found:
    """Compile layouts until some fit and the limit is reached, and choose."""
    from jaxmed.planning.estimate import ASSUMPTIONS, CPU_PROGRAM
    from jaxmed.planning.layouts import candidates, first_layout
    from jaxmed.recipes.plan_tables import line
    from jaxmed.recipes.planned_step import Outcome, asked_layout, evaluate
    from jaxmed.versions import software_versions

    began, topology = time.monotonic(), find_topology(word)
    devices, rates = find_devices(topology), find_rates(topology, config)
    asked, can_accumulate = asked_layout(config)
    outcomes: list[Outcome] = []
    for layout in candidates(first_layout(asked, topology.count), can_accumulate):
        # What nothing fits into is looked at twice as long.
        if len(outcomes) >= (limit if limit == 1 or any(one.runs for one in outcomes) else 2 * limit):
            break
        outcomes.append(evaluate(module, config, layout, topology, devices, rates))
        print(line(outcomes[-1]), file=sys.stderr, flush=True)
    running = [number for number, one in enumerate(outcomes) if one.runs]
    best = max(running, key=lambda number: outcomes[number].rate, default=None)
    largest, is_confirmed = None, False
    if best is not None and limit > 1:
        largest, is_confirmed = find_largest(module, config, outcomes[best], topology, devices, rates)
    chip = "CPU devices that share this machine, measured here"
    if topology.chip is not None:
        chip = f"{topology.chip.name} ({topology.chip.source})"
    assumptions = (*ASSUMPTIONS, CPU_PROGRAM) if topology.kind == "gpu" else ASSUMPTIONS
    return Found(
        system, stage, word, chip, topology.count, config, tuple(to_record(one) for one in outcomes), best, largest,
        is_confirmed, assumptions, software_versions(), time.monotonic() - began,
    )  # fmt: skip


def find_largest(
    module: Any, config: Any, best: Any, topology: Topology, devices: Any, rates: Any
) -> tuple[int | None, bool]:
    """Return the largest batch of a layout that fits, by a straight line, and whether a step of it was compiled."""
    from jaxmed.planning.estimate import largest_batch
    from jaxmed.recipes.planned_step import evaluate

    layout, multiple = best.layout, best.layout.data * best.layout.accumulation
    more = evaluate(
        module, config, dataclasses.replace(layout, batch=layout.batch + multiple), topology, devices, rates
    )  # fmt: skip
    if not more.total:  # refused, or so large that the compiler did not tell
        return layout.batch, True
    points = (layout.batch, best.total), (more.layout.batch, more.total)
    largest = max(largest_batch(*points, best.capacity, multiple), layout.batch)
    if largest <= layout.batch:
        return layout.batch, True
    last = evaluate(module, config, dataclasses.replace(layout, batch=largest), topology, devices, rates)
    if last.runs:
        return largest, True
    if last.total:  # the line was too flat
        closer = largest_batch(points[0], (largest, last.total), best.capacity, multiple)
        return max(min(closer, largest - multiple), layout.batch), False
    return max(more.layout.batch if more.runs else 0, layout.batch), True


def find_devices(topology: Topology) -> list[Any]:
    """Return the devices that are compiled for.

    Raises:
        InputError: The compiler knows no such machine.
    """
    import jax

    if topology.kind != "tpu":
        return jax.devices("cpu")[: topology.count]
    from jax.experimental import topologies

    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology.word).devices)
    except (RuntimeError, ImportError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError("topology", "one that libtpu knows", f"{topology.word} ({reason})", INSTALL) from error
    if len(devices) != topology.count:
        raise InputError("topology", f"{topology.count} devices", f"{len(devices)} of {topology.word}")
    return devices


def find_rates(topology: Topology, config: Any) -> Any:
    """Return the rates of one chip: published, or measured here where virtual devices share this machine."""
    from jaxmed.planning.estimate import Rates, rates_of

    if topology.chip is not None:
        types = {getattr(record, "dtype", "") for record in walk(config)}
        return rates_of(topology.chip, "bfloat16" if "bfloat16" in types else "float32")
    from jaxmed.train.announce import copy_rate, machine_memory, matmul_rate

    share = 1 / topology.count
    return Rates(matmul_rate() * share, copy_rate() * share, copy_rate() * share, machine_memory() * share, True)


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), Path(sys.argv[2])))
