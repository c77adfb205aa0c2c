"""Make the values that test_imaging.py holds SSIM and PSNR to: python tests/metrics/make_ssim_values.py.

Needs scikit-image (0.26.0 made the stored ones), which is no dependency of the package.
"""

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


def images(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth pattern and a brighter, shifted, rippled one, both in [0, 1]."""
    axes = np.meshgrid(*(np.linspace(0, 1, size) for size in shape), indexing="ij")
    truth = 0.5 + 0.4 * np.prod([np.sin(7 * axis + index) for index, axis in enumerate(axes)], axis=0)
    estimate = np.clip(0.95 * truth + 0.08 + 0.05 * np.sin(40 * sum(axes)), 0, 1)
    return truth, estimate


if __name__ == "__main__":
    for shape in ((40, 33), (16, 20, 14)):
        pair = images(*shape)
        ssim = structural_similarity(
            *pair, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        print(shape, repr(float(ssim)), repr(float(peak_signal_noise_ratio(*pair, data_range=1.0))))
