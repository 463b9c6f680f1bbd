"""Grids that go back to more noise."""

import itertools

import numpy as np
import pytest

from kdiff import Sampler, schedules, times

pytestmark = pytest.mark.once
COSINE = schedules.Cosine()


@pytest.mark.parametrize(("steps", "length", "repeats"), [(5, 2, 3), (6, 2, 2), (7, 10, 4), (4, 1, 3), (9, 4, 1)])
def test_each_step_of_a_piece_is_made_again(steps, length, repeats):
    """Counted: what is left over at the noisy end once, every other step `repeats` times; a jump goes back a piece."""
    grid = times.Trailing()(COSINE, steps)
    path = times.Jumps("trailing", length, repeats)(COSINE, steps)
    places = [int(np.argmin(np.abs(grid - t))) for t in path]
    np.testing.assert_array_equal(grid[places], path)
    assert places[0] == 0
    assert places[-1] == steps
    made = np.zeros(steps, int)
    for now, then in itertools.pairwise(places):
        assert then - now in (1, -length)
        if then > now:
            made[now] += 1
    np.testing.assert_array_equal(made[: steps % length], 1)
    np.testing.assert_array_equal(made[steps % length :], repeats)


def test_default_steps_are_the_grids():
    assert times.Jumps("all").default_steps(schedules.LinearBeta(30)) == 30


def test_a_part_of_a_run_does_not_leave_its_part():
    """A jump to more noise than the run begins with would replace the image that it begins with."""
    sampler = Sampler(grid=times.Jumps("trailing", length=4, repeats=2), steps=4)
    path = [1.0, 0.75, 0.5, 0.25, 0.0]
    np.testing.assert_allclose(sampler.times(COSINE), [*path, *path])
    np.testing.assert_allclose(sampler.times(COSINE, strength=0.5), [0.5, 0.25, 0.0, 0.5, 0.25, 0.0])
    np.testing.assert_allclose(sampler.times(COSINE, strength=0.45), [0.45, 0.25, 0.0, 0.45, 0.25, 0.0])
    np.testing.assert_allclose(sampler.times(COSINE, strength=0.55), [0.55, 0.25, 0.0, 0.55, 0.25, 0.0])
    np.testing.assert_allclose(sampler.times(COSINE, strength=0.1), [0.1, 0.0, 0.1, 0.0])
    np.testing.assert_allclose(sampler.times(COSINE, stop=0.5), [1.0, 0.75, 0.5, 1.0, 0.75, 0.5])
    np.testing.assert_allclose(sampler.times(COSINE, stop=0.625), [1.0, 0.625, 1.0, 0.625])  # as without jumps
    np.testing.assert_allclose(Sampler(steps=4).times(COSINE, stop=0.625), [1.0, 0.625])
    np.testing.assert_allclose(Sampler(steps=4).times(COSINE, 0.625), [0.625, 0.5, 0.25, 0.0])
    np.testing.assert_allclose(sampler.times(COSINE, 0.75, 0.25), [0.75, 0.5, 0.25, 0.75, 0.5, 0.25])
