"""Teach System II's policy on familiar tasks, so that a new one needs less thought.

A visit adapts System I to one familiar task by a few labelled images and thinks about others of it; the policy goes on
to the next visit, the adapted networks do not. Masks of the images that are thought about are for metrics alone.

Source: arXiv:2506.22075 (comments of the reference implementation: the policy is pre-trained and only adapted to what
    is thought about, a few images at a time that share it, and later ones converge much faster); the order of visits
    and all constants are our own.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.arrays.types import KeyArray, Params, Scalar
from jaxmed.config import Size, checked
from jaxmed.data.tasks import Cases, draw_episode
from jaxmed.rl.policies import make_policy
from jaxmed.rl.selfplay import make_problem
from jaxmed.rl.tournament import Match, rate_policies
from jaxmed.systems.selfplay.system_one import AdaptConfig, SystemOne, adapt, generate, overlap
from jaxmed.systems.selfplay.thinking import Budget, ThinkConfig, Thought, think
from jaxmed.systems.selfplay.verifier import calibrate, make_judge, verify_by

EVALUATED = 2


@dataclasses.dataclass(frozen=True)
@checked
class VisitConfig:
    """A visit to a familiar task.

    Attributes:
        shots: Labelled images by which System I is adapted to it.
        images: Images that are thought about together, of other subjects where the task has several.
        iterations: Iterations of self-play.
    """

    shots: Size = 8
    images: Size = 8
    iterations: Size = 4


class PolicyState(NamedTuple):
    """State of the training: visits so far, the policy, and the root of all randomness."""

    step: Int[Array, ""]
    params: Params
    key: KeyArray


def adapt_to_task(key: KeyArray, system: SystemOne, visit: dict[str, Any], config: AdaptConfig) -> SystemOne:
    """Adapt System I to the task of a visit, and set its verifier's temperature."""
    adapt_key, probe_key = jax.random.split(key)
    shots, masks = jnp.asarray(visit["shot"]), jnp.asarray(visit["shot_mask"])
    adapted, _ = adapt(adapt_key, system, shots, masks, config)
    return adapted._replace(temperature=calibrate(probe_key, adapted, shots, masks).temperature)


def think_on(
    key: KeyArray, system: SystemOne, visit: dict[str, Any], config: ThinkConfig, iterations: int, params: Params | None
) -> tuple[Thought, dict[str, Scalar]]:
    """Think about the images of a visit for some iterations, and measure what came of it."""
    count = len(visit["image"])
    budget = Budget(iterations * config.play.for_images(count).steps_per_iteration, patience=0)
    found = think(key, system, visit["image"], budget, config, policy=params)
    truth = jnp.asarray(visit["mask"], jnp.float32)
    before, after = (overlap(truth, jnp.asarray(masks, jnp.float32)).mean() for masks in (found.start, found.masks))
    # Where thinking begins from a level, the verifier's choice of it is not the policy's merit.
    begin = min(int(np.searchsorted(found.trace.steps, len(config.levels) * count)), len(found.trace.steps) - 1)
    gain = jnp.asarray(found.values.mean() - found.trace.values[begin].mean())
    return found, {"score_gain": gain, "overlap": after, "overlap_gain": after - before}


def policy_step(
    system: SystemOne,
    adaptation: AdaptConfig,
    config: ThinkConfig,
    iterations: int,
    state: PolicyState,
    visit: dict[str, Any],
) -> tuple[PolicyState, dict[str, Scalar]]:
    """Make a visit. Not for `jit`: its parts are compiled, once for all visits.

    A task whose verifier has no opinion leaves the policy as it was.
    """
    adapt_key, think_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    adapted = adapt_to_task(adapt_key, system, visit, adaptation)
    found, metrics = think_on(think_key, adapted, visit, config, iterations, state.params)
    return PolicyState(state.step + 1, found.policy or state.params, state.key), metrics


class EvalCase(NamedTuple):
    """Images that a policy is evaluated on: the players' key, System I adapted to their task, and the visit."""

    key: KeyArray
    system: SystemOne
    visit: dict[str, np.ndarray]


def make_eval_cases(
    seed: int, config: VisitConfig, adaptation: AdaptConfig, system: SystemOne, cases: Cases
) -> list[EvalCase]:
    """Draw images of one task, the same for every policy, and adapt System I to it."""
    of_task, found = np.flatnonzero(cases.tasks == 0), []
    for number, pair in enumerate(jax.random.split(jax.random.key(seed + 1), (EVALUATED, 2))):
        visit = draw_episode(cases, of_task, config.shots, config.images, np.random.default_rng((seed, 12, number)))
        found.append(EvalCase(pair[1], adapt_to_task(pair[0], system, visit, adaptation), visit))
    return found


def evaluate_policy(config: ThinkConfig, iterations: int, cases: list[EvalCase], params: Params) -> dict[str, float]:
    """Think with a policy about images of a task that it was not taught on, as long as a visit lasts."""
    found = [think_on(case.key, case.system, case.visit, config, iterations, params)[1] for case in cases]
    return {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}


def match_snapshots(
    key: KeyArray,
    system: SystemOne,
    images: Float[np.ndarray, "image *size"],
    config: ThinkConfig,
    params: list[Params],
) -> Match:
    """Let snapshots play each other on images [0, 1] of a task, without learning: every pair for one iteration."""
    seen = jnp.asarray(images)
    start = generate(system.config, system.params, seen) > system.config.threshold
    judge, verify = make_judge(system, seen, config.prior_weight), verify_by(system.config)
    policy = make_policy(config.policy, config.play.game, images.shape[1:])
    return rate_policies(key, config.play, policy, verify, make_problem(verify, judge, seen, start), params)
