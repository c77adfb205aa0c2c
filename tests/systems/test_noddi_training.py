"""Networks learn what their labels say, for any forward model; runs repeat, restarts do not disturb each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.io.gradient_match import Table
from jaxmed.metrics.recovery import correlation, make_grid, score
from jaxmed.metrics.recovery import shrinkage as slopes
from jaxmed.models.mlp import MlpConfig
from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.physics.microstructure import ForwardConfig, ball_and_stick_model, noddi_model, simulate
from jaxmed.physics.monte_carlo import average_bound, estimate
from jaxmed.physics.rician import log_rician
from jaxmed.recipes.restarts import State, run_epochs
from jaxmed.systems import noddi
from jaxmed.systems.noddi import training
from jaxmed.systems.noddi.network import predict
from jaxmed.systems.noddi.protocol import prepare
from jaxmed.systems.noddi.stages.evaluate import fit_estimator, network_estimator
from jaxmed.systems.noddi.training import TrainConfig, ascend, fit_config, fit_labels
from jaxmed.train.optimizer import OptimizerConfig

BVALS, BVECS = two_shell_protocol(3, ((8, 700.0), (12, 2000.0)))
TABLE = Table.make(BVALS, BVECS, 50.0)
TINY = TrainConfig(
    labels="gt",
    network=MlpConfig(width=24),
    optimizer=OptimizerConfig(peak_lr=3e-3, weight_decay=1e-4),
    signals=4096,
    held_out=512,
    epochs=12,
    batch_size=64,
    restarts=2,
)
FIT_CHUNK = 2048
"""Voxels of a fit's chunk on CPU: tests that fit as many share its compilation."""
STICK = dataclasses.replace(TINY, forward=ForwardConfig("ball-and-stick"))


@pytest.fixture(scope="module")
def tiny():
    return noddi.train(jax.random.key(0), BVALS, BVECS, TINY)


def test_a_network_beats_the_mean_of_the_truth(tiny, key):
    voxels = simulate(key, noddi_model(), 1000, BVALS, BVECS, (30.0, 30.0))
    found, truth = predict(tiny.network, voxels.signals), np.asarray(voxels.parameters)
    tissue = truth[:, 2] < 0.5
    for column in (0, 2):
        error = (found - truth)[tissue, column]
        assert np.sqrt(np.mean(error**2)) < 0.6 * truth[tissue, column].std()
    assert tiny.losses[-1, 1].max() < tiny.losses[0, 1].min()
    assert tiny.network.description.labels == "gt" and tiny.network.description.table == TABLE


def test_the_best_restart_is_kept(tiny):
    assert tiny.losses.shape == (12, 2, 2)
    assert tiny.losses[-1, 1, tiny.best] == tiny.losses[-1, 1].min()
    assert tiny.network.params["layer_0"]["kernel"].shape == (20, 24)


def test_an_interrupted_training_continues_to_the_same_network(tiny):
    states: list[State] = []

    def keep_states(state, step):
        def keep(state, _):
            state, losses = step(state, None)
            states.append(state)
            return state, losses

        return run_epochs(state, keep)

    again = noddi.train(jax.random.key(0), BVALS, BVECS, TINY, loop=keep_states)
    resumed = noddi.train(jax.random.key(0), BVALS, BVECS, TINY, loop=lambda _, step: run_epochs(states[1], step))
    for other in (again, resumed):
        np.testing.assert_array_equal(other.losses, tiny.losses)
        jax.tree.map(np.testing.assert_array_equal, other.network.params, tiny.network.params)


def test_a_restart_does_not_depend_on_its_neighbours(tiny):
    alone = noddi.train(jax.random.key(0), BVALS, BVECS, dataclasses.replace(TINY, restarts=1))
    np.testing.assert_allclose(alone.losses[:, :, 0], tiny.losses[:, :, 0], rtol=1e-3)


