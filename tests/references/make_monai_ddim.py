"""Write monai_ddim.npz: every step of MONAI's DDIM scheduler (monai 1.6.1) from a known start, both ways of clipping.

python tests/references/make_monai_ddim.py
"""

from pathlib import Path

import jax
import numpy as np
import torch
from monai.networks.schedulers import DDIMScheduler


def network(x, t):
    """Noise of some image; the tests have the same."""
    return 0.9 * x * (0.2 + 0.0008 * t) + 0.05


def walk(start: np.ndarray, clip: bool) -> np.ndarray:
    """Return the state after each of 50 steps, at the times of the code that CoCoLIT calls."""
    scheduler = DDIMScheduler(1000, "scaled_linear_beta", clip_sample=clip, beta_start=0.0015, beta_end=0.0205)
    scheduler.set_timesteps(50)
    x, states = torch.tensor(start), []
    for time in range(980, -1, -20):
        x = scheduler.step(network(x, time), time, x)[0]
        states.append(x.numpy())
    return np.stack(states)


if __name__ == "__main__":
    start = np.array(jax.random.normal(jax.random.key(1), (3, 2, 4)))
    np.savez_compressed(
        Path(__file__).with_name("monai_ddim.npz"), start=start, free=walk(start, False), clipped=walk(start, True)
    )
