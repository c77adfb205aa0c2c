"""System I on disk: the parameters of both networks, the frame in which they see images, and the temperature."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxmed.config import from_record, to_record
from jaxmed.errors import InputError
from jaxmed.io.weights_files import load_parameters
from jaxmed.systems.selfplay.frames import FrameConfig
from jaxmed.systems.selfplay.system_one import SystemOne, SystemOneConfig
from jaxmed.train.checkpoint import export_parameters

FAMILY = "selfplay"


class Trained(NamedTuple):
    """What a run of meta-train or adapt handed on.

    Attributes:
        system: Both networks.
        frame: How files become their images.
        task: What it was adapted to; empty where it was not.
        path: Where it was read.
    """

    system: SystemOne
    frame: FrameConfig
    task: str
    path: Path


def write_system_one(folder: Path, system: SystemOne, frame: FrameConfig, task: str = "", **further: Any) -> None:
    """Write System I for other stages.

    Args:
        folder: outputs/system1 of a run.
        system: Both networks.
        frame: How files become their images.
        task: What it was adapted to.
        **further: What else stands in the record.
    """
    record = {
        "family": FAMILY,
        "config": to_record(system.config),
        "frame": to_record(frame),
        "temperature": float(system.temperature),
        "task": task,
    }
    export_parameters(folder, system.params, record | further)


def load_for(weights: Path | None, frame: FrameConfig | None) -> tuple[Trained, FrameConfig]:
    """Read System I, and return how files become its images: as its own, or as a user wants it.

    Raises:
        InputError: There are no weights, or images would have another size.
    """
    if weights is None:
        raise InputError("weights", "a run of meta-train", "nothing", "give --weights, or try --preset smoke")
    trained = load_system_one(weights)
    frame = frame or trained.frame
    if frame.size != trained.frame.size:
        raise InputError("frame.size", f"that of the weights, {trained.frame.size}", frame.size)
    return trained, frame


def load_exported(
    path: Path, name: str, family: str, expected: str, advice: str
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Read what a run exported to outputs/NAME, or such a folder itself: parameters, record, and the record's place.

    Raises:
        InputError: The place holds nothing of the kind, or weights of another family.
    """
    places = [place for place in (path / "outputs" / name, path) if (place / "record.json").exists()]
    if not places:
        raise InputError(path, expected, "nothing of the kind" if path.exists() else "nothing", advice)
    params, record = load_parameters(places[0])
    if record.get("family") != family:
        raise InputError(path, expected, f"weights of {record.get('family')}", advice)
    return params, record, str(places[0] / "record.json")


def load_system_one(path: Path) -> Trained:
    """Read System I from a run of meta-train or adapt.

    Raises:
        InputError: The place holds no such run, or weights of something else.
    """
    params, record, where = load_exported(path, "system1", FAMILY, "a run of meta-train or adapt", "check --weights")
    config = from_record(SystemOneConfig, record["config"], where)
    frame = from_record(FrameConfig, record["frame"], where)
    missing = {"generator", "verifier"} - set(params)
    if missing:
        raise InputError(where, "parameters of generator and verifier", f"no {' and no '.join(sorted(missing))}")
    return Trained(SystemOne(config, params, float(record["temperature"])), frame, record["task"], path)
