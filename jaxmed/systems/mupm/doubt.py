"""Whether uncertain answers are the wrong ones: what a variance of answers is good for beside its parts.

NumPy on the host; needs the right options of the cases.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from jaxmed.metrics.classification import expected_calibration_error
from jaxmed.metrics.uncertainty import decile_calibration, entropies
from jaxmed.systems.mupm.answers import Answers
from jaxmed.systems.mupm.branches import Variances


def uncertainties(
    answers: Answers, variances: Variances, predicted: Float[np.ndarray, "case class"]
) -> dict[str, Float64[np.ndarray, " case"]]:
    """Return every measure of uncertainty per case, by name; NaN where it is not known."""
    sums = {
        "V, both varied": variances.joint, "V predicted": predicted, "V_I, image varied": variances.image,
        "V_T, text varied": variances.text,
    }  # fmt: skip
    found = {name: np.asarray(part, np.float64).sum(axis=1) for name, part in sums.items()}
    joint = jnp.asarray(answers.branches.answers[:, 2]), jnp.asarray(answers.branches.is_valid[:, 2])
    parts = entropies(*joint)
    found["entropy of the mean answer"] = np.asarray(parts.predictive, np.float64)
    found["mutual information"] = np.asarray(parts.information, np.float64)
    return found


def given_answers(answers: Answers) -> Int[np.ndarray, " case"]:
    """Return the option answered to the unperturbed input, or, where nobody asked, on average; -1 for none."""
    block = answers.branches
    total = np.where(block.is_valid[..., None], block.answers, 0).sum(axis=(1, 2))
    mean = np.where(np.isfinite(answers.baseline), answers.baseline, total)
    return np.where(mean.sum(axis=1) > 0, mean.argmax(axis=1), -1)


def calibration(
    answers: Answers, is_known: Bool[np.ndarray, " case"], variances: Variances, is_wrong: Bool[np.ndarray, " case"]
) -> dict[str, float | None]:
    """Return calibration errors: of the answers' probabilities, and the released pseudo-confidence of variances.

    Args:
        answers: With baselines.
        is_known: Cases with a label.
        variances: Of all cases.
        is_wrong: Of the cases with a label.
    """
    baseline = answers.baseline[is_known]
    ece = None
    if np.isfinite(baseline).all():
        shares = baseline / baseline.sum(axis=1, keepdims=True)
        ece = float(expected_calibration_error(answers.labels[is_known], shares))
    parts = [np.asarray(part)[is_known] for part in (variances.image, variances.text, variances.joint)]
    released = [decile_calibration(part, ~is_wrong) for part in parts if np.isfinite(part).all()]
    return {"ece": ece, "decile": float(np.mean(released)) if released else None}
