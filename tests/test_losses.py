"""Losses, against their formulas."""

import keras
import numpy as np
import pytest

from kdiff import losses
from tests.toys import numpy


@pytest.mark.once
def test_losses():
    """Pseudo-Huber against its formula, in NumPy; with weights, of the whole example, and of each number."""
    a, b = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype("float32")
    size = np.sqrt(np.sum((a - b) ** 2, axis=(1, 2)) + 12 * 0.00054**2) - 0.00054 * np.sqrt(12)
    np.testing.assert_allclose(numpy(losses.PseudoHuber()(a, b)), size.mean(), rtol=1e-5)
    weights = np.arange(5, dtype="float32")[:, None]
    np.testing.assert_allclose(
        numpy(losses.PseudoHuber()(a, b, sample_weight=weights)), (weights[:, 0] * size).mean(), rtol=1e-5
    )
    each = np.sqrt((a - b) ** 2 + 0.01) - 0.1
    np.testing.assert_allclose(numpy(losses.PseudoHuber(0.1, whole=False)(a, b)), each.mean(), rtol=1e-5)
    again = keras.losses.deserialize(keras.losses.serialize(losses.PseudoHuber(0.1, whole=False)))
    assert (again.c, again.whole) == (0.1, False)
