"""Self-play train-policy: teach System II's policy on familiar tasks, so that a new one needs less thought."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jaxmed.config import checked
from jaxmed.data.augment import AS_THEY_ARE
from jaxmed.data.tasks import TaskData, task_episodes
from jaxmed.recipes.few_shot_stage import TaskFlags, TaskInputs
from jaxmed.recipes.map_files import write_failed
from jaxmed.recipes.policy_sections import (
    SNAPSHOT,
    SnapshotMatch,
    keep_match,
    learning_sections,
    read_snapshots,
)
from jaxmed.recipes.scan_job import trouble_sections
from jaxmed.recipes.stage import Clock, Finished, Page, begin, finish
from jaxmed.report.page import Section, Text
from jaxmed.rl.policies import make_policy
from jaxmed.systems.selfplay.inputs import open_inputs, write_policy
from jaxmed.systems.selfplay.policy_training import (
    PolicyState,
    VisitConfig,
    evaluate_policy,
    make_eval_cases,
    match_snapshots,
    policy_step,
)
from jaxmed.systems.selfplay.system_one import AdaptConfig
from jaxmed.systems.selfplay.thinking import LAPTOP, PAPER, SMOKE, ThinkConfig
from jaxmed.train.log import read_metrics
from jaxmed.train.loop import LoopConfig, fit
from jaxmed.train.mesh import MeshConfig, make_mesh
from jaxmed.train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
@checked
class Config:
    """Training of System II's policy.

    Attributes:
        inputs: Familiar tasks: rows of split train, and of split validation for tasks that are only looked at.
        adapt: Steps and rate of adaptation to each task.
        visit: What a visit to a task is.
        think: How to think; it always learns, in one round.
        loop: Visits to make, and intervals of lines, saves and evaluations.
    """

    inputs: TaskFlags = TaskInputs()
    adapt: AdaptConfig = AdaptConfig()
    visit: VisitConfig = VisitConfig()
    think: ThinkConfig = ThinkConfig()
    loop: LoopConfig = LoopConfig(steps=1000, log_every=1, save_every=50, evaluate_every=100)

    def __post_init__(self) -> None:
        if self.think.mode != "learn" or self.think.rounds > 1:
            found = f"'{self.think.mode}' in {self.think.rounds} rounds"
            raise ValueError(f"think.mode, think.rounds: expected 'learn' in 1 round, found {found}")


def paper() -> Config:
    """The release's players and learning, from which think's paper preset goes on; a thousand visits is our number."""
    return Config(think=PAPER)


def laptop() -> Config:
    """A small policy, 24 visits: a quarter of an hour on two cores."""
    return Config(
        adapt=AdaptConfig(augment=dataclasses.replace(AS_THEY_ARE, shift=2)),
        think=LAPTOP,
        loop=LoopConfig(steps=24, log_every=1, save_every=6, evaluate_every=6),
    )


def smoke() -> Config:
    """Tiny networks and a few visits, in seconds: your images, or puzzles."""
    return Config(
        inputs=TaskInputs(TaskData(synthetic=24)),
        adapt=AdaptConfig(steps=4, rate=1e-3),
        visit=VisitConfig(shots=4, images=4, iterations=2),
        think=SMOKE,
        loop=LoopConfig(steps=4, log_every=1, save_every=2),
    )


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a policy has learnt; `fresh` is what one gains on the task that was looked at that has learnt nothing."""

    tasks: tuple[str, ...]
    looked_at: str
    fresh: dict[str, float]
    match: SnapshotMatch
    steps_of_visit: int
    parameters: int
    failed: int


