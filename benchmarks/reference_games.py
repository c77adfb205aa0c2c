"""The games of self-play in NumPy: the same rules as `jaxmed.rl`, written again over a leading axis of games.

Peers of `bench_selfplay.py` and the yardstick of the tests. Loops run over steps alone; everything within a step is a
NumPy operation on all games. `PixelEnvironment` and `PatchEnvironment` are one game each in gymnasium's form.
"""

import math
from typing import Any

import numpy as np


def count_flips(pixels: int, fraction: float) -> int:
    """Return the number of values at or above a percentile of `pixels` different numbers."""
    values = np.arange(pixels)
    return int(np.sum(values >= np.percentile(values, 100 * (1 - fraction))))


def mark_top(desires: np.ndarray, count: int, at_most: bool = False) -> np.ndarray:
    """Mark the `count` largest of each row, or those of them above 0."""
    flat = desires.reshape(len(desires), -1)
    chosen = np.argpartition(flat, flat.shape[1] - count, axis=1)[:, -count:]
    marked = np.zeros(flat.shape, bool)
    np.put_along_axis(marked, chosen, True, axis=1)
    if at_most:
        marked &= flat > 0
    return marked.reshape(desires.shape)


def mark_numbers(numbers: np.ndarray, pixels: int) -> np.ndarray:
    """Mark the pixels of these numbers; negative ones stay."""
    marked = np.zeros((len(numbers), pixels + 1), bool)
    np.put_along_axis(marked, np.where(numbers < 0, pixels, numbers), True, axis=1)
    return marked[:, :pixels]


def mark_percentile(desires: np.ndarray, fraction: float) -> np.ndarray:
    """Mark the clipped desires at or above the percentile of their row, ties included."""
    flat = np.clip(desires, 0, 1).reshape(len(desires), -1)
    threshold = np.percentile(flat, 100 * (1 - fraction), axis=1, keepdims=True)
    return (flat >= threshold).reshape(desires.shape)


def enlarge(marked: np.ndarray, edges: tuple[int, ...]) -> np.ndarray:
    """Turn marks of super-pixels into marks of voxels."""
    return np.kron(marked, np.ones((1, *edges), bool)).astype(bool)


