"""The times of a sampling run. Other implementations: test_times_reference.py."""

import keras
import numpy as np
import pytest
from scipy import special, stats

from kdiff import Sampler, schedules, times
from kdiff.times import TimeGrid
from kdiff.times.grids import incomplete_beta
from tests.toys import SCHEDULES, exact_denoiser, numpy

pytestmark = pytest.mark.once

DISCRETE, CONTINUOUS = schedules.LinearBeta(), schedules.Cosine()
EXPLODING = schedules.VarianceExploding(1e-4, 80.0)
NAMES = sorted(set(TimeGrid.names()) - {"times", "jumps", "sigmas"})
BY_SIGMA = [times.Karras(), times.Exponential(), times.Polyexponential(1.5), times.UniformLogSNR()]


def sigmas(grid, schedule):
    """sigma / alpha at the times of a grid, but for the last."""
    return np.exp(-0.5 * numpy(schedule.log_snr(grid[:-1].astype("float32"))).astype("float64"))


def test_every_grid_is_here():
    assert set(NAMES) == {
        *("all", "leading", "trailing", "linspace", "rounded", "beta_quantile", "flow_shift", "distilled"),
        *("karras", "exponential", "polyexponential", "uniform_log_snr"),
    }


@pytest.mark.parametrize("schedule", [*SCHEDULES, schedules.VarianceExploding()], ids=repr)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_grids_decrease_to_zero(schedule, name, steps):
    """And a discrete schedule is not read before its first step."""
    if name == "all":
        steps = schedule.num_steps or 1000
    grid = times.Distilled(20) if name == "distilled" else TimeGrid.get(name)
    grid = grid(schedule, steps)
    assert grid.shape == (steps + 1,)
    assert grid.dtype == np.float64
    assert np.all(np.diff(grid.astype("float32")) < 0)
    assert grid[-1] == 0
    assert grid[0] <= 1
    assert grid[-2] >= (1 - 1e-12) / (schedule.num_steps or np.inf)


def indices(grid, steps, schedule=DISCRETE):
    return list(np.round(grid(schedule, steps)[:-1] * schedule.num_steps - 1, 6))


def test_distilled_steps_are_of_the_times_at_distillation():
    """LCM's: k 1000 / 50 - 1, k = 50 ... 1, at the places 0, 12, 25, 37."""
    assert indices(times.Distilled(50), 4) == [999, 759, 499, 259]
    assert indices(times.Distilled(4), 4) == [999, 749, 499, 249]
    with pytest.raises(ValueError, match="`steps` must be at most 4"):
        times.Distilled(4)(DISCRETE, 5)
    with pytest.raises(ValueError, match="`original` must be at most 40"):
        times.Distilled(50)(schedules.CosineBeta(40), 4)


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
        ("karras", 0, "at least 1"),
        ("trailing", 1001, "at most 1000"),
        ("all", 50, "must be 1000"),
        (times.Leading(offset=500), 2, "at most 499"),
    ],
)
def test_impossible_numbers_of_steps(grid, steps, message):
    with pytest.raises(ValueError, match=message):
        TimeGrid.get(grid)(DISCRETE, steps)


# Grids of noise levels


