"""IGND-MoE: how a disease progresses on the connectome, by mechanisms whose share changes with stage.

Paper: "Stage-aware mixture of experts for tau progression", He et al., AAAI 2026, arXiv:2508.07032.

In:  a connectome (CSV: a square matrix with region names, or a list of edges) and a table with one row per visit:
     subject, age in years, one column per region (SUVR, or any regional amount that grows with disease).
Out: one course of the cohort over stage, in years, on [0, 1] in every region; a stage for each subject; the weights of
     three mechanisms over stage (mechanistic diffusion and growth, learned graph diffusion, local reaction); forecasts.

Stages:
  1. jaxmed igndmoe simulate --out RUN
     a cohort with planted mechanisms, on a synthetic or a given connectome.
  2. jaxmed igndmoe fit --connectome A.csv --table visits.csv --seeds L_entorhinal R_entorhinal --out RUN
     dual optimisation: fit the course at fixed stages, stage the subjects on the course, again.
  3. jaxmed igndmoe stage --weights RUN --table new.csv --out RUN2
     stages of new subjects on a fitted course.
  4. jaxmed igndmoe forecast --weights RUN --table new.csv --horizons 1 2 5 --out RUN2
     regional values at later ages; where later visits are known, the error of forecasts from the first visit.
  5. jaxmed igndmoe attribute --connectome A.csv --table visits.csv --seeds ... --out RUN
     weights of mechanisms over stage with bands from a bootstrap over subjects, and what leaving one out costs.
  6. jaxmed igndmoe compare --connectome A.csv --table visits.csv --seeds ... --out RUN
     every model on the same folds; with --map.file in place of --table, models of spread against one regional map.

Every stage solves by diffrax (--solver diffrax; --ode.method, --ode.step, --ode.adjoint, and --ode.stop-at and
--ode.steady, which stop a course early) or on the fixed grid of a scan (--solver fixed: faster, the same numbers).

Try it without data:  jaxmed igndmoe fit --preset smoke --out runs/igndmoe
From Python:          from jaxmed.systems import igndmoe; fit = igndmoe.fit(visits, graph, config, seeds)
                      igndmoe.fit_on_device is the same to trace, for jax.jit and jax.vmap.

Deviations, each told where it is made: the released code is a fragment (no training loop, no graph auto-encoder, no
configuration), so the optimiser (limited-memory BFGS), rounds and the auto-encoder's layers are ours; experts are
mixed by the paper's equation 3 and not by the release's normalisation (model.match_release brings it back); the loss is
summed over a fixed grid. `attribute` fits experts that cannot stand in for each other (comparing.ATTRIBUTION): with the
paper's, which see all regions and the time, weights can be anything along a single course.
Time is anchored by the gaps between visits alone: subjects seen once say nothing about speed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxmed.systems.igndmoe.fitting import fit as fit
    from jaxmed.systems.igndmoe.fitting import fit_on_device as fit_on_device


def __getattr__(name: str) -> object:
    """Import a Python call when it is used: `jaxmed igndmoe` must not wait for jax."""
    if name in ("fit", "fit_on_device"):
        from jaxmed.systems.igndmoe import fitting

        return getattr(fitting, name)
    raise AttributeError(name)
