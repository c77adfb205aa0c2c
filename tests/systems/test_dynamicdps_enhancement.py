"""Enhancement of arrays: the Python call, several samples, tiles, and the calibration's parts."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_operators import blur

from jaxmed.arrays.batches import apply_in_batches
from jaxmed.data.windows import TilingConfig, tile_head
from jaxmed.diffusion.denoiser import Denoiser
from jaxmed.diffusion.posterior.ccdf import Ccdf
from jaxmed.diffusion.posterior.daps import Daps
from jaxmed.diffusion.posterior.dps import Dps
from jaxmed.diffusion.posterior.dynamicdps import FIXED
from jaxmed.diffusion.posterior.fidelity import PLAIN
from jaxmed.diffusion.posterior.pnp_dpir import PnpDpir
from jaxmed.diffusion.posterior.reddiff import Reddiff
from jaxmed.diffusion.posterior.start_time import StartTime
from jaxmed.diffusion.samplers import Ancestral
from jaxmed.diffusion.schedule import VpDiscrete
from jaxmed.errors import InputError
from jaxmed.io.numpy_files import write_npz
from jaxmed.physics.lowfield import FitConfig, LowField
from jaxmed.recipes.posterior_samples import draw_samples, make_program
from jaxmed.solvers.line_search import Wolfe
from jaxmed.synthesis.phantoms.mixture import denoise, make_isotropic
from jaxmed.systems import dynamicdps
from jaxmed.systems.dynamicdps.calibration import digest_of, fit_acquisition, make_start, measure, record_bank
from jaxmed.systems.dynamicdps.enhancement import enhance

pytestmark = pytest.mark.core


SIZE = (8, 8)
RNG = np.random.default_rng(0)
CENTRES = jnp.asarray(RNG.uniform(0.5, 1.5, (2, 64)), jnp.float32)
PARAMS = {"means": CENTRES}
MIXTURE = make_isotropic(jnp.ones(2), CENTRES, jnp.full(2, 0.1))
CHAIN = Ancestral(num_steps=20)
CONFIG = dataclasses.replace(
    FIXED, start=StartTime(rule="fixed", fixed=4), sampler=CHAIN, fidelity=PLAIN, first_step=0.1
)


def prior(params):
    """The mixture's denoiser; its means stand for parameters."""
    schedule = VpDiscrete()

    def apply(x, t):
        mixture = MIXTURE._replace(means=params["means"])
        flat = denoise(mixture, x.reshape(len(x), -1), schedule.alpha(t), schedule.sigma(t))
        return flat.reshape(x.shape)

    return Denoiser(apply, schedule)


def measured(image):
    return jnp.sqrt(jnp.maximum(image, 0.0) + 0.1)[::2]


def test_any_differentiable_function_is_an_operator(key):
    truth = CENTRES[:1].reshape(1, *SIZE, 1)
    denoiser, y, initial = prior(PARAMS), jax.vmap(measured)(truth), 0.7 * truth + 0.3
    image, info = dynamicdps.enhance(key, denoiser, y, measured, initial, CONFIG)
    assert np.linalg.norm(image - truth) < 0.5 * np.linalg.norm(initial - truth)
    assert info.evaluations[0] == 5


def test_the_config_chooses_the_method(key):
    operator = blur(SIZE, 0.7)
    x = jnp.asarray(RNG.uniform(0.5, 1.5, (2, *SIZE, 1)), jnp.float32)
    for config, evaluations in ((CONFIG, 5), (Dps(0.1, CHAIN), 20), (Ccdf(4, CHAIN), 5),
                                (Reddiff(num_steps=6), 6), (Daps(num_levels=2, ode_steps=3), 6),
                                (PnpDpir(num_steps=6), 6)):  # fmt: skip
        image, info = jax.jit(lambda x, config=config: enhance(key, prior(PARAMS), x, operator, x, config))(x)
        assert image.shape == x.shape
        np.testing.assert_array_equal(info.evaluations, evaluations)


