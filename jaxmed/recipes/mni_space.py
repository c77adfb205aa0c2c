"""MNI space of a subject from its labels: grey and white matter aligned with those of a template.

The template is two maps of shares in MNI space, such as those of ICBM 2009; without one an ellipsoidal head of about
the size of a brain in MNI space takes their place, which tells centre, orientation and size, not more.

Source: BrainFM (arXiv:2509.00549) uses maps whose origin is not known; the affine alignment is ours.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmed.arrays.grid import reorient, resize
from jaxmed.arrays.warping import identity_grid, sample
from jaxmed.data.label_table import TABLES
from jaxmed.data.subject_store import Locate, Location
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.solvers.registration import RegistrationConfig, register_affine
from jaxmed.synthesis.phantoms.cohort import centred_affine
from jaxmed.synthesis.phantoms.heads import draw_head
from jaxmed.volume import Volume, require_same_grid

GREY = (3, 8, 10, 11, 12, 13, 17, 18, 26, 28)
WHITE = (2, 7, 16, 77)
"""Of generation labels."""
GRID = (48, 56, 48)
"""Voxels of the grids that are aligned, over the whole field of view: one program for volumes of any size."""
HEAD_SHAPE, HEAD_SPACING = (48, 56, 48), 4.0
POOR = 0.5
"""Overlap below which an alignment has failed."""


class Tissues(NamedTuple):
    """Shares of grey and white matter on `GRID`."""

    shares: Float[np.ndarray, "x y z tissue"]
    affine: Float[np.ndarray, "4 4"]


def make_locate(template: Sequence[Path], config: RegistrationConfig = RegistrationConfig()) -> Locate:
    """Prepare the alignment of subjects with a template.

    Args:
        template: Maps of grey and of white matter in MNI space; none for the ellipsoids.
        config: Of the alignment.

    Raises:
        InputError: A map cannot be read, or the two are on different grids.
    """
    target = _read_template(template) if template else _ellipsoids()
    align = jax.jit(partial(_align, config=config))

    def locate(labels: Volume) -> Location:
        found = tissues_of(labels)
        matrix, overlap = align(found.shares, found.affine, target.shares, target.affine)
        return Location(np.asarray(matrix, np.float64), float(overlap))

    return locate


def tissues_of(labels: Volume) -> Tissues:
    """Return the grey and white matter of generation labels."""
    shares = [_shrunk(np.isin(labels.array, tissue).astype(np.float32), labels.affine) for tissue in (GREY, WHITE)]
    return Tissues(np.stack([one.array for one in shares], -1), shares[0].affine.astype(np.float32))


def _align(fixed, fixed_affine, moving, moving_affine, config):
    """Return the matrix, and the overlap of both tissues under it."""
    matrix = register_affine(fixed, fixed_affine, moving, moving_affine, config).matrix
    whole = jnp.linalg.inv(moving_affine) @ matrix @ fixed_affine
    places = identity_grid(fixed.shape[:3]) @ whole[:3, :3].T + whole[:3, 3]
    found = sample(moving, places, fill=0.0)
    return matrix, 2 * jnp.minimum(found, fixed).sum() / jnp.maximum((found + fixed).sum(), 1e-6)


def _read_template(paths: Sequence[Path]) -> Tissues:
    if len(paths) != 2:
        raise InputError("template", "two files: grey and white matter", f"{len(paths)}", "leave it out for none")
    volumes = [nifti.read(path, dimensions=(3,), allow_constant=False) for path in paths]
    require_same_grid(volumes[1], volumes[0], str(paths[1]), str(paths[0]))
    # Shares may be stored as 0 to 255 or in per cent.
    shares = [_shrunk(volume.array / volume.array.max(), volume.affine) for volume in map(reorient, volumes)]
    return Tissues(np.stack([one.array for one in shares], -1), shares[0].affine.astype(np.float32))


def _ellipsoids() -> Tissues:
    draw = jax.jit(partial(draw_head, shape=HEAD_SHAPE, spacing=HEAD_SPACING, spread=0.0))
    labels = np.asarray(draw(jax.random.key(0)).labels)
    affine = centred_affine(HEAD_SHAPE, [HEAD_SPACING] * 3)
    affine[1:3, 3] += (-16.0, 4.0)  # from the middle of the ellipsoids to the anterior commissure
    return tissues_of(Volume.make(TABLES["freesurfer"]().generation(labels), affine))


def _shrunk(array: Float[np.ndarray, "x y z"], affine: Float[np.ndarray, "4 4"]) -> Volume:
    return resize(Volume.make(array.astype(np.float32), affine), GRID, order=1)