def test_self_supervision_reproduces_signals_about_as_well_as_the_truth_does():
    config = dataclasses.replace(STICK, labels="self", restarts=1, snr=(30.0, 30.0), epochs=2 * STICK.epochs)
    trained = noddi.train(jax.random.key(0), BVALS, BVECS, config)
    voxels = simulate(jax.random.key(2), ball_and_stick_model(), 2000, BVALS, BVECS, (30.0, 30.0))
    clean = ball_and_stick_model().signal(voxels.parameters, voxels.direction, BVALS, BVECS)
    measured = voxels.signals / voxels.signals[:, :3].mean(axis=1, keepdims=True)
    floor = float(jnp.mean((jnp.sqrt(clean**2 + 1 / 30**2) - measured)[:, 3:] ** 2))
    assert trained.losses[-1, 1, 0] < 2 * floor < 0.5 * trained.losses[0, 0, 0]
    found = predict(trained.network, voxels.signals)
    for column in range(2):
        assert np.corrcoef(found[:, column], voxels.parameters[:, column])[0, 1] > 0.9


def test_a_label_counts_as_far_as_the_signal_depends_on_it():
    pool = training.make_pool(jax.random.key(0), TABLE, TINY, 300)
    np.testing.assert_allclose(pool.weights[:, 0], 1 - pool.targets[:, 2], atol=1e-6)
    np.testing.assert_array_equal(pool.weights[:, 1:], 1)
    assert pool.inputs.shape == (300, 20) and pool.targets.min() >= 0 and pool.targets.max() <= 1


