"""The losses of DINOv2: centres, Sinkhorn-Knopp, weights of crops and of hidden patches, and KoLeo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from jaxmed.objectives.dino import (
    centred_targets,
    class_token_losses,
    gram_loss,
    koleo,
    move_centre,
    patch_loss,
    sinkhorn_targets,
    target_entropy,
)

pytestmark = pytest.mark.core
IMAGES, CROPS, PROTOTYPES = 5, 3, 11
GENERATOR = np.random.default_rng(0)


def scores(*shape):
    """Cosines, as a head gives them."""
    return GENERATOR.uniform(-1, 1, (*shape, PROTOTYPES)).astype(np.float32)


GLOBAL, LOCAL, TEACHER = scores(IMAGES, 2), scores(IMAGES, CROPS), scores(IMAGES, 2)
FLAT = TEACHER.reshape(-1, PROTOTYPES)


# The teacher -------------------------------------------------------------------------------------------------------


def test_a_centre_moves_towards_the_mean_score_of_tokens():
    centre = scores()
    weight = np.array([1, 1, 0, 1, 0, 0, 0, 0, 0, 0], np.float32)
    found = move_centre(jnp.asarray(centre), jnp.asarray(FLAT), jnp.asarray(weight), 0.9)
    np.testing.assert_allclose(found, 0.9 * centre + 0.1 * FLAT[[0, 1, 3]].mean(axis=0), rtol=1e-5, atol=1e-7)
    still = move_centre(jnp.asarray(centre), jnp.asarray(FLAT), jnp.zeros(10), 0.9)
    np.testing.assert_array_equal(still, centre)


def test_targets_of_a_centre_are_the_softmax_of_what_is_left():
    centre = scores()
    found = centred_targets(jnp.asarray(TEACHER), jnp.asarray(centre), 0.07)
    np.testing.assert_allclose(found, softmax((TEACHER - centre) / 0.07, axis=-1), rtol=2e-5, atol=1e-7)
    # Scores that are their centre say nothing.
    flat = centred_targets(jnp.asarray(np.tile(centre, (4, 1))), jnp.asarray(centre), 0.07)
    np.testing.assert_allclose(flat, 1 / PROTOTYPES, rtol=1e-6)


def by_division(rows, temperature, iterations):
    """Sinkhorn-Knopp as it is written: prototypes by tokens, the total first, float64."""
    shares = np.exp(rows.astype(np.float64) / temperature).T
    prototypes, count = shares.shape
    shares /= shares.sum()
    for _ in range(iterations):
        shares /= shares.sum(axis=1, keepdims=True) * prototypes
        shares /= shares.sum(axis=0, keepdims=True) * count
    return (shares * count).T


def test_sinkhorn_is_what_is_written():
    found = sinkhorn_targets(jnp.asarray(FLAT), jnp.ones(10), 0.04)
    np.testing.assert_allclose(found, by_division(FLAT, 0.04, 3), rtol=1e-3, atol=1e-7)


def test_sinkhorn_lets_tokens_sum_to_1_and_prototypes_be_used_alike():
    found = sinkhorn_targets(jnp.asarray(FLAT), jnp.ones(10), 0.3, iterations=50)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.sum(axis=0), 10 / PROTOTYPES, rtol=1e-4)
    few = sinkhorn_targets(jnp.asarray(FLAT), jnp.ones(10), 0.07)
    np.testing.assert_allclose(few.sum(axis=1), 1, rtol=1e-5)


def test_rows_that_fill_up_change_nothing_and_get_nothing():
    filled = np.concatenate([FLAT, 50 * scores(6)])
    weight = jnp.asarray(np.repeat([1.0, 0.0], [10, 6]), jnp.float32)
    found = sinkhorn_targets(jnp.asarray(filled), weight, 0.07)
    np.testing.assert_array_equal(found[10:], 0)
    np.testing.assert_allclose(found[:10], sinkhorn_targets(jnp.asarray(FLAT), jnp.ones(10), 0.07), rtol=1e-5)
    np.testing.assert_array_equal(sinkhorn_targets(jnp.asarray(filled), jnp.zeros(16), 0.07), 0)


def test_entropy_is_that_of_the_distribution():
    mixed = jnp.concatenate([jnp.full((3, 8), 1 / 8), jnp.eye(8)[:3]])
    np.testing.assert_allclose(target_entropy(mixed, jnp.ones(6)), np.log(8) / 2, rtol=1e-6)
    np.testing.assert_allclose(target_entropy(mixed, jnp.array([1.0, 1, 0, 0, 0, 0])), np.log(8), rtol=1e-6)
    assert float(target_entropy(mixed, jnp.zeros(6))) == 0


# The student -------------------------------------------------------------------------------------------------------


def test_every_crop_is_compared_with_the_global_crops_that_it_is_not():
    targets = softmax(TEACHER / 0.05, axis=-1)
    student = [GLOBAL[:, 0], GLOBAL[:, 1], *(LOCAL[:, crop] for crop in range(CROPS))]
    pairs = {"of_globals": [], "of_locals": []}
    for number, crop in enumerate(student):
        for other in range(2):
            if number != other:
                entropy = -(targets[:, other] * log_softmax(crop / 0.1, axis=-1)).sum(axis=-1).mean()
                pairs["of_globals" if number < 2 else "of_locals"].append(entropy)
    found = class_token_losses(jnp.asarray(GLOBAL), jnp.asarray(LOCAL), jnp.asarray(targets))
    for name, terms in pairs.items():
        np.testing.assert_allclose(getattr(found, name), sum(terms) / 8, rtol=1e-5)


def test_loss_is_log_k_where_teacher_and_student_say_nothing():
    uniform = jnp.full((IMAGES, 2, PROTOTYPES), 1 / PROTOTYPES)
    found = class_token_losses(jnp.zeros((IMAGES, 2, PROTOTYPES)), jnp.zeros((IMAGES, CROPS, PROTOTYPES)), uniform)
    np.testing.assert_allclose(found.of_globals + found.of_locals, np.log(PROTOTYPES), rtol=1e-6)
    # Of four images two have hidden patches, one and three of them; a row fills up.
    weight = jnp.array([1, 1 / 3, 1 / 3, 1 / 3, 0])
    patches = patch_loss(jnp.zeros((5, PROTOTYPES)), uniform.reshape(-1, PROTOTYPES)[:5], weight, 4)
    np.testing.assert_allclose(patches, np.log(PROTOTYPES) / 2, rtol=1e-6)


def test_loss_of_patches_is_a_mean_over_those_of_each_image():
    guess, targets = scores(4), softmax(scores(4) / 0.05, axis=-1)
    entropy = -(targets * log_softmax(guess / 0.1, axis=-1)).sum(axis=-1)
    weight = np.array([1, 1 / 2, 1 / 2, 0], np.float32)
    found = patch_loss(jnp.asarray(guess), jnp.asarray(targets), jnp.asarray(weight), 6)
    np.testing.assert_allclose(found, (entropy[0] + entropy[1:3].mean()) / 6, rtol=1e-5)


def test_gram_loss_by_hand():
    """Cosines between the patches of each view; lengths do not matter, and turning all patches neither."""
    generator = np.random.default_rng(6)
    student, anchor = generator.standard_normal((2, 3, 5, 4)).astype(np.float32)
    total = 0.0
    for view in range(3):
        for one in range(5):
            for other in range(5):
                cosines = [
                    float(x[view, one] @ x[view, other] / np.linalg.norm(x[view, one]) / np.linalg.norm(x[view, other]))
                    for x in (student, anchor)
                ]
                total += (cosines[0] - cosines[1]) ** 2
    loss = jax.jit(lambda one, other: gram_loss(jnp.asarray(one), jnp.asarray(other)))
    np.testing.assert_allclose(loss(student, anchor), total / (3 * 5 * 5), rtol=1e-5)
    turn = np.linalg.qr(generator.standard_normal((4, 4)))[0].astype(np.float32)
    lengths = generator.uniform(0.5, 2, (3, 5, 1)).astype(np.float32)
    np.testing.assert_allclose(loss(lengths * anchor @ turn, anchor), 0, atol=1e-12)
    right = np.eye(2, dtype=np.float32)[None]  # cosine 0, of patches that the anchor has alike, cosine 1
    assert loss(right, np.ones((1, 2, 2), np.float32)) == pytest.approx(2 / 4)
    assert not np.any(jax.grad(loss, 1)(student, anchor))


def test_koleo_falls_as_points_spread_and_takes_equal_ones():
    axes = jnp.eye(4)
    np.testing.assert_allclose(koleo(7 * axes), -np.log(np.sqrt(2)), rtol=1e-6)
    middle = jnp.ones((4, 4)) / 2
    values = [float(koleo(middle + share * (axes - middle))) for share in (0.1, 0.3, 0.6, 1.0)]
    assert values == sorted(values, reverse=True) and values[0] > values[-1] + 1
    # Two equal points are as far apart as epsilon allows, and have a gradient.
    value, gradient = jax.value_and_grad(koleo)(jnp.ones((3, 4)))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_koleo_is_the_distance_to_the_nearest_other_token():
    tokens = GENERATOR.standard_normal((7, 5)).astype(np.float32)
    directions = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    distances = np.linalg.norm(directions[:, None] - directions[None], axis=-1) + 9 * np.eye(7)
    np.testing.assert_allclose(koleo(jnp.asarray(tokens)), -np.log(distances.min(axis=1)).mean(), rtol=1e-5)


# PyTorch -----------------------------------------------------------------------------------------------------------


@pytest.mark.peers
def test_class_token_losses_and_their_gradient_are_those_of_pytorch():
    """Crops one behind the other, the teacher's global crops swapped, each pair a mean over images."""
    import torch

    targets = by_division(FLAT, 0.07, 3).reshape(IMAGES, 2, PROTOTYPES).astype(np.float32)
    globals_ = torch.tensor(GLOBAL.swapaxes(0, 1).copy(), requires_grad=True)
    locals_ = torch.tensor(LOCAL.swapaxes(0, 1).copy(), requires_grad=True)
    swapped = torch.tensor(targets.swapaxes(0, 1)[::-1].copy())

    def entropy(student, teacher):
        return -(teacher * torch.log_softmax(student / 0.1, dim=-1)).sum(-1).mean()

    pairs = 2 + 2 * CROPS
    of_locals = sum(entropy(crop, target) for crop in locals_ for target in swapped) / pairs
    of_globals = 2 * entropy(globals_.flatten(0, 1), swapped.flatten(0, 1)) / pairs
    (of_locals + of_globals).backward()

    def loss(student):
        found = class_token_losses(*student, jnp.asarray(targets))
        return found.of_locals + found.of_globals, found

    student = (jnp.asarray(GLOBAL), jnp.asarray(LOCAL))
    gradient, found = jax.grad(loss, has_aux=True)(student)
    np.testing.assert_allclose(found.of_locals, of_locals.item(), rtol=1e-5)
    np.testing.assert_allclose(found.of_globals, of_globals.item(), rtol=1e-5)
    for ours, theirs in zip(gradient, (globals_, locals_), strict=True):
        np.testing.assert_allclose(ours, theirs.grad.numpy().swapaxes(0, 1), atol=1e-6)


