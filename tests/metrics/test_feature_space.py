"""What features look like together: in how many directions they spread. The rest is tested with embeddings."""

import numpy as np
import pytest

from jaxmed.metrics.feature_space import effective_rank

pytestmark = pytest.mark.core


def test_effective_rank_counts_directions_of_equal_spread():
    axes = np.eye(8)[:3]
    cross = np.concatenate([axes, -axes]) + 5
    np.testing.assert_allclose(effective_rank(cross), 3, rtol=1e-9)
    np.testing.assert_allclose(effective_rank(np.outer(np.arange(4), np.ones(6))), 1, rtol=1e-9)
    assert effective_rank(np.ones((5, 3))) == 1


def test_effective_rank_is_the_exponential_of_an_entropy():
    stretched = np.concatenate([np.diag([3.0, 1.0]), np.diag([-3.0, -1.0])])
    np.testing.assert_allclose(
        effective_rank(stretched), np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))), rtol=1e-9
    )
