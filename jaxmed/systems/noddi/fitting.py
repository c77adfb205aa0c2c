"""Fit NODDI, or another model of one fibre, to a scan: the driver on the host. `voxel_fit.py` is what jax transforms.

Fits go chunk by chunk without waiting for stragglers, see `solvers/ascents.py`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Bool, Float

from jaxmed.arrays.tracing import require_values
from jaxmed.data.diffusion import gather_voxels
from jaxmed.errors import InputError
from jaxmed.io.gradients import GradientTable, Numbers, as_numbers, check_gradients
from jaxmed.io.masks import fill_mask
from jaxmed.objectives.gradient_signals import Noise
from jaxmed.physics.acquisition import attenuation_notes, check_protocol, has_two_shells
from jaxmed.physics.microstructure import MicrostructureModel
from jaxmed.physics.noddi import WHERE_TISSUE, Tissue
from jaxmed.physics.posterior import Posterior
from jaxmed.recipes.diffusion_scan import MapsByName
from jaxmed.solvers.ascents import Programs, ascend_blocks
from jaxmed.systems.noddi.protocol import FitConfig, prepare
from jaxmed.systems.noddi.voxel_fit import FLAGS, Estimates, Maps, advance, begin, finish, name_maps

DEFINITIONS = {
    "direction": ("mean fibre direction, unit vector in RAS+ world axes, sign arbitrary", "1"),
    "direction_error": ("root mean square angle of the cone of uncertainty about the direction", "degrees"),
    "s0": ("unweighted signal", "unit of the scan"),
    "residual": ("root mean squared residual over the fitted images divided by s0", "1"),
    "mean_diffusivity": ("mean diffusivity of the tensor that starts the fit", "um^2/ms"),
    "fractional_anisotropy": ("fractional anisotropy of the tensor that starts the fit", "1"),
    "flags": ("sum of bits, 0 where nothing is to be said; see bits", "1"),
}
# Flags that are said where more than 0.5 % of the voxels have them.
SAID = {
    "ndi_undefined": "ndi means nothing (nearly pure free water, or a standard error as wide as not knowing it)",
    "odi_undefined": "odi means nothing (few neurites, or too much noise)",
    "direction_undefined": "the direction means nothing (a cone of uncertainty above 45 degrees, or no neurites)",
    "not_converged": "the tolerance was not met in {iterations} iterations",
    "misfit": "the model does not make this signal (a residual above three times the noise): its maps mean nothing",
}


def fit(
    signals: Numbers,
    bvals: Numbers,
    bvecs: Numbers,
    mask: Numbers | None = None,
    *,
    sigma: Numbers | None = None,
    gradient_map: Numbers | None = None,
    allow_single_shell: bool = False,
    config: FitConfig = FitConfig(),
) -> Maps:
    """Estimate NODDI parameters of every voxel: the driver on the host, which looks at values and goes by chunks.

    jit, vmap and grad do not go through it; `fit_voxels` is the same fit for them.

    Args:
        signals: (*voxel, image) magnitudes, not normalised: each voxel is divided by its mean over the b = 0 rows. Any
            sequence of numbers, as are the others.
        bvals: (image,) b-values in s/mm^2, at least one at or below `config.b0_threshold`.
        bvecs: (image, 3) or (3, image) unit directions; ignored at b = 0.
        mask: (*voxel) voxels to fit; None fits all.
        sigma: Noise of each channel, in the unit of `signals`, one number or (*voxel): maximises the Rician likelihood.
            None minimises squares, which biases maps where the signal meets the noise floor.
        gradient_map: (*voxel, 3, 3) what the gradients are multiplied by in each voxel, where they vary over space: the
            identity plus the gradient nonlinearity. Its change of length changes b.
        allow_single_shell: Fit although only one shell is weighted. Its maps are not NODDI.
        config: Model constants and tolerances.

    Returns:
        Maps in the shape of the voxels. A voxel whose signal is none is 0 and flagged.

    Raises:
        InputError: An argument is not what it should be, by its name: a table that `check_gradients` or
            `check_protocol` refuses, shapes that disagree, a noise level not above 0, no voxel inside the mask, another
            model than NODDI, an array that jax traces.

    Source: Zhang et al., NeuroImage 2012 (model); Hernandez-Fernandez et al., NeuroImage 2019 (cuDIMOT's steps).
    """
    given = {"signals": signals, "bvals": bvals, "bvecs": bvecs, "sigma": sigma, "gradient_map": gradient_map}
    require_values("noddi.fit", "noddi.fit_voxels", **given)
    if config.model != "noddi":
        raise InputError("config.model", "noddi", config.model, "call `estimate`")
    array = as_numbers(signals, "signals", np.float32)
    if array.ndim == 0:
        raise InputError("signals", "an array of shape (*voxel, image)", "one number")
    gradients = check_gradients(bvals, bvecs, b0_threshold=config.b0_threshold, num_images=array.shape[-1])
    notes = check_protocol(gradients, "bvals", config.b0_threshold, needs_two_shells=not allow_single_shell)
    rows = estimate(array, gradients, mask, sigma=sigma, gradient_map=gradient_map, config=config)
    return name_maps(rows)._replace(notes=(*gradients.notes, *notes))


def estimate(
    signals: Float[np.ndarray, "*voxel image"],
    gradients: GradientTable,
    mask: Numbers | None = None,
    *,
    sigma: Numbers | None = None,
    gradient_map: Numbers | None = None,
    config: FitConfig = FitConfig(),
    finished: Estimates | None = None,
    on_block: Callable[[int, int, Estimates], None] | None = None,
) -> Estimates:
    """Fit the model that `config` names to a checked table; see `fit`.

    Args:
        signals: Magnitudes.
        gradients: From `check_gradients` or a reader, with unweighted and weighted rows: see `check_protocol`.
        mask: Voxels to fit.
        sigma: Noise of each channel.
        gradient_map: Matrix of each voxel, see `fit`; NODDI only.
        config: Model and tolerances.
        finished: Estimates of an interrupted call on the same input, one row per voxel inside the mask, in order: the
            first ones, which are not fitted again.
        on_block: Called with (voxels done, voxels in all, rows so far) after each block of chunks.

    Raises:
        InputError: An argument is not what it should be, by its name.
    """
    if gradient_map is not None and config.model != "noddi":
        raise InputError("gradient_map", "the model noddi", config.model)
    voxels, inside = gather_voxels(signals, mask, sigma, gradient_map)
    noise: Noise = "gaussian" if sigma is None else "rician"
    programs = make_programs(gradients.bvals, gradients.bvecs, noise, config, gradient_map is not None)
    count = len(voxels.signals)
    chunk_size = config.chunk_size or (2048 if jax.default_backend() == "cpu" else 65536)
    # A power of two for few voxels: programs are compiled for few sizes.
    size = min(chunk_size, max(128, 2 ** (count - 1).bit_length()))
    done = 0 if finished is None else len(finished.fitted)
    parts = [] if finished is None else [finished]
    for rows in ascend_blocks(programs, voxels, size, config.max_iterations, config.damping, done):
        parts = [jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts, rows)]
        done += len(rows[0])
        if on_block is not None:
            on_block(done, count, parts[0])
    return Estimates(*(fill_mask(np.asarray(row), inside) for row in parts[0]))


def collect_maps(
    rows: Estimates, model: MicrostructureModel, modulated: bool, posterior: Posterior | None = None
) -> MapsByName:
    """Return every map of a fit."""
    maps = {}
    prior = "over a flat prior on every parameter and on the direction"
    for index, (name, definition, unit) in enumerate(parameter[:3] for parameter in model.parameters):
        maps[name] = (rows.values[..., index], definition, unit)
        error = f"standard error of {name} (Laplace, from the Fisher information), at most the width of its range"
        maps[f"{name}_error"] = (rows.errors[..., index], error, unit)
        if posterior is not None:
            for kind, said, part in (("mean", "mean", posterior.mean), ("sd", "standard deviation", posterior.sd)):
                array = fill_mask(part[:, index], rows.fitted)
                maps[f"{name}_{kind}"] = (array, f"posterior {said} of {name} {prior}", unit)
    if posterior is not None:
        definition = "mean acceptance rate of the Markov chain; far below 0.5 it did not move well"
        maps["posterior_acceptance"] = (fill_mask(posterior.acceptance, rows.fitted), definition, "1")
    for name, (definition, unit) in DEFINITIONS.items():
        maps[name] = (getattr(rows, name), definition, unit)
    done = rows.fitted & (rows.flags & FLAGS["not_converged"] == 0)
    maps["converged"] = (done.astype(np.uint8), "1 where the fit met its tolerance", "1")
    if modulated and "fwf" in model.names:
        for name in WHERE_TISSUE:
            array = np.where(rows.fitted, maps[name][0] * (1 - maps["fwf"][0]), 0.0)
            maps[f"{name}_modulated"] = (array, f"{name} times (1 - fwf): {name} weighted by its tissue", "1")
    return maps


def describe_maps(
    rows: Estimates,
    signals: Float[np.ndarray, "*voxel image"],
    gradients: GradientTable,
    mask: Bool[np.ndarray, "*voxel"],
    config: FitConfig,
) -> list[str]:
    """Say what a reader of the maps must know and could not see in them."""
    notes = []
    fitted, threshold, free = rows.fitted, config.b0_threshold, config.tissue.free_diffusivity
    is_noddi = config.model == "noddi"
    weighted = gradients.bvals > threshold
    if is_noddi and not has_two_shells(gradients.bvals[weighted], gradients.bvecs[weighted]):
        notes.append("Only one shell is weighted: neurite density and free water cannot be told apart.")
    diffusivity = float(np.median(rows.mean_diffusivity[fitted]))
    anisotropy = float(np.median(rows.fractional_anisotropy[fitted]))
    if is_noddi and anisotropy < 0.1 and diffusivity > 1.5:
        text = f"This is free water: diffusion is isotropic (median anisotropy {anisotropy:.3f}) and fast "
        text += f"(median diffusivity {diffusivity:.2f} um^2/ms). "
        if abs(diffusivity - free) > 0.15 * free:
            text += f"The model's free water has {free:g} um^2/ms, as at body temperature, so the free water fraction "
            text += f"cannot reach 1; give --fit.tissue.free-diffusivity {diffusivity:.2f} if this is a phantom."
        notes.append(text.strip())
    count = int(fitted.sum())
    for flag, meaning in SAID.items():
        flagged = int((fitted & (rows.flags & FLAGS[flag] > 0)).sum())
        if flagged > 0.005 * count:
            said = meaning.format(iterations=config.max_iterations)
            notes.append(f"In {flagged:,} of {count:,} voxels {said}; map 'flags' shows them.")
    refused = int((mask & (rows.flags == FLAGS["no_signal"])).sum())
    if refused:
        notes.append(f"{refused:,} voxels hold no diffusion signal and were not fitted; map 'flags' shows them.")
    inside, highest = (signals[fitted], rows.s0[fitted]), max(free, diffusivity)
    return notes + attenuation_notes(*inside, gradients.bvals, threshold, highest)


def make_programs(bvals: np.ndarray, bvecs: np.ndarray, noise: Noise, config: FitConfig, varies: bool) -> Programs:
    """Bind the compiled steps to one protocol; two protocols of the same shells share their compilation."""
    protocol = prepare(bvals, bvecs, config, varies=varies)
    # What only the host reads, and what the tables hold already, must not make another program.
    tissue = config.tissue if varies else Tissue()
    config = dataclasses.replace(
        config, chunk_size=None, max_iterations=1, b0_threshold=50.0, order=None, tissue=tissue
    )
    return Programs(*(functools.partial(step, protocol, noise, config) for step in (begin, advance, finish)))
