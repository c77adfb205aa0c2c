"""Self-play: rows `env_pixel`, `env_patch` and `ppo_iteration`, peers NumPy, gymnasium and stable-baselines3.

`env_pixel` is the pixel game's rules alone: both players' actions are given, the verifier is linear, sum_i w_i s_i with
one product of masks and weights on either side. Actions are the numbers of the pixels, as the U-Net policy draws them,
or a desire for each pixel, which the game has to rank first. The peer is `reference_games.py`: the same rules in NumPy
over all games at once. `sampling` times the drawing of the numbers for both players, apart. `mismatch` is the share of
pixels in which the two final masks differ. `verifier` times what a learned verifier costs a step: the reference's
network (3.4 M parameters) scores both players' masks, the image's branch computed once; the peer is PyTorch, which
computes it with every mask, as the reference does, or once too. `difference` is the largest of the logits.

`env_patch` is the patch game with 256 patches and given moves; the second peer is one game after another behind
gymnasium's interface, timed on a part of the steps and scaled. `mismatch` counts rewards that differ.

`ppo_iteration` is an iteration of self-play in the reference's form: 4096 steps, separate networks of 64-64 units for
policy and value on the flattened observation, ten epochs in minibatches of 64, against a frozen past self, the linear
verifier. stable-baselines3 plays one game, as the reference does, or 64 at a time in a vectorised environment of NumPy.

`million_steps_per_s` counts steps of games. Games do not know of each other, so in the rows of the environments every
core plays its own share of them, by `shard_map` over as many virtual devices.
"""

import dataclasses
import itertools
import os
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

# Before jax is imported, or it has no effect; an accelerator does not look at it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={len(os.sched_getaffinity(0))}"
)

import jax
import jax.numpy as jnp
import numpy as np
import reference_games as reference
from jax.sharding import PartitionSpec
from timing import (
    Conditions,
    Measurement,
    Peak,
    Row,
    alternate,
    compile_apart,
    describe_cpu,
    emit,
    make_rows,
    measure_peak,
    parse_config,
    prepare,
    versions,
)

from jaxmed.models.mask_verifier import DEMO_VERIFIER, make_verifier
from jaxmed.models.policy import GaussianMlpConfig
from jaxmed.rl import patch_game, pixel_game, selfplay
from jaxmed.rl.distributions import sample
from jaxmed.rl.opponents import OpponentConfig
from jaxmed.rl.patch_game import Move, PatchGame
from jaxmed.rl.pixel_game import PixelGame
from jaxmed.rl.policies import make_policy
from jaxmed.rl.ppo import SB3
from jaxmed.rl.selfplay import SelfPlayConfig


class Workload(NamedTuple):
    """One size.

    Attributes:
        edge: Of the pixel game's images.
        games: Played at a time, for each row of `env_pixel`.
        steps: Of each in a timed call.
        patch_games: Of `env_patch`.
        turns: Of each in a timed call.
        gym_steps: Steps that gymnasium is timed on.
        judged: Games of which the learned verifier scores both players' masks, on 32 x 32.
        ppo_games: Of `ppo_iteration`, on 32 x 32.
        ppo_steps: Of each.
        epochs: Passes over them.
    """

    edge: int
    games: tuple[int, ...]
    steps: int
    patch_games: int
    turns: int
    gym_steps: int
    judged: int
    ppo_games: int
    ppo_steps: int
    epochs: int


WORKLOADS = {
    "smoke": Workload(16, (16,), 4, 64, 8, 200, 4, 8, 16, 1),
    "cpu": Workload(32, (256, 4096), 16, 4096, 64, 20_000, 128, 64, 64, 10),
    "gpu": Workload(32, (16384,), 64, 65536, 64, 20_000, 16384, 64, 64, 10),
}
WORKLOADS["pod"] = WORKLOADS["gpu"]
PATCHES = 256


def main() -> None:
    """Measure and print the rows."""
    config = parse_config(__doc__)
    conditions = prepare(config)
    peak = measure_peak()
    work = WORKLOADS[config.size]
    rows = []
    for games in work.games:
        for kind in ("numbers", "desires"):
            rows += measure_pixel(work, games, kind, config.peer, config.repeats, conditions, peak)
    rows += measure_sampling(work, config.peer, config.repeats, conditions, peak)
    rows += measure_verifier(work, config.peer, config.repeats, conditions, peak)
    rows += measure_patch(work, config.peer, config.repeats, conditions, peak)
    rows += measure_ppo(work, config.peer, config.repeats, conditions, peak)
    emit(rows, config.json)


