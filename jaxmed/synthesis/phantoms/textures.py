"""Pictures that are no medical images: smooth clouds, gratings and shapes in random colours; a pure function of a key.

What a generalist encoder is pre-trained on, where the specialist sees `retina`: edges, textures and blobs of all sizes,
but no vessels, no dots on a disc, and no frame of its own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

SCALES = (3, 8, 20)  # of clouds: random numbers along an edge
GRATINGS = 3
SHAPES = 6


def make_texture(key: Key[Array, ""], edge: int = 64) -> Float[Array, "edge edge 3"]:
    """Make one picture; `vmap` over keys makes many.

    Args:
        key: Consumed.
        edge: Pixels of the picture's edge; static.

    Returns:
        Red, green and blue, in [0, 1].
    """
    cloud_key, grating_key, shape_key, mix_key = jax.random.split(key, 4)
    places = (jnp.arange(edge) - (edge - 1) / 2) * 2 / edge
    x, y = places[None, :], places[:, None]
    layers = [
        jax.image.resize(jax.random.normal(one, (min(n, edge),) * 2), (edge, edge), "cubic")
        for n, one in zip(SCALES, jax.random.split(cloud_key, len(SCALES)), strict=True)
    ]
    turn, wave, phase = (jax.random.uniform(one, (GRATINGS,)) for one in jax.random.split(grating_key, 3))
    cycles = jnp.exp(jnp.log(1.0) + wave * jnp.log(edge / 8.0))  # from one over half the picture to eight pixels
    for number in range(GRATINGS):
        along = jnp.cos(jnp.pi * turn[number]) * x + jnp.sin(jnp.pi * turn[number]) * y
        layers.append(jnp.sin(2 * jnp.pi * (cycles[number] * along + phase[number])))
    colours = jax.random.normal(mix_key, (len(layers), 3)) * 0.6
    picture = jax.nn.sigmoid(jnp.einsum("lrc,lk->rck", jnp.stack(layers), colours))
    for one in jax.random.split(shape_key, SHAPES):
        picture = _add_shape(one, picture, x, y, edge)
    return picture


def _add_shape(key, picture, x, y, edge):
    """Lay an ellipse or a rectangle of one colour over a picture."""
    place_key, size_key, turn_key, colour_key, kind_key = jax.random.split(key, 5)
    middle = jax.random.uniform(place_key, (2,), minval=-1.0, maxval=1.0)
    radius = jax.random.uniform(size_key, (2,), minval=0.08, maxval=0.5)
    turn = jax.random.uniform(turn_key, maxval=jnp.pi)
    along = jnp.cos(turn) * (x - middle[0]) + jnp.sin(turn) * (y - middle[1])
    aside = jnp.cos(turn) * (y - middle[1]) - jnp.sin(turn) * (x - middle[0])
    scaled = jnp.abs(along / radius[0]), jnp.abs(aside / radius[1])
    round_one, square_one = jnp.sqrt(scaled[0] ** 2 + scaled[1] ** 2 + 1e-9), jnp.maximum(*scaled)
    distance = jnp.where(jax.random.bernoulli(kind_key), round_one, square_one) - 1
    share = 0.85 * jnp.clip(0.5 - distance * radius.min() * edge / 2, 0.0, 1.0)[..., None]
    return picture + share * (jax.random.uniform(colour_key, (3,)) - picture)