def test_the_call_composes_with_jit_vmap_and_grad(key):
    """Without searches against a finite difference; with them reverse mode is refused, in words."""
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        params = {"means": CENTRES.astype(jnp.float64)}
        initial = jnp.asarray(rng.uniform(0.7, 1.3, (2, *SIZE, 1)))
        y = jax.vmap(measured)(2 * initial - 1)
        inputs = params, y, initial

        def refine(key, params, y, initial, config=CONFIG):
            return dynamicdps.enhance(key, prior(params), y, measured, initial, config)

        jitted = jax.jit(refine)
        image, _ = jitted(key, *inputs)
        mapped, _ = jax.jit(jax.vmap(refine, (0, None, 0, 0)))(key[None], params, y[None], initial[None])
        np.testing.assert_allclose(mapped[0], image, rtol=1e-6)
        total = lambda *inputs: jnp.sum(jnp.sin(jitted(key, *inputs)[0]))  # noqa: E731
        towards = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), inputs)
        ahead, behind = (total(*jax.tree.map(lambda x, d, h=h: x + h * d, inputs, towards)) for h in (1e-6, -1e-6))
        gradient = jax.grad(total, (0, 1, 2))(*inputs)
        found = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(towards), strict=True))
        np.testing.assert_allclose(found, (ahead - behind) / 2e-6, rtol=1e-5)
        assert all(np.abs(np.asarray(leaf)).max() > 0 for leaf in jax.tree.leaves(gradient))
        searched = dataclasses.replace(CONFIG, search=Wolfe(max_evaluations=3))
        with pytest.raises(TypeError, match="give search=None, or differentiate forward"):
            jax.grad(lambda y: jnp.sum(refine(key, params, y, initial, searched)[0]))(y)


def program_of(operator, config):
    def solve(key, denoiser, y, initial, indices):
        return enhance(key, denoiser, y, operator, initial, config, indices)

    return make_program(prior, operator, solve, batch_size=4)


@pytest.fixture(scope="module")
def program():
    return program_of(measured, CONFIG)


def test_samples_do_not_depend_on_the_batches_they_come_in(program, key):
    initial = RNG.uniform(0.5, 1.5, (3, *SIZE, 1)).astype(np.float32)
    y = np.asarray(jax.vmap(measured)(initial)) + 0.1
    seen = []
    found = draw_samples(program, PARAMS, key, y, initial, num_samples=3, progress=seen.append)
    assert seen == [4, 8, 9]
    run = jax.jit(lambda y, x: enhance(key, prior(PARAMS), y, measured, x, CONFIG, jnp.arange(9)))
    images, info = run(np.repeat(y, 3, 0), np.repeat(initial, 3, 0))
    grouped = np.asarray(images).reshape(3, 3, *SIZE, 1)
    np.testing.assert_allclose(found.mean, grouped.mean(1), atol=1e-5)
    np.testing.assert_allclose(found.std, grouped.std(1), atol=1e-5)
    assert np.all(found.std.reshape(3, -1).max(1) > 1e-3)
    np.testing.assert_array_equal(found.evaluations, 5)
    np.testing.assert_array_equal(np.isfinite(found.curve), np.arange(20) < 5)
    np.testing.assert_allclose(found.curve[:5], np.asarray(info.residuals)[15:].mean(1)[::-1], rtol=1e-4)
    assert found.flags[0] == 45 and found.flags.sum() == 45
    one = draw_samples(program, PARAMS, key, y, initial)
    np.testing.assert_array_equal(one.std, 0)