@pytest.mark.peers
def test_patch_loss_and_its_gradient_are_those_of_pytorch():
    import torch

    masks = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < torch.tensor(
        [[0], [0.4], [0], [0.6], [1], [0]]
    )
    rows = int(masks.sum())
    student, teacher = scores(rows), by_division(scores(rows), 0.07, 3).astype(np.float32)
    each = (1 / masks.sum(-1).clamp(min=1)).unsqueeze(-1).expand_as(masks)[masks]
    theirs = torch.tensor(student, requires_grad=True)
    entropy = (torch.tensor(teacher) * torch.log_softmax(theirs / 0.1, dim=-1)).sum(-1)
    expected = -(entropy * each).sum() / len(masks)
    expected.backward()
    found, gradient = jax.value_and_grad(patch_loss)(
        jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(each.numpy()), len(masks)
    )
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-6)


@pytest.mark.peers
def test_koleo_and_its_gradient_are_those_of_pytorch():
    import torch
    from torch.nn import functional

    tokens = GENERATOR.standard_normal((8, 6)).astype(np.float32)
    theirs = torch.tensor(tokens, requires_grad=True)
    directions = functional.normalize(theirs, eps=1e-8, p=2, dim=-1)
    with torch.no_grad():
        cosines = directions @ directions.T
        nearest = cosines.fill_diagonal_(-1).argmax(dim=1)
    distance = torch.nn.PairwiseDistance(2, eps=1e-8)(directions, directions[nearest])
    expected = -torch.log(distance + 1e-8).mean()
    expected.backward()
    found, gradient = jax.value_and_grad(koleo)(jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-5)
