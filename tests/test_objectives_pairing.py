"""Consistency models: which noise levels are compared, and of what."""

import numpy as np
import pytest
from keras import ops

from kdiff import objectives, random
from kdiff.predictions import Karras
from tests.helpers_taught import EXPLODING, MEAN, C, Given, X, exact_model
from tests.toys import numpy


def test_improved_pairs():
    """Song and Dhariwal 2023, eqs. of sections 3.4 and 3.5: the number of levels, their places, their probabilities."""
    pairs = objectives.Discretised(1000, 10, 80)
    counts = [float(numpy(pairs.intervals(np.int32(step)))) for step in (0, 249, 250, 499, 500, 749, 750, 5000)]
    assert counts == [10, 10, 20, 20, 40, 40, 80, 80]
    assert [float(numpy(objectives.Discretised(800).intervals(np.int32(step)))) for step in (0, 799)] == [10, 1280]
    s = np.exp(np.random.default_rng(0).normal(-1.1, 2.0, 4000)).astype("float32")
    s = s[(s > 0.002) & (s < 80.0)]
    above, below = (numpy(value) for value in pairs(ops.convert_to_tensor(s), 0.002, 80.0, np.int32(0)))
    grid = np.linspace(0.002 ** (1 / 7), 80.0 ** (1 / 7), 11) ** 7
    found = np.searchsorted(grid, s)
    np.testing.assert_allclose(above, grid[found], rtol=1e-4)
    np.testing.assert_allclose(below, grid[found - 1], rtol=1e-4)


def test_easy_pairs():
    """Geng et al. 2024, section 3.2, with q = 2, k = 8, b = 1: at first r is 0 where sigmoid(-s) > 1/8."""
    pairs = objectives.Easy(800)
    s = np.float32([0.1, 1.9, 2.0, 10.0])
    for step, a in ((0, 0), (99, 0), (100, 1), (350, 3), (900, 7)):
        same, r = (numpy(value) for value in pairs(ops.convert_to_tensor(s), 0.002, 80.0, np.int32(step)))
        np.testing.assert_array_equal(same, s)
        expected = s * np.maximum(0, 1 - 2.0 ** -(a + 1) * (1 + 8 / (1 + np.exp(s))))
        np.testing.assert_allclose(r, expected, rtol=1e-4, atol=1e-6)
    for step, a in ((12, 0), (13, 1), (84, 6), (99, 7), (500, 7)):  # 100 steps are not a multiple of 8
        r = numpy(objectives.Easy(100)(ops.convert_to_tensor(s), 0.002, 80.0, np.int32(step))[1])
        np.testing.assert_allclose(r, s * np.maximum(0, 1 - 2.0 ** -(a + 1) * (1 + 8 / (1 + np.exp(s)))), rtol=1e-4)
    first = numpy(pairs(ops.convert_to_tensor(s), 0.002, 80.0, np.int32(0))[1])
    assert (first == 0).tolist() == [True, True, False, False]


def test_consistency_training_compares_one_noise():
    """The target is f of the same data and noise at r, and x where r is the clean end."""
    model = exact_model(
        EXPLODING, Karras(), objectives.Consistency(pairs=objectives.Easy(100)), times=Given([0.8, 0.1])
    )
    problem = model.objective.problem(model, ops.convert_to_tensor(X[:2]), {}, random.Keys(random.key_of(0)), True)
    keys = random.Keys(random.key_of(0))
    next(keys)
    noise = numpy(random.normal(next(keys), (2, 2)))
    s = numpy(EXPLODING.at(np.float32([0.8, 0.1])).sigma)
    r = s * np.maximum(0, 1 - 0.5 * (1 + 8 / (1 + np.exp(s))))
    assert r[0] > 1.0
    assert r[1] == 0.0
    factor = C / np.sqrt(C**2 + r[0] ** 2)
    np.testing.assert_allclose(numpy(problem.target)[0], MEAN + factor * (X[0] + r[0] * noise[0] - MEAN), rtol=1e-4)
    np.testing.assert_allclose(numpy(problem.target)[1], X[1], atol=1e-5)
    size = np.sum((numpy(problem.output) - numpy(problem.target)) ** 2, axis=1)
    huber = np.sqrt(size + 2 * 0.00054**2)  # the gradient of |e|^2 / 2 times 1 / this is that of the pseudo-Huber norm
    np.testing.assert_allclose(numpy(problem.weight), 1 / (s - r) / huber, rtol=1e-3)


@pytest.mark.once
def test_without_a_teacher_the_length_of_training_is_asked():
    for make in (objectives.Consistency, lambda: exact_model(EXPLODING, Karras(), "consistency")):
        with pytest.raises(ValueError, match="without a teacher say how many steps training has"):
            make()
    assert repr(objectives.Consistency(exact_model(EXPLODING, Karras())).pairs) == repr(
        objectives.Discretised(1, 17, 17)
    )