def pixel_step(
    verify: Any, image: np.ndarray, mask: np.ndarray, value: np.ndarray, flips: np.ndarray, rival: np.ndarray,
    elitist: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Judge two proposals of flips.

    Returns:
        Next masks, their values, the player's rewards, and whether it won.
    """
    own, theirs = mask ^ flips, mask ^ rival
    own_value, their_value = verify(image, own), verify(image, theirs)
    reward = own_value - their_value
    won = reward >= 0
    wide = won.reshape(-1, *(1,) * (mask.ndim - 1))
    after, after_value = np.where(wide, own, theirs), np.where(won, own_value, their_value)
    if elitist:
        worse = after_value < value
        after = np.where(worse.reshape(wide.shape), mask, after)
        after_value = np.where(worse, value, after_value)
    return after, after_value, reward, won


def patch_step(
    scores: np.ndarray, erased: np.ndarray, turn: np.ndarray, patch: np.ndarray, stop: np.ndarray, rival: np.ndarray,
    rival_stop: np.ndarray, min_turns: int = 2, max_turns: int = 2048, factor: float = 100.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Play a turn of the patch game.

    Returns:
        Erased patches after it, rewards of player and rival, and whether the games are over.
    """
    rows = np.arange(len(patch))
    empty, rival_empty = erased[rows, patch], erased[rows, rival] | (patch == rival)
    shown = np.where(empty, 0.0, scores[rows, patch])
    rival_shown = np.where(rival_empty, 0.0, scores[rows, rival])
    ended = stop | rival_stop
    won = np.sign(shown - rival_shown) * np.where(ended, factor, 1.0)
    over = ended | (turn >= max_turns + 2)
    penalty = over & ((turn < min_turns) | (turn > max_turns))
    after = erased.copy()
    after[rows, patch] = True
    after[rows, rival] = True
    rewards = np.stack([won - penalty - empty, -won - penalty - rival_empty], axis=-1)
    return after, rewards, over


def make_pixel_environment(
    image: np.ndarray, start: np.ndarray, verify: Any, rival: Any, fraction: float, horizon: int
):
    """Return one pixel game as a gymnasium environment for stable-baselines3.

    Args:
        image: Intensities.
        start: Mask to begin with.
        verify: (mask) -> value.
        rival: (observation) -> desires.
        fraction: Of pixels that flip.
        horizon: Steps after which a game is cut.
    """
    import gymnasium

    count = count_flips(start.size, fraction)

    class PixelEnvironment(gymnasium.Env):
        """Flip pixels; desires are ranked as they come."""

        observation_space = gymnasium.spaces.Box(0.0, 1.0, (*image.shape, 2), np.float32)
        # Wide enough that nothing is clipped: the fair rule ranks unclipped desires.
        action_space = gymnasium.spaces.Box(-100.0, 100.0, image.shape, np.float32)

        def reset(self, *, seed: int | None = None, options: Any = None):
            super().reset(seed=seed)
            self.mask, self.steps = start.copy(), 0
            return self.observe(), {}

        def observe(self):
            return np.stack([image, self.mask], axis=-1).astype(np.float32)

        def step(self, action: np.ndarray):
            own = self.mask ^ mark_top(action[None], count)[0]
            theirs = self.mask ^ mark_top(rival(self.observe())[None], count)[0]
            reward = verify(own) - verify(theirs)
            self.mask = own if reward >= 0 else theirs
            self.steps += 1
            return self.observe(), float(reward), False, self.steps > horizon, {}

    return PixelEnvironment()


def make_pixel_vector(
    image: np.ndarray, start: np.ndarray, judge: Any, rival: Any, fraction: float, horizon: int, games: int
) -> Any:
    """Return many pixel games as one vectorised environment for stable-baselines3, all in NumPy.

    Args:
        image: Intensities.
        start: Mask to begin with.
        judge: (anything, masks) -> values.
        rival: (observations) -> desires.
        fraction: Of pixels that flip.
        horizon: Steps after which a game is cut.
        games: Played at a time.
    """
    import gymnasium
    from stable_baselines3.common.vec_env import VecEnv

    count = count_flips(start.size, fraction)

    class PixelVector(VecEnv):
        """Flip pixels of all games; a game that is cut begins anew, its last observation in its info."""

        def __init__(self) -> None:
            seen = gymnasium.spaces.Box(0.0, 1.0, (*image.shape, 2), np.float32)
            super().__init__(games, seen, gymnasium.spaces.Box(-100.0, 100.0, image.shape, np.float32))

        def reset(self):
            self.mask = np.broadcast_to(start, (games, *start.shape)).copy()
            self.steps = np.zeros(games, int)
            return self.observe()

        def observe(self):
            seen = np.empty((games, *image.shape, 2), np.float32)
            seen[..., 0], seen[..., 1] = image, self.mask
            return seen

        def step_async(self, actions: np.ndarray):
            self.actions = actions

        def step_wait(self):
            marks = (mark_top(desires, count) for desires in (self.actions, rival(self.observe())))
            self.mask, _, reward, _ = pixel_step(judge, None, self.mask, None, *marks)  # pyright: ignore
            self.steps += 1
            done = self.steps > horizon
            infos: list[dict[str, Any]] = [{} for _ in range(games)]
            if done.any():
                last = self.observe()
                for number in np.flatnonzero(done):
                    infos[number] = {"terminal_observation": last[number], "TimeLimit.truncated": True}
                self.mask[done], self.steps[done] = start, 0
            return self.observe(), reward, done, infos

        def close(self):
            pass

        def get_attr(self, attr_name: str, indices: Any = None):
            return [getattr(self, attr_name, None)] * games

        def set_attr(self, attr_name: str, value: Any, indices: Any = None):
            setattr(self, attr_name, value)

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **options: Any):
            return [None] * games

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None):
            return [False] * games

    return PixelVector()


def make_patch_environment(scores: np.ndarray, min_turns: int = 2, max_turns: int = 2048, factor: float = 100.0):
    """Return one patch game as a gymnasium environment; an action is (patch, stop) of both players."""
    import gymnasium

    class PatchEnvironment(gymnasium.Env):
        """Name patches of a table of scores."""

        observation_space = gymnasium.spaces.Box(0.0, 1.0, scores.shape, np.float32)
        action_space = gymnasium.spaces.MultiDiscrete([len(scores), 2, len(scores), 2])

        def reset(self, *, seed: int | None = None, options: Any = None):
            super().reset(seed=seed)
            self.erased, self.turn = np.zeros(len(scores), bool), 0
            return np.where(self.erased, 0.0, scores).astype(np.float32), {}

        def step(self, action: np.ndarray):
            patch, stop, rival, rival_stop = action
            empty, rival_empty = self.erased[patch], self.erased[rival] or patch == rival
            shown = 0.0 if empty else scores[patch]
            rival_shown = 0.0 if rival_empty else scores[rival]
            ended = bool(stop or rival_stop)
            won = math.copysign(1.0, shown - rival_shown) if shown != rival_shown else 0.0
            won *= factor if ended else 1.0
            over = ended or self.turn >= max_turns + 2
            penalty = 1.0 if over and (self.turn < min_turns or self.turn > max_turns) else 0.0
            self.erased[patch] = self.erased[rival] = True
            self.turn += 1
            info = {"rival_reward": -won - penalty - rival_empty}
            observation = np.where(self.erased, 0.0, scores).astype(np.float32)
            return observation, won - penalty - float(empty), over, False, info

    return PatchEnvironment()