def run(config: Config, folder: RunFolder) -> int:
    """Read the tasks, visit them, export the policy, show what it is worth. Returns 1 when records failed."""
    clock = Clock()
    inputs, trained, preprocess = open_inputs(config.inputs, folder)
    cases, failed = inputs.read(preprocess, ("train",), ("validation",))
    training, held_out = cases["train"], cases.get("validation", cases["train"])
    log = begin(folder, tensorboard=config.loop.tensorboard)
    log.say(f"{len(training.images):,} cases of {len(training.task_names)} tasks: {', '.join(training.task_names)}.")
    clock.lap("read and cut")
    first_key, root = jax.random.split(jax.random.key(inputs.seed))
    params = make_policy(config.think.policy, config.think.play.game, preprocess.size).init(first_key)
    eval_cases = make_eval_cases(inputs.seed, config.visit, config.adapt, trained.system, held_out)

    def evaluate(state: PolicyState) -> dict[str, float]:
        place = folder.outputs / "snapshots" / f"{SNAPSHOT}{int(state.step):06d}"
        write_policy(place, state.params, config.think, preprocess.size)
        return evaluate_policy(config.think, config.visit.iterations, eval_cases, state.params)

    start = PolicyState(jnp.zeros((), jnp.int32), params, root)
    fresh = evaluate(start)
    log.say(f"Before training, thinking gains {fresh['score_gain']:.4f} of the verifier's score in as many steps.")
    state = fit(
        config.loop,
        start,
        partial(policy_step, trained.system, config.adapt, config.think, config.visit.iterations),
        partial(task_episodes, training, config.visit.shots, config.visit.images, inputs.seed, config.loop.steps),
        mesh=make_mesh(MeshConfig(data=1)),
        folder=folder,
        log=log,
        evaluate=evaluate,
    )
    clock.lap("train, compilation included")
    numbers, snapshots = read_snapshots(folder.outputs / "snapshots", config.loop.steps)
    first = eval_cases[0]
    match = match_snapshots(first.key, first.system, first.visit["image"], config.think, snapshots)
    clock.lap("match of snapshots")
    write_policy(folder.outputs / "policy", state.params, config.think, preprocess.size)
    write_failed(folder.outputs, failed)
    summary = Summary(
        training.task_names,
        held_out.task_names[0] if "validation" in cases else "",
        fresh,
        keep_match(numbers, match),
        config.visit.iterations * config.think.play.steps_per_iteration,
        sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        len(failed),
    )
    finish(folder, config, summary, clock, page)
    return 1 if failed else 0


def page(run: Finished[Config, Summary]) -> Page:
    """Show what the policy gains from visit to visit, and its snapshots against each other."""
    summary, lines = run.summary, read_metrics(run.path)
    last = next(line for line in reversed(lines) if "evaluation/score_gain" in line)
    which = f"'{summary.looked_at}', which it was not taught on" if summary.looked_at else "a task of training"
    fresh = summary.fresh
    return Page(
        "System II's policy, taught",
        f"Self-play reasoning, {len(summary.tasks)} familiar tasks",
        [
            ("Visits", int(last["step"]), ", ".join(summary.tasks)),
            ("Score gained", f"{last['evaluation/score_gain']:+.4f}", f"untaught {fresh['score_gain']:+.4f}"),
            ("Dice gained", f"{100 * last['evaluation/overlap_gain']:+.2f}",
             f"points; untaught {100 * fresh['overlap_gain']:+.2f}"),
            ("Parameters", f"{summary.parameters:,}", "of the policy"),
        ],
        [
            *trouble_sections(run.outputs, (), summary.failed),
            *learning_sections(lines, fresh, summary.match),
            Section("How to read this", [Text([
                f"A visit adapts System I to a familiar task and thinks about other images of it for "
                f"{summary.steps_of_visit:,} steps of the game. What it gains in them should grow from visit to visit, "
                "if what the policy learns on one task serves the next.",
                f"Now and then the policy thinks about images of {which}: always the same, for as many steps. The flat "
                "line is what a policy gains there that has learnt nothing before. If the score's gain grows and that "
                "of Dice falls, the policy learns to exploit the verifier. If both fall to 0, it has learnt to pass: a "
                "policy is paid for its proposals on average, the answer is the best of all, and where System I is "
                "good most changes are for the worse. Without think.play.game.at-most-k nobody passes.",
                "Snapshots of the policy play each other on images of that task. 400 points of Elo are odds of ten to "
                "one to make the better proposal; a policy is exploitable as far as another one gains on it.",
            ])]),
        ],
    )  # fmt: skip
