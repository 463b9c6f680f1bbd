"""Grids that go back to more noise."""

import itertools

import numpy as np
import pytest

from kdiff import schedules, times

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