@pytest.mark.parametrize(("rho", "steps"), [(7.0, 20), (3.0, 7), (1.0, 1)])
def test_karras_is_the_published_grid(rho, steps):
    """Karras et al. 2022, eq. 5, in float64, with EDM's ends; the times are read in float32."""
    i = np.arange(steps)
    ramp = i / max(steps - 1, 1)
    expected = (80 ** (1 / rho) + ramp * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    grid = times.Karras(rho, 0.002, 80.0)
    np.testing.assert_allclose(sigmas(grid(EXPLODING, steps), EXPLODING), expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", [CONTINUOUS, schedules.Rectified(), DISCRETE, EXPLODING], ids=repr)
def test_grids_of_noise_are_evenly_spaced_in_what_they_say(schedule):
    """Between the schedule's own ends: t = 1, and the first step, or t = 0, where the last of the steps leads."""
    spaced = {
        times.Karras(5.0): lambda s: s ** (1 / 5),
        times.Exponential(): np.log,
        times.UniformLogSNR(): lambda s: -2 * np.log(s),
        times.Polyexponential(2.0): lambda s: np.sqrt(np.log(s / lowest)),
    }
    clean, noisy = (float(numpy(end)) for end in schedule.log_snr_ends())
    lowest, highest = np.exp(-0.5 * clean), np.exp(-0.5 * noisy)
    for grid, even in spaced.items():
        t = grid(schedule, 7)
        assert t[0] == 1
        s = np.append(sigmas(t, schedule), [] if schedule.num_steps else lowest)
        assert s[-1] == pytest.approx(lowest, rel=1e-4)
        assert s[0] == pytest.approx(highest, rel=1e-4)
        # What float32 knows of t near 1 is 1 % of sigma there, where Rectified ends at 1e5.
        distances = np.diff(even(np.maximum(s, lowest)))
        np.testing.assert_allclose(distances, distances.mean(), rtol=2e-2)


def test_grids_of_noise_that_are_each_other():
    for schedule in (CONTINUOUS, DISCRETE):
        t = times.Exponential(0.02, 50.0)(schedule, 20)
        ends = {"min_log_snr": -2 * np.log(50.0), "max_log_snr": -2 * np.log(0.02)}
        np.testing.assert_allclose(times.UniformLogSNR(**ends)(schedule, 20), t, atol=1e-6)
        np.testing.assert_allclose(times.Polyexponential(1.0, 0.02, 50.0)(schedule, 20), t, atol=1e-6)
        # rho without end is the logarithm.
        np.testing.assert_allclose(times.Karras(1e3, 0.02, 50.0)(schedule, 20), t, atol=3e-3)


def test_noise_levels_do_not_depend_on_the_schedule():
    """The same grid of sigma / alpha on any schedule that has them, discrete or not: it is not rounded."""
    for grid in (times.Karras(7.0, 0.02, 50.0), times.Polyexponential(1.5, 0.02, 50.0)):
        expected = sigmas(grid(EXPLODING, 20), EXPLODING)
        for schedule in (CONTINUOUS, DISCRETE, schedules.Rectified()):
            np.testing.assert_allclose(sigmas(grid(schedule, 20), schedule), expected, rtol=2e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: times.Karras(0.0), "rho"),
        (lambda: times.Karras(-7.0), "rho"),
        (lambda: times.Polyexponential(0.0), "rho"),
        (lambda: times.Karras(sigma_min=-1.0), "sigma_min"),
        (lambda: times.Exponential(80.0, 0.002), "`sigma_max` must exceed `sigma_min`"),
        (lambda: times.UniformLogSNR(5.0, -5.0), "`max_log_snr` must exceed `min_log_snr`"),
        (lambda: times.FlowShift(0.0), "shift"),
        (lambda: times.BetaQuantile(0.0), "alpha"),
        (lambda: times.BetaQuantile(1.0, 100.0), "beta"),
        (lambda: times.Karras(sigma_max=1e6)(CONTINUOUS, 5), "must lie in"),
        (lambda: times.Karras(sigma_min=1e-9)(DISCRETE, 5), "must lie in"),
        (lambda: times.Karras(sigma_min=0.001)(schedules.VarianceExploding(), 5), "must lie in"),
        (lambda: times.Sigmas([80.0, 90.0, 0.0]), "positive and strictly decreasing"),
        (lambda: times.Sigmas([]), "positive and strictly decreasing"),
        (lambda: times.Sigmas([1.0, np.nan]), "positive and strictly decreasing"),
        (lambda: times.Sigmas([1.0, -1.0]), "positive and strictly decreasing"),
        (lambda: times.Sigmas([100.0, 1.0, 0.0])(schedules.VarianceExploding(), 2), "must lie in"),
        (lambda: times.Sigmas([80.0, 1.0, 0.0])(schedules.VarianceExploding(), 3), "`steps` must be 2"),
        (lambda: times.Exponential()(schedules.Rectified(), 30000), "equal in float32"),
        (lambda: times.BetaQuantile(0.05, 0.05)(CONTINUOUS, 50), "equal in float32"),
        (lambda: times.Rounded("karras")(schedules.CosineBeta(), 20), "too many"),
        (
            lambda: times.Trailing()(schedules.Cosine(), 10**9),
            "at most 1000000 steps.*1000000000",
        ),  # before it makes them
        (lambda: times.Karras()(schedules.Cosine(), 10**9), "at most 1000000 steps"),
        (lambda: times.Jumps("trailing", 1, 10**9)(schedules.Cosine(), 2), "at most 1000000 steps.*2000000000"),
        (lambda: times.Times([1.0, 0.5, 0.5, 0.0]), "strictly decrease to 0"),
        (lambda: times.Times([0.2, 0.5, 0.0]), "strictly decrease to 0"),
        (lambda: times.Times([1.2, 0.5, 0.0]), "be in \\[0, 1\\]"),
        (lambda: times.Times([1.0, 0.5, -0.1]), "be in \\[0, 1\\]"),
        (lambda: times.Times([1.0, 0.5]), "strictly decrease to 0"),
        (lambda: times.Times([0.0]), "strictly decrease to 0"),
        (lambda: times.Times([np.nan, 0.0]), "be in \\[0, 1\\]"),
        (lambda: times.Times([1.0, 0.5, 0.0])(DISCRETE, 3), "must be 2"),
    ],
)
def test_impossible_grids(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Grids of times


SHAPES = [(0.6, 0.6), (0.05, 0.3), (2.0, 5.0), (50.0, 0.5), (1.0, 1.0), (30.0, 50.0)]


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_beta_quantiles(a, b):
    """Against scipy, in float64."""
    x = np.concatenate([np.linspace(0, 1, 101), [1e-12, 1e-5, 0.4999, 0.5001, 1 - 1e-9]])
    np.testing.assert_allclose(incomplete_beta(x, a, b), special.betainc(a, b, x), rtol=1e-11, atol=1e-13)
    u = np.linspace(0.01, 1, 40)
    np.testing.assert_allclose(times.BetaQuantile(a, b).warp(u), stats.beta(a, b).ppf(u), rtol=1e-9, atol=1e-12)


def test_beta_grid_is_the_quantiles():
    """On a continuous schedule; on a discrete one the same from its first step on, which is the last that is taken."""
    law = stats.beta(0.6, 0.6)
    np.testing.assert_allclose(times.BetaQuantile()(CONTINUOUS, 8), law.ppf(np.arange(8, -1, -1) / 8), atol=1e-12)
    t = times.BetaQuantile()(DISCRETE, 8)
    np.testing.assert_allclose((t[:-1] - 0.001) / 0.999, law.ppf(np.arange(7, -1, -1) / 7), atol=1e-12)
    np.testing.assert_allclose(times.BetaQuantile(1.0, 1.0)(CONTINUOUS, 8), times.Trailing()(CONTINUOUS, 8), atol=1e-12)


def test_a_shifted_grid_is_that_of_the_shifted_schedule():
    """On rectified flow: the same noise levels from the shift of the grid as from that of the schedule (SD3, eq. 23).

    Rectified is drawn short of its ends by 1e-5, which is what they differ by.
    """
    rectified = schedules.Rectified(1e-6)
    for grid, schedule in [
        (times.FlowShift(3.0), schedules.Shifted.by_factor(rectified, 3.0)),
        (times.FlowShift.for_tokens(1024), schedules.Shifted.for_tokens(rectified, 1024)),
    ]:
        moved = numpy(rectified.at(grid(rectified, 10)[1:-1]).log_snr)
        np.testing.assert_allclose(moved, numpy(schedule.at(times.Trailing()(schedule, 10)[1:-1]).log_snr), atol=1e-4)
    np.testing.assert_allclose(times.FlowShift(1.0)(CONTINUOUS, 8), times.Trailing()(CONTINUOUS, 8), atol=1e-12)
    t = times.FlowShift(3.0)(DISCRETE, 7)
    assert (t[0], t[-2]) == (1.0, 0.001)


def test_times_of_ones_own():
    grid = times.Times([0.9, 0.5, 0.1, 0.0])
    assert grid.default_steps(DISCRETE) == 3
    np.testing.assert_array_equal(grid(DISCRETE, 3), [0.9, 0.5, 0.1, 0.0])
    assert TimeGrid.get(grid.get_config() and times.Times(np.array([0.9, 0.5, 0.1, 0.0]))) == grid
    run = [step.t for step in Sampler("ddim", grid).steps_of(exact_denoiser(), CONTINUOUS, (2, 2))]
    np.testing.assert_allclose(run, [0.5, 0.1, 0.0], atol=1e-7)


def test_sigmas_of_ones_own():
    """Those of EDM (Karras et al. 2022, eq. 5), on the schedule whose ends they have, to 0."""
    u = np.linspace(1.0, 0.0, 6)
    sigmas = (0.002 ** (1 / 7) + u * (80.0 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    schedule = schedules.VarianceExploding(0.002, 80.0)
    for grid in (times.Sigmas([*sigmas, 0.0]), times.Sigmas(sigmas), times.Karras(7.0, 0.002, 80.0)):
        t = grid(schedule, 6)
        m = schedule.sampled_at(t.astype("float32"))
        np.testing.assert_allclose(numpy(m.sigma)[:-1], sigmas, rtol=2e-5)
        assert numpy(m.sigma)[-1] < 1e-8
    assert times.Sigmas(sigmas).default_steps(schedule) == 6
    grid = times.Sigmas([14.0, 3.0, 0.5])
    np.testing.assert_allclose(
        numpy(DISCRETE.at(grid(DISCRETE, 3)[:-1]).log_snr), -2 * np.log([14.0, 3.0, 0.5]), atol=1e-4
    )
    assert TimeGrid.get(keras.saving.serialize_keras_object(grid)) == grid
    run = [step.t for step in Sampler("ddim", grid).steps_of(exact_denoiser(), schedule, (2, 2))]
    assert len(run) == 3
    assert run[-1] == 0.0


def test_rounded_times_are_steps():
    for inner in (*BY_SIGMA, times.BetaQuantile(), times.FlowShift()):
        exact, grid = inner(DISCRETE, 7), times.Rounded(inner)
        places = grid(DISCRETE, 7) * 1000
        np.testing.assert_allclose(places, np.round(places), atol=1e-9)
        assert np.abs(places - exact * 1000).max() <= 0.5 + 1e-9
        np.testing.assert_array_equal(grid(CONTINUOUS, 7), inner(CONTINUOUS, 7))
    assert times.Rounded(times.All()).default_steps(DISCRETE) == 1000
    np.testing.assert_allclose(times.Rounded(times.Times([1.0, 1e-5, 0.0]))(DISCRETE, 2), [1.0, 0.001, 0.0])


def test_defaults_are_the_published_ones():
    """Lee et al. 2024 for Stable Diffusion: 0.6 and 0.6; EDM: rho = 7; SD3: a shift of 3; Flux's shift by tokens."""
    published = {
        times.BetaQuantile: {"alpha": 0.6, "beta": 0.6},
        times.FlowShift: {"shift": 3.0},
        times.Karras: {"rho": 7.0, "sigma_min": None, "sigma_max": None},
        times.Polyexponential: {"rho": 1.0, "sigma_min": None, "sigma_max": None},
        times.Leading: {"offset": 0},
    }
    for kind, arguments in published.items():
        assert kind().get_config() == arguments
    for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        assert times.FlowShift.for_tokens(tokens).shift == pytest.approx(np.exp(mu))