def test_blocks_do_not_repeat_their_noise(monkeypatch):
    monkeypatch.setattr(training, "BLOCK", 64)
    pool = training.make_pool(jax.random.key(0), TABLE, TINY, 150)
    assert len(np.unique(np.asarray(pool.inputs[:, 0]))) == 150


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 9999}, "batch_size: expected at most 4096 signals, found 9999"),
        ({"epochs": 0}, "epochs: expected a whole number from 1 to 2,147,483,647, found 0"),
        ({"snr": (30.0, 10.0)}, "snr: expected two ratios above 0 in rising order"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


# Labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["grid", "truth"])
@pytest.mark.parametrize("is_named", [True, False], ids=["named", "of the caller"])
def test_labels_of_clean_signals_are_the_truth(start, is_named):
    model = ball_and_stick_model()
    voxels = simulate(jax.random.key(0), model, FIT_CHUNK, BVALS, BVECS, (1e5, 1e5))
    # Without a stick its direction is lost, and without a ball little tells the diffusivity.
    inside = np.asarray((voxels.parameters[:, 0] > 0.1) & (voxels.parameters[:, 0] < 0.95))
    forward = ForwardConfig("ball-and-stick") if is_named else None
    error = np.abs(np.asarray(fit_labels(voxels, model, TABLE, start, forward) - voxels.parameters))[inside]
    assert np.percentile(error, 99) < 1e-3


def test_a_label_is_at_least_as_likely_as_the_truth():
    forward, model = ForwardConfig(), noddi_model()
    config = fit_config(forward, TABLE)
    voxels = simulate(jax.random.key(1), model, 500, BVALS, BVECS, (15.0, 15.0))
    found = ascend(model, True, config, prepare(BVALS, BVECS, config), voxels, "truth").point
    s0 = voxels.signals[:, :3].mean(axis=1, keepdims=True)

    def unlikelihood(parameters, direction):
        predicted = model.signal(parameters, direction, BVALS, BVECS)[:, 3:]
        return -np.asarray(log_rician(voxels.signals[:, 3:] / s0, predicted, voxels.sigma[:, None] / s0).sum(axis=1))

    truth = unlikelihood(voxels.parameters, voxels.direction)
    inside = np.asarray(jnp.all((voxels.parameters > 0.02) & (voxels.parameters < 0.98), axis=1))
    assert (unlikelihood(found.values.T, found.direction.T) <= truth + 0.01)[inside].all()


# What labels do to estimates (specification, item i.8) ---------------------------------------------------------------


def compare_labels(forward, config, bvals, bvecs, snr, points, repeats):
    """Train on true and on fitted labels; return truth, weights, and what each estimator says."""
    table = Table.make(bvals, bvecs, 50.0)
    model = forward.build(bvals)
    networks = {
        labels: noddi.train(
            jax.random.key(0), bvals, bvecs, dataclasses.replace(config, forward=forward, labels=labels)
        ).network
        for labels in ("gt", "mle")
    }
    grid = make_grid([parameter.draw for parameter in model.parameters], points)
    estimators = {name: network_estimator(network, table) for name, network in networks.items()}
    estimators["fit"] = fit_estimator(forward, table)
    found = estimate(jax.random.key(5), model, table, estimators, grid, repeats, snr)
    return grid, np.asarray(model.relevance(jnp.asarray(grid, jnp.float32))), found


def check_labels(grid, weight, found, columns):
    scores = {name: score(one, grid) for name, one in found.items()}
    slope = {name: slopes(one, grid, weight) for name, one in scores.items()}
    sd = {name: np.sqrt((one.sd**2).mean(axis=0)) for name, one in scores.items()}
    near = {name: correlation(found[name], found["fit"], weight) for name in ("gt", "mle")}
    for column in columns:
        assert slope["gt"][column] < 0.97
        assert abs(1 - slope["mle"][column]) < abs(1 - slope["gt"][column])
        assert sd["mle"][column] > sd["gt"][column]
        assert near["mle"][column] > near["gt"][column]


def test_true_labels_shrink_estimates_and_fitted_labels_agree_with_fits():
    """In seconds: diffusivity of a ball and stick at low signal, where labels matter and a small network serves.

    The stick's fraction is left out: there the fit itself is biased, taking noise for a stick.
    """
    config = TrainConfig(
        network=MlpConfig(width=48), optimizer=OptimizerConfig(peak_lr=3e-3, weight_decay=1e-4), signals=8192,
        held_out=1024, epochs=25, batch_size=64, restarts=1, snr=(8.0, 8.0),
    )  # fmt: skip
    grid, weight, found = compare_labels(
        ForwardConfig("ball-and-stick"), config, BVALS, BVECS, 8.0, 5, FIT_CHUNK // 25 + 1
    )
    check_labels(grid, weight, found, (1,))


def test_fits_reach_the_bound_and_the_bound_falls_with_the_noise():
    """Item i.7, mid-range and in seconds: the spread of fits within 20 % of the Cramer-Rao bound."""
    forward = ForwardConfig("ball-and-stick")
    model, grid = forward.build(BVALS), np.array([[0.4, 1.0], [0.6, 1.5]])
    found = estimate(
        jax.random.key(0), model, TABLE, {"fit": fit_estimator(forward, TABLE)}, grid, FIT_CHUNK // 2, 30.0
    )
    bound = average_bound(jax.random.key(1), model, TABLE, grid, 30.0)
    np.testing.assert_allclose(score(found["fit"], grid).sd, bound, rtol=0.2)
    assert (average_bound(jax.random.key(1), model, TABLE, grid, 60.0) < 0.55 * bound).all()


@pytest.mark.slow
def test_true_labels_shrink_noddi_and_fitted_labels_agree_with_fits():
    """Item i.8 on NODDI, two-shell protocol, SNR 20, networks large enough to follow their labels."""
    bvals, bvecs = two_shell_protocol()
    config = TrainConfig(
        network=MlpConfig(width=128), signals=100_000, held_out=5000, epochs=30, batch_size=512, restarts=1
    )
    grid, weight, found = compare_labels(ForwardConfig(), config, bvals, bvecs, 20.0, 6, 40)
    check_labels(grid, weight, found, (0, 2))
