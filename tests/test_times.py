import numpy as np
import pytest

from kdiff import random, schedules, times
from kdiff.times import TimeGrid, TimeLabel, TimeSampler
from tests.toys import SCHEDULES, numpy

DISCRETE, CONTINUOUS = schedules.LinearBeta(), schedules.Cosine()


def draw(sampler, schedule=DISCRETE, batch=64, seed=0):
    return numpy(sampler(schedule, batch, random.key_of(seed)))


@pytest.mark.parametrize("sampler", [times.Uniform(), times.Discrete(10), times.Stratified()], ids=repr)
def test_times_are_uniform(sampler):
    """The mean, and the share in each tenth, to 5 standard errors of independent draws."""
    drawn = np.stack([draw(sampler, seed=seed) for seed in range(60)])
    assert drawn.dtype == np.float32
    shift = 0.05 if isinstance(sampler, times.Discrete) else 0.0  # (i + 1) / T has the mean 1/2 + 1/(2T)
    assert abs(drawn.mean() - 0.5 - shift) < 5 * np.sqrt(1 / 12 / drawn.size)
    # A discrete time, (i + 1) / T, stands at the end of its part.
    shares = np.bincount((drawn * 10 - (0.5 if shift else 0.0)).astype(int).ravel(), minlength=10) / drawn.size
    assert np.all(np.abs(shares - 0.1) < 5 * np.sqrt(0.1 * 0.9 / drawn.size))
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_every_time_sampler_is_here():
    assert set(TimeSampler.names()) == {"uniform", "discrete", "stratified"}


def test_discrete_times_are_the_steps():
    drawn = draw(times.Discrete(), schedules.LinearBeta(8), batch=400)
    assert set(np.round(drawn * 8, 5)) == set(range(1, 9))
    with pytest.raises(ValueError, match="continuous"):
        draw(times.Discrete(), CONTINUOUS)
    with pytest.raises(ValueError, match="num_steps"):
        times.Discrete(0)


def test_stratified_times_cover_every_part_once():
    first = []
    for seed in range(20):
        drawn = draw(times.Stratified(), batch=16, seed=seed)
        assert sorted((drawn * 16).astype(int)) == list(range(16))
        first.append(int(drawn[0] * 16))
    assert len(set(first)) > 5  # the place in the batch does not tell the noise level


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("name", TimeGrid.names())
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_grids_decrease_to_zero(schedule, name, steps):
    if name == "all":
        steps = schedule.num_steps or 1000
    grid = TimeGrid.get(name)(schedule, steps)
    assert grid.shape == (steps + 1,)
    assert np.all(np.diff(grid) < 0)
    assert grid[-1] == 0
    assert grid[0] <= 1


def indices(grid, steps, schedule=DISCRETE):
    return list(np.round(grid(schedule, steps)[:-1] * schedule.num_steps - 1, 6))


def test_grids_are_the_published_spacings():
    """Lin et al. 2024, table 2, for T = 1000 and S = 10, with the indices from 0."""
    assert indices(times.Leading(), 10) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert indices(times.Leading(offset=1), 10) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert indices(times.Trailing(), 10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert indices(times.Linspace(), 10) == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert indices(times.All(), 1000) == list(range(999, -1, -1))
    np.testing.assert_allclose(times.Trailing()(CONTINUOUS, 4), [1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize(
    ("grid", "steps", "message"),
    [
        ("trailing", 0, "at least 1"),
        ("leading", -3, "at least 1"),
        ("linspace", 2.5, "whole number"),
        ("trailing", 1001, "at most 1000"),
        ("all", 50, "must be 1000"),
        (times.Leading(offset=500), 2, "at most 499"),
    ],
)
def test_impossible_numbers_of_steps(grid, steps, message):
    with pytest.raises(ValueError, match=message):
        TimeGrid.get(grid)(DISCRETE, steps)


def test_labels():
    m = DISCRETE.at(np.float32([0.001, 0.5, 1.0]))
    assert set(TimeLabel.names()) == {"scaled", "index", "log_snr"}
    np.testing.assert_allclose(numpy(times.Scaled()(DISCRETE, m)), [1, 500, 1000], rtol=1e-6)
    np.testing.assert_allclose(numpy(times.Scaled(1.0)(DISCRETE, m)), [0.001, 0.5, 1], rtol=1e-6)
    np.testing.assert_allclose(numpy(times.Index()(DISCRETE, m)), [0, 499, 999], atol=1e-4)
    # EDM's c_noise = ln(sigma / alpha) / 4.
    ratio = numpy(m.sigma).astype("float64") / numpy(m.alpha)
    np.testing.assert_allclose(numpy(times.LogSNR()(DISCRETE, m)), np.log(ratio) / 4, rtol=1e-4)
    np.testing.assert_allclose(numpy(times.LogSNR(1.0)(DISCRETE, m)), numpy(m.log_snr))
    with pytest.raises(ValueError, match="continuous"):
        times.Index()(CONTINUOUS, m)
