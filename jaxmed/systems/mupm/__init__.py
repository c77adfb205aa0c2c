"""MUPM: how the uncertainties that image and text cause add up in the answers of a multimodal model.

Paper: "Multimodal uncertainty propagation model", Tang et al., MICCAI 2025, arXiv:2507.12945.

In:  answers of any model to multiple-choice questions about cases, in a table (CSV). Each case is asked with the image
     perturbed (branch image), the text perturbed (text) and both (joint): a row per answer, with the probability of
     every option (p_OPTION) or the text of the answer.
Out: variances of the answers per case and option (probability squared): V_I by the image, V_T by the text, V by both;
     coefficients of V = b1 V_I + b2 V_T + b3 C with intervals from resampling subjects; how well they predict V for
     other cases, places and tasks; which parts of the input say nothing; which answers are too uncertain to give.

Stages:
  1. jaxmed mupm perturb --data.manifest cases.csv --out RUN
     perturbed images (PNG) and records in other words, with a table of the questions that any model may answer.
  2. jaxmed mupm answer --questions RUN --endpoint.url http://HOST:PORT/v1 --endpoint.model NAME --out RUN
     the answers of a model, each question asked once; a killed run goes on. Or --model llava --weights FOLDER; or
     --model small --synthetic 40, which trains a model on drawn hearts in minutes.
  3. jaxmed mupm propagate --table answers.csv --out RUN
     coefficients, how few cases suffice for them (--fit.cases 1 2 5 10), held-out R2, calls of the model saved, and
     whether uncertain answers are the wrong ones.
  4. jaxmed mupm transfer --table answers.csv --by site --out RUN
     coefficients fitted on one group of cases, or on the table, predict the others (--data.external NAME=CSV).
  5. jaxmed mupm redundancy --table answers.csv --out RUN
     factors of the input whose absence (column factor) changes neither the uncertainty nor the answers.

Try it without data:  jaxmed mupm propagate --preset smoke --out runs/mupm
From Python:          from jaxmed.systems import mupm; found = mupm.fit(v_image, v_text, covariance, v)
                      found.coefficients, found.vif and found.scores; arrays are (case, class).

Deviations, each told where it is made: probabilities of the options are the preferred readout, since sampled answers
hold the noise of decoding in all three variances; scores are of held-out subjects, where the released code scores its
fit on its own rows; intervals resample subjects, since the rows of one are dependent. C is the released sqrt(V_I V_T)
by default: it is no covariance, and a function of the other two predictors, so coefficients are not sensitivities.
The paper's body was not at hand: none of its figures is quoted or compared with.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxmed.systems.mupm.regression import fit as fit


def __getattr__(name: str) -> object:
    """Import a Python call when it is used: `jaxmed mupm` must not wait for jax."""
    if name == "fit":
        from jaxmed.systems.mupm import regression

        return regression.fit
    raise AttributeError(name)