def measure_pixel(
    work: Workload, games: int, kind: str, with_peer: bool, repeats: int, conditions: Conditions, peak: Peak
) -> list[Row]:
    """Measure steps of the pixel game under the fair rule."""
    shape, noise = (work.edge, work.edge), np.random.default_rng(0)
    game, pixels = PixelGame(), work.edge**2
    flips = game.num_flips(shape)
    weights = noise.normal(size=pixels).astype("f")
    start = noise.random((games, *shape)) < 0.4
    desires = noise.normal(size=(work.steps, 2, games, pixels)).astype("f")
    if kind == "numbers":
        actions = np.argpartition(desires, pixels - flips, axis=-1)[..., -flips:].astype("i4")
    else:
        actions = desires.reshape(work.steps, 2, games, *shape)
    state = pixel_game.State(
        jnp.zeros(games, jnp.int32), jnp.asarray(start), jnp.zeros(games), jnp.zeros(games, jnp.int32)
    )

    def verify(image: jax.Array, masks: jax.Array) -> jax.Array:
        del image
        return masks.reshape(-1, pixels) @ jnp.asarray(weights)

    def advance(state: pixel_game.State, pair: jax.Array) -> tuple[pixel_game.State, jax.Array]:
        after, reward, _, _ = pixel_game.step(game, verify, state, pair[0], pair[1])
        return after, reward

    whole = by_core(lambda state, actions: jax.lax.scan(advance, state, actions), (0, 2), (0, 1))
    inputs = place((state, jnp.asarray(actions)), (0, 2))
    run = compile_apart(whole, *inputs)
    one = compile_apart(advance, state, jnp.asarray(actions[0]))
    ours = partial(run.call, *inputs)

    def play() -> np.ndarray:
        mask, value = start, np.zeros(games, "f")
        for pair in actions:
            if kind == "numbers":
                marks = (reference.mark_numbers(chosen, pixels).reshape(games, *shape) for chosen in pair)
            else:
                marks = (reference.mark_top(wanted, flips) for wanted in pair)
            judge = partial(linear_numpy, weights)
            mask, value, _, _ = reference.pixel_step(judge, None, mask, value, *marks)  # pyright: ignore
        return mask

    functions: dict[str, Callable[[], Any]] = {"jaxmed": ours}
    if with_peer:
        functions["NumPy"] = play
    accuracy = {}
    if with_peer:
        accuracy["mismatch"] = float(np.mean(np.asarray(ours()[0].mask) != play()))
    steps = games * work.steps
    counted = None if one.bytes is None else one.bytes * work.steps
    measured = collect(alternate(functions, repeats), steps, conditions, run.seconds, counted, accuracy)
    text = f"{games} games of {work.edge} x {work.edge}, {work.steps} steps, {flips} flips given as {kind}"
    return make_rows("env_pixel", text, measured, conditions, peak)


def linear_numpy(weights: np.ndarray, image: Any, masks: np.ndarray) -> np.ndarray:
    """Return sum_i w_i s_i of each mask."""
    del image
    return masks.reshape(len(masks), -1).astype("f") @ weights


