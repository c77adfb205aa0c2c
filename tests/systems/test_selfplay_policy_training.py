"""Teaching System II's policy: who is labelled and who is thought about, and what is handed on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.data.tasks import Cases, draw_episode, task_episodes
from jaxmed.errors import InputError
from jaxmed.models.mask_generator import GeneratorConfig
from jaxmed.models.mask_verifier import VerifierConfig
from jaxmed.models.policy import GaussianMlpConfig
from jaxmed.rl.pixel_game import PixelGame
from jaxmed.rl.policies import make_policy
from jaxmed.rl.selfplay import SelfPlayConfig
from jaxmed.systems.selfplay import inputs, policy_training
from jaxmed.systems.selfplay.policy_training import PolicyState, VisitConfig
from jaxmed.systems.selfplay.system_one import AdaptConfig, SystemOne, SystemOneConfig, init_params
from jaxmed.systems.selfplay.thinking import ThinkConfig

SIZE = (8, 8)
PLAY = SelfPlayConfig(game=PixelGame(rule="elitist", at_most_k=True, flips=2), games=8, steps=8)
THINK = ThinkConfig(play=PLAY, policy=GaussianMlpConfig((8,)))
VISIT = VisitConfig(shots=3, images=4, iterations=2)


def make_cases(subjects, tasks):
    rng = np.random.default_rng(0)
    count = len(subjects)
    images = rng.random((count, *SIZE)).astype(np.float32)
    images[:, 0, 0] = np.arange(count) / count  # so that a case is known by its image
    names = tuple(str(number) for number in range(count))
    return Cases(images, images > 0.5, np.array(tasks, np.int32), ("a", "b")[: max(tasks) + 1], tuple(subjects), names)


@pytest.fixture(scope="module")
def system():
    config = SystemOneConfig(GeneratorConfig("plain", widths=(8, 8)), VerifierConfig(widths=(8,), dense=(8,)))
    return SystemOne(config, init_params(jax.random.key(0), config, SIZE))


def owners(cases, images):
    return [int(round(float(value) * len(cases.images))) for value in images[:, 0, 0]]


def test_no_subject_is_labelled_and_thought_about():
    cases = make_cases([f"s{number // 3}" for number in range(18)], [0] * 9 + [1] * 9)
    for number in range(20):
        visit = next(task_episodes(cases, VISIT.shots, VISIT.images, 3, 20, number))
        shots, images = owners(cases, visit["shot"]), owners(cases, visit["image"])
        assert not {cases.subjects[case] for case in shots} & {cases.subjects[case] for case in images}
        assert len({int(cases.tasks[case]) for case in shots + images}) == 1
        np.testing.assert_array_equal(visit["mask"], cases.masks[images])
        np.testing.assert_array_equal(visit["shot_mask"], cases.masks[shots])


def test_images_of_one_subject_are_halved():
    cases = make_cases(["s"] * 6, [0] * 6)
    for number in range(10):
        visit = draw_episode(cases, np.arange(6), VISIT.shots, VISIT.images, np.random.default_rng(number))
        assert not set(owners(cases, visit["shot"])) & set(owners(cases, visit["image"]))


def test_a_visit_depends_on_its_number_alone():
    cases = make_cases([f"s{number}" for number in range(12)], [0] * 6 + [1] * 6)
    whole = list(task_episodes(cases, VISIT.shots, VISIT.images, 0, 5, 0))
    rest = list(task_episodes(cases, VISIT.shots, VISIT.images, 0, 5, 3))
    assert len(whole) == 5 and len(rest) == 2
    for first, second in zip(whole[3:], rest, strict=True):
        assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(whole[0]["image"], whole[1]["image"])


def test_a_visit_teaches_the_policy_and_hands_on_nothing_else(system):
    cases = make_cases([f"s{number}" for number in range(12)], [0] * 12)
    visit = next(task_episodes(cases, VISIT.shots, VISIT.images, 0, 1, 0))
    params = make_policy(THINK.policy, PLAY.game, SIZE).init(jax.random.key(1))
    state = PolicyState(jnp.int32(0), params, jax.random.key(2))
    before = jax.tree.map(np.array, system.params)
    step = [policy_training.policy_step(system, AdaptConfig(steps=2), THINK, 2, state, visit) for _ in range(2)]
    (new, metrics), (again, _) = step
    assert int(new.step) == 1 and float(metrics["score_gain"]) >= 0
    moved = [float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (new.params, params)), strict=True)]
    assert max(moved) > 1e-4
    jax.tree.map(np.testing.assert_array_equal, new.params, again.params)
    jax.tree.map(np.testing.assert_array_equal, system.params, before)


def test_a_verifier_without_an_opinion_teaches_nothing(system):
    verifier = jax.tree.map(jnp.zeros_like, system.params["verifier"])
    blind = system._replace(params=system.params | {"verifier": verifier})
    cases = make_cases([f"s{number}" for number in range(12)], [0] * 12)
    visit = next(task_episodes(cases, VISIT.shots, VISIT.images, 0, 1, 0))
    state = PolicyState(
        jnp.int32(0), make_policy(THINK.policy, PLAY.game, SIZE).init(jax.random.key(1)), jax.random.key(2)
    )
    new, metrics = policy_training.policy_step(blind, AdaptConfig(steps=0), THINK, 2, state, visit)
    assert int(new.step) == 1 and float(metrics["score_gain"]) == 0
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)


def test_snapshots_are_rated_by_who_proposes_better(system):
    cases = make_cases([f"s{number}" for number in range(4)], [0] * 4)
    eager = make_policy(THINK.policy, PLAY.game, SIZE).init(jax.random.key(1))
    passive = jax.tree.map(jnp.array, eager)
    passive["mean"]["bias"] -= 50.0  # flips nothing
    match = policy_training.match_snapshots(jax.random.key(3), system, cases.images, THINK, [passive, passive, eager])
    # The same policy twice: the same games, seen from both sides.
    assert match.elo[0] == pytest.approx(match.elo[1], abs=1e-3) and match.elo.sum() == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(match.scores[0], match.scores[1])
    assert match.exploitability[0] == match.exploitability[1]
    # Both ways round a pair has as many wins as steps.
    won, lost = match.scores[2, 0], match.scores[0, 2]
    assert won != lost and (won > lost) == (match.elo[2] > match.elo[0])


def test_a_policy_is_read_as_it_was_written(system, tmp_path):
    params = make_policy(THINK.policy, PLAY.game, SIZE).init(jax.random.key(1))
    inputs.write_policy(tmp_path / "outputs" / "policy", params, THINK, SIZE)
    settings, found = inputs.load_policy(tmp_path, ThinkConfig(), SIZE)
    assert settings == ThinkConfig(policy=THINK.policy)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    with pytest.raises(InputError, match=r"expected a policy for images of \(16, 16\), found one for \(8, 8\)"):
        inputs.load_policy(tmp_path, ThinkConfig(), (16, 16))
    coarse = ThinkConfig(play=SelfPlayConfig(game=PixelGame(super_pixel=2, at_most_k=True)))
    with pytest.raises(InputError, match="think.play.game.super-pixel: expected that of the policy, 1, found 2"):
        inputs.load_policy(tmp_path, coarse, SIZE)
    exact = ThinkConfig(play=SelfPlayConfig(game=PixelGame()))
    with pytest.raises(InputError, match="think.play.game.at-most-k: expected that of the policy, True, found False"):
        inputs.load_policy(tmp_path, exact, SIZE)
    with pytest.raises(InputError, match="expected a run of train-policy, found nothing"):
        inputs.load_policy(tmp_path / "absent", ThinkConfig(), SIZE)
