import numpy as np
import pytest

from kdiff import Sampler, schedules
from kdiff.times import DEEPFLOYD, Sections

# DeepFloyd IF's "fast27" and "smart27", as they are published.
FAST = [999, 800, 799, 600, 599, 500, 400, 399, 377, 355, 333, 311, 288, 266, 244, 222, 200, 199, 177, 155, 133, 111]
FAST += [88, 66, 44, 22, 0]
SMART = [999, 976, 952, 928, 905, 882, 858, 857, 810, 762, 715, 714, 572, 429, 428, 286, 285, 238, 190, 143, 142, 118]
SMART += [95, 71, 47, 24, 0]
TABLE = schedules.CosineBeta(1000)


@pytest.mark.once
@pytest.mark.parametrize(("name", "steps"), [("fast27", FAST), ("smart27", SMART)])
def test_the_lists_of_deepfloyd(name, steps):
    grid = Sections.deepfloyd(name)
    assert grid == Sections(DEEPFLOYD[name])
    times = Sampler("ddpm", grid).times(TABLE)
    np.testing.assert_allclose(times, [*((np.array(steps) + 1) / 1000), 0.0], atol=1e-12)


@pytest.mark.once
def test_parts():
    """Of 10 steps the first of 3 parts has 4; one of a part is its first, and all are all."""
    ten = schedules.CosineBeta(10)
    np.testing.assert_allclose(Sections([4, 1, 2])(ten, 7) * 10 - 1, [9, 7, 4, 3, 2, 1, 0, -1], atol=1e-9)
    np.testing.assert_allclose(Sections([10])(ten, 10), np.arange(10, -1, -1) / 10, atol=1e-12)
    assert len(Sections([3, 2])(schedules.Cosine(), 5)) == 6  # on a continuous one as on 1000 steps
    assert Sections([3, 2]).default_steps(ten) == 5


@pytest.mark.once
def test_errors():
    with pytest.raises(ValueError, match="at least one entry"):
        Sections([])
    with pytest.raises(ValueError, match="`counts` must be a whole number of at least 1; received: 0"):
        Sections([3, 0])
    with pytest.raises(ValueError, match="`steps` must be 5, the sum of `counts`; received: 4"):
        Sections([3, 2])(TABLE, 4)
    with pytest.raises(ValueError, match="part 1 has 5 steps; received a count of 6"):
        Sections([3, 6])(schedules.CosineBeta(10), 9)
    with pytest.raises(ValueError, match="`name` must be one of"):
        Sections.deepfloyd("slow")
