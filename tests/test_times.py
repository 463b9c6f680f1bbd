"""Training times and labels. The times of sampling: test_times_grids.py; other implementations: *_reference.py."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

from kdiff import random, schedules, times
from kdiff.times import TimeLabel, TimeSampler
from tests.toys import numpy

DISCRETE, CONTINUOUS = schedules.LinearBeta(), schedules.Cosine()
EVEN = [times.Uniform(), times.Stratified(), times.Systematic(), times.LowDiscrepancy(), times.Antithetic()]
BENT = [
    times.LogitNormal(),
    times.LogitNormal(-0.7, 0.6),
    times.Mode(),
    times.Mode(-0.9),
    times.Mode(0.0),
    times.PowerLaw(),
    times.PowerLaw(-0.5),
    times.LogNormalSigma(),
    times.LogNormalSigma(0.5, 2.0),
    times.LogUniform(),
]
ON = [CONTINUOUS, schedules.Rectified(), DISCRETE]


def draw(sampler, schedule=CONTINUOUS, batch=64, seed=0):
    return numpy(sampler(schedule, batch, random.key_of(seed)))


@pytest.mark.once
def test_every_time_sampler_is_here():
    ours = {kind for kind in TimeSampler.names().values() if kind.__module__.startswith("kdiff.")}
    assert ours == {type(sampler) for sampler in [*EVEN, *BENT, times.Discrete()]}


# Uniform times


@pytest.mark.once
@pytest.mark.parametrize("sampler", [*EVEN, times.Discrete(10)], ids=repr)
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


@pytest.mark.once
@pytest.mark.parametrize("sampler", EVEN, ids=repr)
def test_each_time_alone_is_uniform(sampler):
    """Whatever its place in the batch, over seeds: Kolmogorov and Smirnov at a level of 1e-4."""
    drawn = np.stack([draw(sampler, batch=5, seed=seed) for seed in range(100)])
    assert all(stats.kstest(place, "uniform").pvalue > 1e-4 for place in drawn.T)


@pytest.mark.parametrize("sampler", [*EVEN, *BENT, times.Discrete()], ids=repr)
def test_no_time_is_below_the_first_step(sampler):
    """Where a discrete process has none, and log-SNR reaches 40; of 10 steps a tenth of the times would be there."""
    schedule = schedules.LinearBeta(10)
    for key in range(4):
        drawn = draw(sampler, schedule, 256, key)
        assert drawn.min() >= np.float32(0.1)
        assert drawn.max() <= 1
    if not isinstance(sampler, (times.Discrete, times.LogNormalSigma)):  # some times of the latter are put at an end
        assert integral(sampler, schedule)[1][-1] == pytest.approx(1.0, abs=5e-3)
        assert numpy(sampler.density(schedule, np.float32([0.09]))) == 0


def test_discrete_times_are_the_steps():
    drawn = draw(times.Discrete(), schedules.LinearBeta(8), batch=64)
    assert set(np.round(drawn * 8, 5)) == set(range(1, 9))
    with pytest.raises(ValueError, match="continuous"):
        draw(times.Discrete(), CONTINUOUS)
    with pytest.raises(ValueError, match="num_steps"):
        times.Discrete(0)
    with pytest.raises(ValueError, match=r"at most 8.*LinearBeta\(num_steps=8\).*received: 16"):
        draw(times.Discrete(16), schedules.LinearBeta(8))


def test_stratified_times_cover_every_part_once():
    first = []
    for seed in range(20):
        drawn = draw(times.Stratified(), batch=16, seed=seed)
        assert sorted((drawn * 16).astype(int)) == list(range(16))
        first.append(int(drawn[0] * 16))
    assert len(set(first)) > 5  # the place in the batch does not tell the noise level


@pytest.mark.once
def test_stratified_times_are_independent_within_their_parts():
    """The places of 64 times in their parts are uniform, each its own: `Systematic` has one for all."""
    places = (draw(times.Stratified(), batch=64).astype("float64") * 64) % 1
    assert stats.kstest(places, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.5  # 4 standard errors


def gaps(t):
    """The distances between neighbours on the circle."""
    t = np.sort(t.astype("float64"))
    return np.diff(np.append(t, t[0] + 1.0))


def test_systematic_times_have_equal_distances():
    np.testing.assert_allclose(gaps(draw(times.Systematic(), batch=5)), 1 / 5, atol=3e-7)


def test_low_discrepancy_times_cover_every_run_evenly():
    """Three-distance theorem: n / phi mod 1 has at most three distances; of the golden ratio none exceeds 2 / n."""
    t = draw(times.LowDiscrepancy(), batch=4000)
    exact = np.arange(4000) * (np.sqrt(5) - 1) / 2
    assert np.abs((t - t[0] - exact + 0.5) % 1.0 - 0.5).max() < 2e-6
    for run in (t[:64], t[17:81], t[3900:3921]):
        found = gaps(run)
        assert len(set(np.round(found, 5))) <= 3
        assert found.max() < 2 / len(run)
        # A part of a batch of the other kind does not cover [0, 1).
    assert gaps(draw(times.Systematic(), batch=64)[:16]).max() > 0.7


def test_antithetic_times_are_mirrored():
    t = draw(times.Antithetic(), batch=6)
    np.testing.assert_allclose(t[:3] + t[3:], 1.0, atol=1e-6)
    np.testing.assert_array_equal(draw(times.Antithetic(), batch=5), t[:5])
    assert draw(times.Antithetic(), batch=1).shape == (1,)


# Other densities


def integral(sampler, schedule, points=20001):
    """(t, F): the integral of the density from 0 to t, float64, over points that are dense at both ends."""
    y = np.linspace(-16, 16, points)
    t = expit(y)
    p = numpy(sampler.density(schedule, t.astype("float32"))).astype("float64") * t * expit(-y)
    return t, np.append(0.0, np.cumsum((p[1:] + p[:-1]) / 2 * (y[1] - y[0])))


def clipped(sampler, schedule):
    """The shares of the times that lie beyond the two ends of the schedule, and are put at the ends."""
    if not isinstance(sampler, times.LogNormalSigma):
        return 0.0, 0.0
    clean, noisy = (-0.5 * float(numpy(end)) for end in schedule.log_snr_ends())
    normal = stats.norm(sampler.mean, sampler.std)
    return normal.cdf(clean), normal.sf(noisy)


def test_discrete_times_share_the_log_snrs():
    """The mean over the steps of -slope / density is the whole range: each has the part that is nearest to it."""
    cases = [(schedules.CosineBeta(10), None), (schedules.CosineBeta(12), 4), (CONTINUOUS, 10), (DISCRETE, None)]
    for schedule, count in cases:
        sampler = times.Discrete(count)
        count = count or schedule.num_steps
        t = (np.arange(count) + 1).astype("float32") / count
        shares = -numpy(schedule.slope(t)) / numpy(sampler.density(schedule, t))
        high, low = (float(numpy(end)) for end in schedule.log_snr_ends())
        assert shares.mean() == pytest.approx(high - low, rel=1e-5)
        values = numpy(schedule.log_snr(t))
        middle = values[:2].mean()
        assert shares[0] / count == pytest.approx(high - middle, rel=1e-4)
    one = schedules.CosineBeta(1)
    assert numpy(times.Discrete().density(one, np.float32([1.0]))) == 1.0


@pytest.mark.once
@pytest.mark.parametrize("schedule", ON, ids=repr)
@pytest.mark.parametrize("sampler", BENT, ids=repr)
def test_density_is_that_of_the_draws(sampler, schedule):
    """It integrates to 1, and 4,000 draws follow it: Kolmogorov and Smirnov at a level of 1e-3."""
    t, total = integral(sampler, schedule)
    below, above = clipped(sampler, schedule)
    # The ends of the steps of a table fall between the points of the integral: 0.3 %.
    assert total[-1] + below + above == pytest.approx(1.0, abs=3e-3)
    drawn = draw(sampler, schedule, batch=4000)
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0
    assert drawn.max() <= 1

    def distribution(x):
        return np.interp(x, t, below + total) + above * (np.asarray(x) >= 1.0)

    inside = drawn[(drawn > drawn.min()) & (drawn < drawn.max())]  # what was put at the ends has no density
    assert len(inside) > 3900
    span = distribution(inside.min()), distribution(inside.max())
    assert stats.kstest(inside, lambda x: (distribution(x) - span[0]) / (span[1] - span[0])).pvalue > 1e-3


@pytest.mark.once
def test_known_quantiles_and_densities():
    """Against scipy in float64, at the uniform numbers themselves."""
    u = (np.arange(400) / 400).astype("float32")
    middle = (u + 2.0**-25).astype("float64")  # where `normal` reads a uniform number
    t = np.linspace(0.001, 0.999, 99).astype("float32")
    sampler = times.LogitNormal(0.4, 1.3)
    np.testing.assert_allclose(
        numpy(sampler.quantile(CONTINUOUS, u)), expit(0.4 + 1.3 * stats.norm.ppf(middle)), atol=1e-6
    )
    density = stats.norm.pdf(logit(t.astype("float64")), 0.4, 1.3) / t / (1.0 - t)
    np.testing.assert_allclose(numpy(sampler.density(CONTINUOUS, t)), density, rtol=2e-4)
    law = stats.beta(1.5, 1)
    np.testing.assert_allclose(numpy(times.PowerLaw(0.5).quantile(CONTINUOUS, u)), law.ppf(u), atol=1e-6)
    np.testing.assert_allclose(numpy(times.PowerLaw(0.5).density(CONTINUOUS, t)), law.pdf(t), rtol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 1.0, 2 / (np.pi - 2)])
def test_mode_is_monotone_and_its_density_is_the_slope(scale):
    """1 / p at t = f(u) is the slope of f by differences in float64; at the largest scale it vanishes at u = 1/2."""
    u = np.linspace(0.03, 0.97, 48)

    def f(u):
        return 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)

    sampler = times.Mode(scale)
    np.testing.assert_allclose(numpy(sampler.quantile(CONTINUOUS, u)), f(u), atol=1e-6)
    slope = (f(u - 1e-6) - f(u + 1e-6)) / 2e-6
    assert np.all(slope > -1e-6)
    np.testing.assert_allclose(1 / numpy(sampler.density(CONTINUOUS, f(u).astype("float32"))), slope, atol=2e-3)


@pytest.mark.once
@pytest.mark.parametrize("schedule", [*ON, schedules.VarianceExploding()], ids=repr)
def test_noise_levels_have_the_published_distribution(schedule):
    """Karras et al. 2022, table 1: ln sigma is normal. To the part of it that float32 knows of t near 1."""
    log_sigma = -0.5 * numpy(schedule.log_snr(draw(times.LogNormalSigma(points="systematic"), schedule, batch=4000)))
    expected = np.sort(stats.norm(-1.2, 1.2).ppf((np.arange(4000) + 0.5) / 4000))
    clean, noisy = (-0.5 * float(numpy(end)) for end in schedule.log_snr_ends())
    np.testing.assert_allclose(np.sort(log_sigma)[5:-5], np.clip(expected, clean, noisy)[5:-5], atol=0.06)
    log_snr = numpy(schedule.log_snr(draw(times.LogUniform("systematic"), schedule, batch=4000)))
    np.testing.assert_allclose(np.sort(log_snr), np.linspace(-2 * noisy, -2 * clean, 4000), atol=0.06)


def test_normal_numbers_are_finite_at_the_ends():
    """0 is drawn, and 1 as its mirror image: 5.3 standard deviations from the middle, not infinitely many."""
    ends = numpy(times.LogNormalSigma(0.0, 1.0).quantile(schedules.VarianceExploding(1e-6, 1e6), np.float32([0, 1])))
    sigma = 1e-6 * 1e12 ** ends.astype("float64")
    assert np.all(np.abs(np.abs(np.log(sigma)) - 5.3) < 0.3)


def test_points_cover_the_batch():
    """One time in each of n equally likely parts."""
    for points in ("stratified", "systematic"):
        u = stats.norm.cdf(logit(draw(times.LogitNormal(points=points), batch=16).astype("float64")))
        assert sorted((u * 16).astype(int)) == list(range(16))
    for wrong in ("discrete", "logit_normal"):
        with pytest.raises(ValueError, match="points"):
            times.LogitNormal(points=wrong)


@pytest.mark.once
@pytest.mark.parametrize(
    "make",
    [
        lambda: times.LogitNormal(std=0.0),
        lambda: times.LogitNormal(mean="a"),
        lambda: times.Mode(2.0),
        lambda: times.Mode(-1.1),
        lambda: times.PowerLaw(-1.0),
        lambda: times.LogNormalSigma(std=-1.0),
    ],
)
def test_impossible_distributions(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_a_sampler_of_ones_own_needs_no_density():
    class _Half(TimeSampler):
        def __call__(self, schedule, batch, key):
            return 0.5 * random.uniform(key, (batch,))

    sampler = _Half()
    assert times.Uniform().has_density
    assert not sampler.has_density
    assert draw(sampler).max() < 0.5
    with pytest.raises(NotImplementedError, match="_Half"):
        sampler.density(DISCRETE, np.float32([0.1]))


# Labels


@pytest.mark.once
def test_labels():
    m = DISCRETE.at(np.float32([0.001, 0.5, 1.0]))
    assert set(TimeLabel.names()) == {"scaled", "index", "log_snr", "rounded_label"}
    np.testing.assert_allclose(numpy(times.Scaled()(DISCRETE, m)), [1, 500, 1000], rtol=1e-6)
    np.testing.assert_allclose(numpy(times.Scaled(1.0)(DISCRETE, m)), [0.001, 0.5, 1], rtol=1e-6)
    np.testing.assert_allclose(numpy(times.Index()(DISCRETE, m)), [0, 499, 999], atol=1e-4)
    # EDM's c_noise = ln(sigma / alpha) / 4.
    ratio = numpy(m.sigma).astype("float64") / numpy(m.alpha)
    np.testing.assert_allclose(numpy(times.LogSNR()(DISCRETE, m)), np.log(ratio) / 4, rtol=1e-4)
    np.testing.assert_allclose(numpy(times.LogSNR(1.0)(DISCRETE, m)), numpy(m.log_snr))
    with pytest.raises(ValueError, match="continuous"):
        times.Index()(CONTINUOUS, m)


@pytest.mark.once
def test_rounded_labels():
    m = DISCRETE.at(np.float32([0.0014, 0.0016, 0.9999, 1.0, 0.5]))
    np.testing.assert_array_equal(numpy(times.RoundedLabel()(DISCRETE, m)), [0, 1, 999, 999, 499])
    np.testing.assert_array_equal(numpy(times.RoundedLabel(rounding="down")(DISCRETE, m)), [0, 0, 998, 999, 499])
    np.testing.assert_array_equal(numpy(times.RoundedLabel("scaled")(CONTINUOUS, m)), [1, 2, 1000, 1000, 500])
    with pytest.raises(ValueError, match="`rounding` must be one of"):
        times.RoundedLabel(rounding="up")


@pytest.mark.once
def test_defaults_are_the_published_ones():
    """Stable Diffusion 3, section 5.1: a logit-normal of 0 and 1, a mode of 1.29; EDM, table 1; pi-0: Beta(1.5, 1)."""
    published = {
        times.LogitNormal: {"mean": 0.0, "std": 1.0},
        times.Mode: {"scale": 1.29},
        times.PowerLaw: {"exponent": 0.5},
        times.LogNormalSigma: {"mean": -1.2, "std": 1.2},
        times.Scaled: {"scale": 1000.0},
        times.LogSNR: {"scale": -0.125},
    }
    for kind, arguments in published.items():
        assert {name: value for name, value in kind().get_config().items() if name != "points"} == arguments
