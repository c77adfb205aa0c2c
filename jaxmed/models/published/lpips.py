"""Weights of LPIPS by SqueezeNet: torchvision's features and the linear layers that the authors fitted.

One file holds both: the state of `lpips.LPIPS(net="squeeze")` (net.sliceK.N.*, linK.*), or torchvision's names
(features.N.*) with the linear layers (linK.model.1.weight) beside them.

Source: Zhang et al., arXiv:1801.03924, official code, version 0.1; torchvision, squeezenet1_1.
"""

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from jaxmed.arrays.task import Task
from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Preprocess
from jaxmed.models.published.family import Facts, Family, Hints, Kind
from jaxmed.models.published.names import Entry, reshaped
from jaxmed.models.squeezenet import FIRES, STEM, WIDTHS, LpipsConfig, lpips
from jaxmed.nn.model import Model

NAME = "lpips"
KINDS = {"perceptual": Kind(LpipsConfig, "a perceptual distance")}
LINEAR, FEATURE = "lin0.model.1.weight", re.compile(r"net\.slice\d\.(\d+)\.(.*)")


def recognises(tensors: Mapping[str, Any]) -> bool:
    """Tell whether the names are those of this family."""
    return LINEAR in tensors and any(
        name in tensors for name in ("net.slice2.3.squeeze.weight", "features.3.squeeze.weight")
    )  # fmt: skip


def renames(names: Collection[str]) -> dict[str, str]:
    """Return the features of LPIPS's own state by torchvision's names."""
    found = {name: FEATURE.fullmatch(name) for name in names}
    return {name: f"features.{match[1]}.{match[2]}" for name, match in found.items() if match is not None}


def entries(config: LpipsConfig, naming: str = "") -> list[Entry]:
    """Return every tensor and its parameter."""
    found, inputs = _conv("features.0", "features/stem", 3, STEM, 3), STEM
    for number, squeezed, width in FIRES:
        theirs, ours = f"features.{number}", f"features/fire_{number}"
        found += _conv(f"{theirs}.squeeze", f"{ours}/squeeze", inputs, squeezed, 1)
        found += _conv(f"{theirs}.expand1x1", f"{ours}/expand_1", squeezed, width // 2, 1)
        found += _conv(f"{theirs}.expand3x3", f"{ours}/expand_3", squeezed, width // 2, 3)
        inputs = width
    linear = [
        reshaped(f"lin{level}.model.1.weight", f"lin/level_{level}", (1, width, 1, 1), (width,))
        for level, width in enumerate(WIDTHS)
    ]
    return [*found, *linear]


def _conv(name: str, path: str, inputs: int, outputs: int, edge: int) -> list[Entry]:
    shape = (outputs, inputs, edge, edge)
    kernel = Entry(f"{name}.weight", f"{path}/kernel", shape, (2, 3, 1, 0), (edge, edge, inputs, outputs))
    return [kernel, reshaped(f"{name}.bias", f"{path}/bias", (outputs,), (outputs,))]


def infer(where: str, tensors: Mapping[str, Any], hints: Hints = Hints()) -> LpipsConfig:
    """Return the sizes, which are fixed."""
    return LpipsConfig()


def make_lpips_model(config: LpipsConfig, parts: Collection[str]) -> Model:
    """Return the model, which is always whole."""
    return lpips(config)


def preprocess(config: LpipsConfig) -> Preprocess:
    """Return what the weights expect: pictures from -1 to 1; the distance of other images is taken as they are."""
    return Preprocess((64, 64), 3, axes="xyz", intensity=Intensity("keep"))


def notes(config: LpipsConfig, settings: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
    """Say what a user should know."""
    return ("it was fitted to how people judge photographs: of medical images it is a loss, not a measure of quality",)


def describe(config: LpipsConfig, parts: Collection[str], task: Task | None) -> list[tuple[str, str]]:
    """Return the lines of `jaxmed weights show` on kind and sizes."""
    depths = " x ".join(map(str, WIDTHS))
    return [("kind", "LPIPS by SqueezeNet 1.1"), ("input", "pairs of 2D images"), ("features", f"{depths} channels")]


FAMILY = Family(
    name=NAME,
    title="LPIPS by SqueezeNet 1.1, a perceptual distance of images (arXiv:1801.03924)",
    licence="BSD 2-Clause (LPIPS) and BSD 3-Clause (torchvision)",
    where="torch.save(lpips.LPIPS(net='squeeze').state_dict(), FILE) where the package lpips is installed",
    keys="net.sliceK.N.* or features.N.{weight,bias,squeeze.*,expand1x1.*,expand3x3.*}, linK.model.1.weight",
    kinds=KINDS,
    recognises=recognises,
    infer=infer,
    facts=lambda config: Facts("perceptual"),
    entries=entries,
    make_model=make_lpips_model,
    preprocess=preprocess,
    notes=notes,
    describe=describe,
    own_record=lambda where, run, tensors: None,
    renames=renames,
)