def test_a_volume_is_refined_slice_by_slice_and_blended(program, key):
    """20 x 11 slices in tiles of 8 x 8: what no tile with a head covers stays; the rest is the samples' blend."""
    shape = (20, 5, 11)
    head = np.zeros(shape, bool)
    head[4:16, 1:4, 2:9] = True
    volume = np.where(head, RNG.uniform(0.5, 1.5, shape), 0.0).astype(np.float32)
    doubled = program_of(lambda x: 0.5 * x, dataclasses.replace(CONFIG, first_step=0.5))
    tiles = tile_head(head, 1, SIZE, TilingConfig())
    initial = tiles.cut(volume)
    assert initial.shape[1:] == (*SIZE, 1) and 0 < tiles.kept.sum() < len(tiles.kept)
    np.testing.assert_allclose(tiles.blend(initial, volume), volume, atol=1e-5)
    found = draw_samples(doubled, PARAMS, key, tiles.cut(volume / 2), initial, 2)
    image, uncertainty = tiles.blend(found.mean, volume), tiles.blend(found.std, np.zeros_like(volume))
    assert image.shape == shape
    for plane in (0, 4):
        np.testing.assert_allclose(image[:, plane], volume[:, plane], atol=1e-5)
        np.testing.assert_array_equal(uncertainty[:, plane], 0)
    assert uncertainty[:, 1:4].max() > 0.01
    assert np.abs(image - volume)[head].mean() > 0.01
    # A network goes the same way.
    doubles = jax.jit(lambda x: jnp.clip(2.0 * x, 0.0, 2.0))
    estimate = tiles.blend(apply_in_batches(doubles, 4, tiles.cut(volume / 2)), volume)
    np.testing.assert_allclose(estimate[:, 2][head[:, 2]], np.clip(volume, 0, 2)[:, 2][head[:, 2]], atol=1e-5)


def test_small_volumes_are_extended_and_cut_back(key):
    volume = RNG.uniform(0.5, 1.5, (3, 6, 8)).astype(np.float32)
    tiles = tile_head(np.ones(volume.shape, bool), None, (8, 8, 8), TilingConfig())
    assert tiles.cut(volume).shape == (1, 8, 8, 8, 1)
    np.testing.assert_allclose(tiles.blend(tiles.cut(volume), volume), volume, atol=1e-6)


def test_a_bank_continues_after_its_last_batch(tmp_path, key):
    y = np.asarray(CENTRES)[[0, 1, 0]].reshape(3, *SIZE, 1)
    run = partial(record_bank, prior, PARAMS, key, y, lambda x: x, Dps(0.05, CHAIN), 2, tmp_path)
    bank = run()
    assert bank.shape == (3, 20) and np.isfinite(bank).all()
    # In pure noise the modes are not told apart yet.
    assert np.all(bank[:, -1] > bank[:, 0])
    stored = sorted(tmp_path.iterdir())
    marked = np.full((2, 20), 7.0, np.float32)
    with np.load(stored[0]) as first:
        (name,) = first.files
    write_npz(stored[0], {name: marked})
    stored[1].unlink()
    again = run()
    np.testing.assert_array_equal(again[:2], marked)
    np.testing.assert_allclose(again[2], bank[2], rtol=1e-5)


def test_a_rule_follows_from_a_bank():
    bank = np.tile(np.linspace(2, 40, 20), (2, 1)).astype(np.float32)
    rule = make_start(bank, np.array([5.0, 6.0], np.float32), 4, 1.0)
    assert rule.steps_per_bin == 5 and len(rule.means) == 4
    np.testing.assert_allclose(6.0**rule.tau, rule.means[0], rtol=1e-4)
    assert make_start(bank, None, 4, 1.0).tau == 0.4
    with pytest.raises(InputError, match="DPS stays finite"):
        make_start(bank * np.nan, None, 4, 1.0)


def test_measurements_and_their_fit(key):
    acquisition = LowField(gamma=0.7, scale=2.0, sigma=1.0, radius=3, noise=0.005)
    images = RNG.uniform(0.2, 1.8, (4, 16, 16, 1)).astype(np.float32)
    low = measure(key, images, acquisition)
    start = dataclasses.replace(acquisition, gamma=1.0, sigma=2.0)
    found = fit_acquisition(images, low, start, FitConfig())
    np.testing.assert_allclose([found.gamma, found.sigma], [0.7, 1.0], rtol=0.02)


def test_a_digest_tells_parameters_apart():
    params = {"a": {"kernel": np.ones(3, np.float32)}, "b": np.zeros(2, np.float32)}
    other = {"a": {"kernel": np.ones(3, np.float32)}, "b": np.full(2, 1e-7, np.float32)}
    assert digest_of(params) == digest_of(dict(reversed(params.items()))) != digest_of(other)