def measure_sampling(work: Workload, with_peer: bool, repeats: int, conditions: Conditions, peak: Peak) -> list[Row]:
    """Measure how long both players' draws of ordered pixels take, by Gumbel noise on either side."""
    games, pixels = work.games[-1], work.edge**2
    flips = PixelGame().num_flips((work.edge, work.edge))
    logits = jnp.zeros((games, pixels))

    def draw(keys: jax.Array, logits: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(sample(one, logits, flips) for one in jax.random.split(keys[0]))

    inputs = place((jax.random.split(jax.random.key(0), jax.device_count()), logits), (0, 0))
    run = compile_apart(by_core(draw, (0, 0), (0, 0)), *inputs)
    generator = np.random.default_rng(0)

    def numpy_draw() -> list[np.ndarray]:
        drawn = []
        for _ in range(2):
            noisy = np.asarray(logits) - np.log(
                np.maximum(generator.standard_exponential((games, pixels), np.float32), 1e-30)
            )
            best = np.argpartition(noisy, pixels - flips, axis=1)[:, -flips:]
            order = np.argsort(-np.take_along_axis(noisy, best, axis=1), axis=1)
            drawn.append(np.take_along_axis(best, order, axis=1))
        return drawn

    functions: dict[str, Callable[[], Any]] = {"jaxmed": partial(run.call, *inputs)}
    if with_peer:
        functions["NumPy"] = numpy_draw
    measured = collect(alternate(functions, repeats), games, conditions, run.seconds, run.bytes, {}, run.flops)
    text = f"sampling apart: {games} games of {work.edge} x {work.edge}, 1 step, {flips} flips of both players"
    return make_rows("env_pixel", text, measured, conditions, peak)


def measure_verifier(work: Workload, with_peer: bool, repeats: int, conditions: Conditions, peak: Peak) -> list[Row]:
    """Measure a learned verifier's scores of both players' masks."""
    noise, shape, count = np.random.default_rng(0), (32, 32), 2 * work.judged
    verifier = make_verifier(DEMO_VERIFIER)
    image = jnp.asarray(noise.random((1, *shape, 1)), jnp.float32)
    masks = jnp.asarray(noise.random((count, *shape)) < 0.4, jnp.float32)
    params = verifier.init(jax.random.key(0), image, masks[:1])
    embedding = jax.jit(verifier.embed)(params, image)

    def score(params: Any, embedding: jax.Array, masks: jax.Array) -> jax.Array:
        return verifier.score(params, jnp.broadcast_to(embedding, (len(masks), embedding.shape[-1])), masks)

    run = compile_apart(score, params, embedding, masks)
    functions: dict[str, Callable[[], Any]] = {"jaxmed": partial(run.call, params, embedding, masks)}
    accuracy: dict[str, float] = {}
    if with_peer:
        with_every, once = make_torch_verifier(params, np.asarray(image), np.asarray(masks), len(conditions.cores))
        functions |= {"PyTorch": with_every, "PyTorch, image once": once}
        accuracy["difference"] = float(np.abs(np.asarray(functions["jaxmed"]()) - with_every().numpy()).max())
    widths, edge, products = (1, *DEMO_VERIFIER.widths), shape[0], 0
    for before, after in itertools.pairwise(widths):
        products, edge = products + edge**2 * 9 * before * after, edge // 2
    for before, after in itertools.pairwise((2 * widths[-1], *DEMO_VERIFIER.dense, 1)):
        products += before * after
    flops = 2.0 * products * count
    measured = collect(alternate(functions, repeats), work.judged, conditions, run.seconds, None, accuracy, flops)
    text = f"verifier apart: both masks of {work.judged} games of 32 x 32, the reference's network"
    return make_rows("env_pixel", text, measured, conditions, peak)


def make_torch_verifier(
    params: Any, image: np.ndarray, masks: np.ndarray, threads: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the same network in PyTorch on all masks: with the image's branch for every mask, and once."""
    import torch

    torch.set_num_threads(threads)

    def tensor(array: Any) -> Any:
        return torch.from_numpy(np.array(array))

    def branch(weights: Any) -> Any:
        layers: list[Any] = []
        for number in range(len(DEMO_VERIFIER.widths)):
            kernel = tensor(weights[f"layer_{number}"]["kernel"]).permute(3, 2, 0, 1)
            layer = torch.nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
            layer.weight.data, layer.bias.data = kernel.contiguous(), tensor(weights[f"layer_{number}"]["bias"])
            layers += [layer, torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        return torch.nn.Sequential(*layers, torch.nn.Flatten()).to(memory_format=torch.channels_last)

    names = [f"dense_{number}" for number in range(len(DEMO_VERIFIER.dense))] + ["head"]
    heads: list[Any] = []
    for name in names:
        layer = torch.nn.Linear(*params[name]["kernel"].shape)
        layer.weight.data, layer.bias.data = tensor(params[name]["kernel"]).T.contiguous(), tensor(params[name]["bias"])
        heads += [layer, torch.nn.ReLU()]
    head, of_image, of_mask = torch.nn.Sequential(*heads[:-1]), branch(params["image"]), branch(params["mask"])
    seen = tensor(image).permute(0, 3, 1, 2)
    proposed = tensor(masks)[:, None].contiguous(memory_format=torch.channels_last)
    repeated = seen.expand(len(masks), -1, -1, -1).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def with_every() -> Any:
        return head(torch.cat([of_image(repeated), of_mask(proposed)], 1))[:, 0]

    @torch.inference_mode()
    def once() -> Any:
        features = of_mask(proposed)
        return head(torch.cat([vector.expand(len(features), -1), features], 1))[:, 0]

    with torch.inference_mode():
        vector = of_image(seen)
    return with_every, once


def measure_patch(work: Workload, with_peer: bool, repeats: int, conditions: Conditions, peak: Peak) -> list[Row]:
    """Measure turns of the patch game."""
    noise, games, turns = np.random.default_rng(0), work.patch_games, work.turns
    scores = noise.random((8, PATCHES)).astype("f")
    image = (np.arange(games) % 8).astype("i4")
    patch = noise.integers(0, PATCHES, (turns, 2, games)).astype("i4")
    stop = noise.random((turns, 2, games)) < 0.001
    state = patch_game.reset(jnp.zeros((8, PATCHES), bool), jnp.asarray(image))
    rules = PatchGame()

    def advance(state: patch_game.State, moves: tuple[jax.Array, jax.Array]) -> tuple[patch_game.State, jax.Array]:
        own, rival = (Move(moves[0][side], moves[1][side]) for side in (0, 1))
        after, reward, _, _ = patch_game.step(rules, jnp.asarray(scores), state, own, rival)
        return after, reward

    whole = by_core(lambda state, moves: jax.lax.scan(advance, state, moves), (0, 2), (0, 1))
    inputs = place((state, (jnp.asarray(patch), jnp.asarray(stop))), (0, 2))
    run = compile_apart(whole, *inputs)
    one = compile_apart(advance, state, (jnp.asarray(patch[0]), jnp.asarray(stop[0])))

    def play() -> np.ndarray:
        erased, rewards = np.zeros((games, PATCHES), bool), []
        for turn in range(turns):
            moves = patch[turn, 0], stop[turn, 0], patch[turn, 1], stop[turn, 1]
            erased, reward, _ = reference.patch_step(scores[image], erased, np.full(games, turn), *moves)
            rewards.append(reward)
        return np.stack(rewards)

    ours = partial(run.call, *inputs)
    functions: dict[str, Callable[[], Any]] = {"jaxmed": ours}
    accuracy: dict[str, float] = {}
    if with_peer:
        functions["NumPy"] = play
        functions["gymnasium"] = make_gym_player(scores[0], patch, work.gym_steps)
        accuracy["mismatch"] = float(np.mean(np.asarray(ours()[1]) != play()))
    seconds = alternate(functions, repeats)
    if "gymnasium" in seconds:
        scale = games * turns / work.gym_steps
        seconds["gymnasium"] = tuple(scale * value for value in seconds["gymnasium"])
    counted = None if one.bytes is None else one.bytes * turns
    measured = collect(seconds, games * turns, conditions, run.seconds, counted, accuracy)
    text = f"{games} games of {PATCHES} patches, {turns} turns, moves given"
    return make_rows("env_patch", text, measured, conditions, peak)


def make_gym_player(scores: np.ndarray, patch: np.ndarray, steps: int) -> Callable[[], float]:
    """Return a loop over a game in gymnasium's form, without stops."""
    game = reference.make_patch_environment(scores)
    moves = patch.transpose(2, 0, 1).reshape(-1, 2)[:steps]

    def play() -> float:
        game.reset()
        total = 0.0
        for number in range(steps):
            if number % 64 == 0:
                game.reset()
            own, rival = moves[number % len(moves)]
            total += float(game.step((own, 0, rival, 0))[1])
        return total

    return play


def measure_ppo(work: Workload, with_peer: bool, repeats: int, conditions: Conditions, peak: Peak) -> list[Row]:
    """Measure an iteration of self-play and PPO."""
    shape, noise = (32, 32), np.random.default_rng(0)
    weights = (0.02 * noise.normal(size=shape)).astype("f")
    image = noise.random(shape).astype("f")
    start = noise.random(shape) < 0.4
    samples = work.ppo_games * work.ppo_steps
    config = SelfPlayConfig(
        game=PixelGame(),
        ppo=dataclasses.replace(SB3, epochs=work.epochs, minibatches=samples // 64),
        opponents=OpponentConfig(schedule="latest", live=0.0, groups=1, every=2),
        games=work.ppo_games,
        steps=work.ppo_steps,
        symmetric=False,
        scale_rewards=False,
    )
    policy = make_policy(GaussianMlpConfig(), config.game, shape)

    def verify(weights: jax.Array, image: jax.Array, masks: jax.Array) -> jax.Array:
        del image
        return masks.reshape(len(masks), -1) @ weights.reshape(-1)

    problem = selfplay.make_problem(verify, jnp.asarray(weights), jnp.asarray(image[None]), jnp.asarray(start[None]))
    state = selfplay.init(jax.random.key(0), config, policy, problem)
    run = compile_apart(partial(selfplay.iterate, config, policy, verify), problem, state)
    functions: dict[str, Callable[[], Any]] = {"jaxmed": partial(run.call, problem, state)}
    if with_peer:
        game = (image, start, weights, len(conditions.cores))
        functions["stable-baselines3"] = make_sb3(1, samples, work.epochs, *game)
        name = f"stable-baselines3, {work.ppo_games} games"
        functions[name] = make_sb3(work.ppo_games, samples, work.epochs, *game)
    seconds = alternate(functions, repeats)
    # Forward and backward passes of the update, and the passes of both players and of the bootstrap's values.
    layers = 2 * (2048 * 64 + 64 * 64) + 64 * 1024 + 64
    flops = 2.0 * layers * (3 * work.epochs + 2) * samples
    measured = collect(seconds, samples, conditions, run.seconds, None, {}, flops)
    text = f"{samples} steps on 32 x 32 ({work.ppo_games} games), {work.epochs} epochs in minibatches of 64"
    return make_rows("ppo_iteration", text, measured, conditions, peak)


def make_sb3(
    games: int, samples: int, epochs: int, image: np.ndarray, start: np.ndarray, weights: np.ndarray, threads: int
) -> Callable[[], Any]:
    """Return an iteration of stable-baselines3's PPO against a frozen copy of itself."""
    import copy

    import torch
    from stable_baselines3 import PPO

    torch.set_num_threads(threads)
    rival: list[Any] = []

    def answer(observation: np.ndarray) -> np.ndarray:
        return rival[0].predict(observation)[0]

    judge = partial(linear_numpy, weights.reshape(-1))
    if games == 1:
        game = reference.make_pixel_environment(
            image, start, lambda mask: float(judge(None, mask[None])[0]), answer, 0.01, 1024
        )
    else:
        game = reference.make_pixel_vector(image, start, judge, answer, 0.01, 1024, games)
    learner = PPO(
        "MlpPolicy", game, n_steps=samples // games, batch_size=64, n_epochs=epochs, ent_coef=0.01, device="cpu"
    )
    rival.append(copy.deepcopy(learner.policy))

    def iterate() -> None:
        learner.learn(samples, reset_num_timesteps=False)

    return iterate


def make_specs(axes: tuple[int, ...]) -> tuple[PartitionSpec, ...]:
    """Return where the games' axis stands, as jax wants to be told."""
    return tuple(PartitionSpec(*[None] * axis, "games") for axis in axes)


def make_mesh() -> jax.sharding.Mesh:
    """Return all devices in a row."""
    return jax.make_mesh((jax.device_count(),), ("games",), axis_types=(jax.sharding.AxisType.Auto,))


def by_core(function: Callable[..., Any], inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Callable[..., Any]:
    """Let every device run a function on its share of the games.

    Args:
        function: Of trees of arrays.
        inputs: The games' axis in the arrays of each argument.
        outputs: And of each result.
    """
    return jax.shard_map(
        function, mesh=make_mesh(), in_specs=make_specs(inputs), out_specs=make_specs(outputs), check_vma=False
    )


def place(trees: tuple[Any, ...], axes: tuple[int, ...]) -> tuple[Any, ...]:
    """Put each device's share of the games there."""
    mesh = make_mesh()
    return tuple(
        jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))
        for tree, spec in zip(trees, make_specs(axes), strict=True)
    )


def collect(
    seconds: Mapping[str, tuple[float, ...]],
    steps: int,
    conditions: Conditions,
    compile_s: float,
    counted: float | None,
    accuracy: dict[str, float],
    flops: float | None = None,
) -> dict[str, Measurement]:
    """Turn times into measurements with the rate of steps beside them."""
    measured = {}
    for name, values in seconds.items():
        rate = {"million_steps_per_s": steps / statistics.median(values) / 1e6}
        if name == "jaxmed":
            measured[name] = Measurement(values, compile_s, flops, counted, rate | accuracy)
        else:
            package = {"NumPy": "numpy", "gymnasium": "gymnasium"}.get(name)
            if name.startswith("PyTorch"):
                package = "torch"
            found = versions(package) if package else versions("stable-baselines3", "torch", "gymnasium")
            device = describe_cpu(conditions.cores) if jax.default_backend() != "cpu" else None
            measured[name] = Measurement(values, accuracy=rate, versions=found, device=device)
    return measured


if __name__ == "__main__":
    main()
