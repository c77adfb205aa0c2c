"""ProFound's cases: how their files are named, sizes of networks for presets, and phantom prostates."""

import dataclasses
from pathlib import Path
from typing import Literal

from jaxmed.config import checked
from jaxmed.data.preprocess import Preprocess
from jaxmed.models.convnext import ConvNextConfig
from jaxmed.models.fcmae import FcmaeConfig
from jaxmed.models.mae import MaeConfig
from jaxmed.models.published.profound import PREPROCESS
from jaxmed.models.vit import VitConfig
from jaxmed.recipes.stage import first_only
from jaxmed.synthesis.phantoms.prostate import ProstateConfig
from jaxmed.synthesis.phantoms.write_prostate import write_prostate_cohort
from jaxmed.train.run_folder import RunFolder, start

SOURCE = "Model: ProFound, arXiv:2603.03961. For research only, not for diagnosis."
SMALL_SIZE = (16, 32, 32)
SMALL_INPUT = dataclasses.replace(PREPROCESS, size=SMALL_SIZE, spacing=(3.0, 3.0, 3.0))
PHANTOMS = ProstateConfig()
TINY = ConvNextConfig(SMALL_SIZE, 3, (1, 1, 1), (24, 48, 64), stem=4, strides=(2, 1), kernel_size=3)
# Finer than the one above: what it gives a label is as fine as its first stage.
TINY_SEGMENTER = ConvNextConfig(SMALL_SIZE, 3, (1, 1, 1), (16, 32, 48), stem=2, strides=(2, 2), kernel_size=3)
SMALL = ConvNextConfig(SMALL_SIZE, 3, (2, 2, 4, 2), (24, 48, 96, 128), stem=2, kernel_size=5)
VIT_B = MaeConfig(
    VitConfig((64, 256, 256), (16, 32, 32), 3, width=768, depth=12, heads=12, hidden=3072),
    decoder_width=384, decoder_depth=8, decoder_heads=16, decoder_hidden=1536, norm_target=True, sigmoid=False,
)  # fmt: skip
TINY_VIT = MaeConfig(
    VitConfig(SMALL_SIZE, (4, 8, 8), 3, width=48, depth=2, heads=3, hidden=192),
    decoder_width=24, decoder_depth=1, decoder_heads=2, decoder_hidden=96, norm_target=True, sigmoid=False,
)  # fmt: skip
TINY_FCMAE, SMALL_FCMAE = FcmaeConfig(TINY, decoder_width=32), FcmaeConfig(SMALL, decoder_width=64)


@dataclasses.dataclass(frozen=True)
@checked
class CaseFiles:
    """What may differ from the preprocessing that travels with weights: how the files at hand are named.

    Attributes:
        sequences: A word for each channel of the weights, by which the file of the sequence is found beside that of
            the others, or in the folder of the case; several words for one are parted by "|", and a channel without a
            word is 0. Empty takes the weights' words.
        missing: What becomes of a case that lacks a sequence: "refuse", or "zero" for its channel; "weights" as above.
    """

    sequences: tuple[str, ...] = ()
    missing: Literal["weights", "refuse", "zero"] = "weights"

    def apply(self, preprocess: Preprocess) -> Preprocess:
        """Return the preprocessing of the weights with what is set here."""
        if self.sequences:
            preprocess = dataclasses.replace(preprocess, sequences=self.sequences)
        return preprocess if self.missing == "weights" else dataclasses.replace(preprocess, missing=self.missing)


def write_cases(
    folder: RunFolder, seed: int, count: int, *, fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)
) -> Path:
    """Write phantom prostates into a run, begun here, and return their manifest."""
    place = folder.path / "inputs" / "cases"

    def write() -> None:
        start(folder)
        depth, rows, columns = SMALL_SIZE
        write_prostate_cohort(place, seed, count, (columns, rows, depth), PHANTOMS, fractions=fractions)

    first_only(write, "inputs")
    return place / "cases.csv"
