"""Risk over coverage: what is lost when only the most certain answers are given, by measure of uncertainty."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float64

from jaxmed.report.figures import curves
from jaxmed.report.page import Block, Table


def risk_blocks(
    doubts: Mapping[str, Mapping[str, float | None]],
    lines: Mapping[str, tuple[Float64[np.ndarray, " row"], Float64[np.ndarray, " row"]]],
) -> list[Block]:
    """Draw the curves of all measures, and say how well each tells wrong answers.

    Args:
        doubts: By measure: "auroc" with its interval "low" and "high", "area" under the curve and its "best" value.
        lines: Coverage and risk by measure.
    """
    rows = [(name, one["auroc"], one["low"], one["high"], one["area"]) for name, one in doubts.items()]
    best = next(iter(doubts.values()))["best"]
    caption = (
        f"AUROC of 0.5 is chance. The area under risk over coverage is at best {best:.3g}; chance gives the error rate."
    )
    heads = ("Uncertainty", "AUROC for wrong answers", "Low", "High", "Area of risk over coverage")
    figure = curves(lines, xlabel="share of answers given, the most certain first", ylabel="share of them wrong",
                    caption="Risk over coverage: a useful uncertainty keeps the left end low.")  # fmt: skip
    return [figure, Table(heads, rows, caption)]
