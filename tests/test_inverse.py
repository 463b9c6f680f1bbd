"""Inpainting, restoring, image to image: against the exact posterior of Gaussian data."""

import itertools

import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import Sampler, analytic, operators, schedules, times
from kdiff.guidance import DPS, Inpaint, MomentMatching, PiGDM
from kdiff.sampling import initial_noise
from kdiff.schedules import bridge
from kdiff.solvers import DPMSolverPP, UniPC
from tests.test_guidance import in_a_run
from tests.test_operators import matrix
from tests.toys import mostly_once, numpy

SHAPE, STD, NOISE = (4, 4, 1), 0.5, 0.1
MEAN = np.random.default_rng(0).normal(0, 0.3, SHAPE)
DATA = analytic.Gaussian(MEAN, STD**2)
COSINE = schedules.Cosine()
SCHEDULES = [COSINE, schedules.Rectified(), schedules.VarianceExploding(), schedules.LinearBeta()]
OPERATORS = [
    operators.Downsample(2),
    operators.Mask(np.eye(4)),
    operators.Blur.gaussian(0.7, 1),
    operators.Composed([operators.Blur.gaussian(0.7, 1), operators.Downsample(2)]),
]


def measured(operator, count=3):
    y = numpy(operator(DATA.sample(count, seed=5)))
    return y + NOISE * np.random.default_rng(6).normal(size=y.shape).astype("float32")


def posterior(operator, y, x_t=None, alpha=0.0, sigma=1.0):
    """(mean, covariance) of p(x | y), or of p(x | x_t, y), in float64."""
    a = matrix(operator, SHAPE)
    precision = np.eye(16) / STD**2 + a.T @ a / NOISE**2 + np.eye(16) * alpha**2 / sigma**2
    right = MEAN.reshape(1, -1) / STD**2 + y.reshape(len(y), -1) @ a / NOISE**2
    if x_t is not None:
        right = right + alpha / sigma**2 * x_t.reshape(len(y), -1)
    return np.linalg.solve(precision, right.T).T.reshape(len(y), *SHAPE), np.linalg.inv(precision)


# Restoring


@pytest.mark.parametrize("schedule", mostly_once(SCHEDULES), ids=repr)
@pytest.mark.parametrize("operator", mostly_once(OPERATORS, 2), ids=repr)
def test_pigdm_is_exact_on_isotropic_data(operator, schedule):
    y = measured(operator)
    one = PiGDM(operator, y, NOISE, STD, iterations=30, highest=np.inf)
    for t in (0.2, 0.5, 0.8):
        m = schedule.at(np.float32(t))
        alpha, sigma = float(m.alpha), float(m.sigma)
        x_t = (alpha * DATA.sample(3) + sigma * np.random.default_rng(1).normal(size=(3, *SHAPE))).astype("float32")
        exact, _ = posterior(operator, y, x_t, alpha, sigma)
        received = numpy(in_a_run(one, DATA, x_t.shape, m, schedule=schedule)(ops.convert_to_tensor(x_t), m).x_hat)
        np.testing.assert_allclose(received, exact, atol=2e-4)


@pytest.mark.once
@pytest.mark.parametrize("rule", [PiGDM, MomentMatching])
def test_pure_noise_is_left_alone(rule):
    """At the end of the cosine schedule an error of the derivative is multiplied by sigma^2 / alpha = 2,000."""
    operator, y = OPERATORS[0], measured(OPERATORS[0])
    x_t = np.random.default_rng(1).normal(size=(3, *SHAPE)).astype("float32")

    def erring(x, m):
        return DATA(x, m) + 0.1 * ops.convert_to_tensor(x)

    for t, guided in ((1.0, False), (0.7, True)):
        m = COSINE.at(np.float32(t))
        received = numpy(in_a_run(rule(operator, y, NOISE), erring, x_t.shape, m)(ops.convert_to_tensor(x_t), m).x_hat)
        assert np.allclose(received, numpy(erring(x_t, m)), atol=1e-6) != guided
        assert np.abs(received).max() < 10


@pytest.mark.once
def test_pigdm_samples_the_posterior():
    """Mean and covariance of 2,000 samples: the mean of each pixel errs by up to 0.5 / sqrt(2000) = 0.011, the largest
    of 16 by three times as much; a variance of 0.25 by 0.008."""
    operator = OPERATORS[0]
    y = measured(operator, 1)
    mean, covariance = posterior(operator, y)
    one = PiGDM(operator, y[0], NOISE, STD, iterations=1)
    for solver in (DPMSolverPP(), UniPC()):
        sampler = Sampler(solver, "uniform_log_snr", steps=60, guidance=one)
        x = numpy(sampler(DATA, COSINE, (2000, *SHAPE))).reshape(2000, -1)
        np.testing.assert_allclose(x.mean(0), mean.reshape(-1), atol=0.05)
        np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.03)


@pytest.mark.once
def test_a_step_of_dps_is_the_papers():
    """x_then of DDPM, less scale grad |y - A x_hat(x_t)|, whose gradient is known for x_hat = mean + k (x_t - ...)."""
    operator = OPERATORS[-1]
    y, x = measured(operator), np.random.default_rng(2).normal(size=(3, *SHAPE)).astype("float32")
    path = np.array([0.6, 0.5])
    now, then = (COSINE.at(np.float32(t)) for t in path)
    plain, *_ = Sampler("ddpm").steps_of(DATA, COSINE, x.shape, x=x, times=path, seed=1)
    guided, *_ = Sampler("ddpm", guidance=DPS(operator, y, 0.7)).steps_of(
        DATA, COSINE, x.shape, x=x, times=path, seed=1
    )
    a, alpha, sigma = matrix(operator, SHAPE), float(now.alpha), float(now.sigma)
    slope = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    rest = y.reshape(3, -1) - numpy(DATA(x, now)).reshape(3, -1) @ a.T
    gradient = -slope * rest @ a / np.linalg.norm(rest, axis=1, keepdims=True)
    np.testing.assert_allclose(numpy(guided.x - plain.x).reshape(3, -1), -0.7 * gradient, atol=2e-5)
    assert float(bridge(now, then)[1]) > 0


@pytest.mark.parametrize("operator", mostly_once(OPERATORS), ids=repr)
def test_dps_agrees_with_the_measurement(operator):
    """Far better than samples of the prior do."""
    y = measured(operator)
    errors = []
    for rules in ((), DPS(operator, y, 0.3)):
        x = Sampler("ddpm", steps=100, guidance=rules)(DATA, COSINE, (3, *SHAPE))
        errors.append(np.sqrt(np.mean((numpy(operator(x)) - y) ** 2)))
    assert errors[1] < errors[0] / 2


@pytest.mark.once
def test_each_sample_has_its_own_measurement():
    operator, y = OPERATORS[0], measured(OPERATORS[0])
    together = numpy(Sampler("ddim", steps=8, guidance=PiGDM(operator, y, NOISE))(DATA, COSINE, (3, *SHAPE)))
    alone = numpy(Sampler("ddim", steps=8, guidance=PiGDM(operator, y[:1], NOISE))(DATA, COSINE, (1, *SHAPE)))
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


# A series, of which a part is known

SERIES = analytic.Gaussian(
    np.linspace(-0.5, 0.5, 8)[:, None], 0.25 * 0.8 ** np.abs(np.arange(8)[:, None] - np.arange(8))
)
MISSING = np.isin(np.arange(8), [2, 3, 4, 7])
VALUES = np.where(MISSING, 0.0, np.random.default_rng(2).normal(0.0, 0.5, 8))[:, None].astype("float32")


def given_the_rest(noise):
    """The mean and covariance of an autoregressive series (`SERIES`), given numbers with noise."""
    a, c, mean = np.eye(8)[~MISSING], SERIES.covariance, SERIES.mean[:, 0]
    gain = c @ a.T @ np.linalg.inv(a @ c @ a.T + noise**2 * np.eye(len(a)))
    return mean + gain @ (VALUES[~MISSING, 0] - a @ mean), c - gain @ a @ c


@pytest.mark.parametrize(
    "schedule", mostly_once([COSINE, schedules.Rectified(), schedules.VarianceExploding()]), ids=repr
)
def test_moment_matching_is_exact_on_any_gaussian(schedule):
    """E[x | x_t, y], whose formula has x_t for another measurement."""
    rule = MomentMatching(operators.Mask(MISSING[:, None]), VALUES, 0.1, iterations=8, highest=np.inf)
    for t in (0.2, 0.5, 0.8):
        m = schedule.at(np.float32(t))
        alpha, sigma = float(m.alpha), float(m.sigma)
        x_t = (alpha * SERIES.sample(3) + sigma * np.random.default_rng(1).normal(size=(3, 8, 1))).astype("float32")
        mean, covariance = given_the_rest(0.1)
        gain = alpha * covariance @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(8))
        exact = mean + (x_t[..., 0] - alpha * mean) @ gain.T
        received = numpy(in_a_run(rule, SERIES, x_t.shape, m, schedule=schedule)(ops.convert_to_tensor(x_t), m).x_hat)
        np.testing.assert_allclose(received[..., 0], exact, atol=2e-4)


@pytest.mark.once
def test_what_is_missing_of_a_series_is_drawn_from_the_exact_conditional():
    """A run without noise is affine in the x it begins with: the mean and covariance of all samples are known from nine
    of them. The mean is exact in any number of steps; of the covariance the error falls with their square."""
    rule = MomentMatching(operators.Mask(MISSING[:, None]), VALUES, 0.2, iterations=4, highest=np.inf)
    exact_mean, exact_covariance = given_the_rest(0.2)
    errors = []
    for steps in (16, 32):
        sampler = Sampler("heun", "uniform_log_snr", steps, guidance=rule)
        m = COSINE.sampled_at(np.float32(sampler.times(COSINE)[0]))
        x = float(m.sigma) * np.concatenate([np.zeros((1, 8)), np.eye(8)])[..., None]
        x = numpy(sampler(SERIES, COSINE, x.shape, x=x.astype("float32")))[..., 0].astype("float64")
        deviations = x[1:] - x[0]
        errors.append([np.abs(x[0] - exact_mean).max(), np.abs(deviations.T @ deviations - exact_covariance).max()])
    (mean, covariance), (after, smaller) = errors
    assert max(mean, after) < 5e-4  # with less noise in what is known than 0.2, a wrong C would hardly move it
    assert smaller < 5e-3
    assert covariance / smaller == pytest.approx(4.0, rel=0.2)


# Inpainting

LEFT = np.zeros((4, 4), bool)
LEFT[:, 2:] = True  # the right half is painted


def correlated():
    """Pixels whose correlation falls with their distance."""
    places = np.stack(np.mgrid[:4, :4], -1).reshape(16, 2)
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    return analytic.Gaussian(np.zeros(SHAPE), STD**2 * np.exp(-distances / 3.0))


@pytest.mark.once
@pytest.mark.parametrize("solver", mostly_once(["ddpm", "ddim", "heun", "dpm_solver_pp"]))
def test_what_is_known_is_kept(solver):
    image = DATA.sample(2, seed=3)
    sampler = Sampler(solver, "uniform_log_snr", steps=10, guidance=Inpaint(image, LEFT))
    x = numpy(sampler(DATA, schedules.LinearBeta(), (2, *SHAPE)))
    np.testing.assert_allclose(x[:, :, :2], image[:, :, :2], atol=1e-4)
    assert np.abs(x[:, :, 2:] - image[:, :, 2:]).max() > 0.1


@pytest.mark.once
def test_going_back_and_forth_heals_the_border():
    """RePaint on correlated pixels: the mean of what is painted nears the exact conditional mean as repeats grow."""
    data = correlated()
    image, c = data.sample(1, seed=4)[0], data.covariance
    known, painted = ~LEFT.reshape(-1), LEFT.reshape(-1)
    exact = c[np.ix_(painted, known)] @ np.linalg.solve(c[np.ix_(known, known)], image.reshape(-1)[known])
    errors = []
    for repeats in (1, 5, 20):
        grid = times.Jumps("trailing", length=2, repeats=repeats)
        x = numpy(Sampler("ddpm", grid, steps=40, guidance=Inpaint(image, LEFT))(data, COSINE, (500, *SHAPE)))
        errors.append(np.sqrt(np.mean((x.reshape(500, -1)[:, painted].mean(0) - exact) ** 2)))
    assert errors[1] < errors[0] / 1.5
    assert errors[2] < 0.06 < errors[0]


@pytest.mark.once
@pytest.mark.parametrize("shape", mostly_once([(4, 4), (4, 4, 1), (2, 4, 4), (2, 4, 4, 1)]))
def test_masks_of_all_shapes(shape):
    image, mask = DATA.sample(2), np.zeros(shape)
    mask[..., 0 if shape[-1] == 4 else slice(None)] = 1
    x = Sampler("ddim", steps=3, guidance=Inpaint(image, mask))(DATA, COSINE, (2, *SHAPE))
    assert numpy(x).shape == (2, *SHAPE)


@pytest.mark.once
@pytest.mark.parametrize("solver", mostly_once(["heun", "ddpm"]))
def test_known_pixels_of_one_noise(solver):
    """The denoiser sees the image with the noise that is given, whatever the solver draws, but for the first call."""
    image, (begin, noise), seen = DATA.sample(2, seed=3), np.random.default_rng(7).normal(size=(2, 2, *SHAPE)), []

    def denoise(x, m):
        seen.append((numpy(x), numpy(m.alpha), numpy(m.sigma)))
        return DATA(x, m)

    sampler = Sampler(solver, steps=3, guidance=Inpaint(image, LEFT, noise))
    x = numpy(sampler(denoise, COSINE, (2, *SHAPE), x=begin))
    np.testing.assert_allclose(seen[0][0], begin, atol=1e-6)
    for x_t, alpha, sigma in seen[1:]:
        known = alpha * image + sigma * noise
        np.testing.assert_allclose(x_t[:, :, :2], known[:, :, :2], atol=1e-5)
        assert np.abs(x_t - known)[:, :, 2:].max() > 0.1
    assert len(seen) == 3 if solver == "ddpm" else 5
    np.testing.assert_allclose(x[:, :, :2], image[:, :, :2], atol=5e-3)


@pytest.mark.once
def test_the_noise_follows_the_mask_of_strengths():
    """A pixel has it until its time, and none of the image afterwards; outside a run there is no first call."""
    seen, noise = [], np.ones(SHAPE)
    guided = Inpaint(MEAN, np.full((4, 4), 0.5), noise)(lambda x, m: seen.append(numpy(x)) or x)
    for t in (1.0, 0.51, 0.5, 0.1):
        m = COSINE.at(np.float32(t))
        guided(np.full((1, *SHAPE), 3.0, "float32"), m)
        known = numpy(m.alpha) * MEAN + numpy(m.sigma) * noise
        np.testing.assert_allclose(seen[-1][0], known if t > 0.5 else 3.0, atol=1e-6)


@pytest.mark.once
def test_what_is_known_has_no_noise_where_a_grid_ends_above_zero():
    """As Stable Diffusion's do; a run that is stopped has that of its time."""
    image, schedule = DATA.sample(2, seed=3), schedules.LinearBeta()
    sampler = Sampler("ddim", steps=5, to_zero=False, guidance=Inpaint(image, LEFT))
    for times_of_run, exact in ((sampler.times(schedule), True), (sampler.times(schedule, stop=0.3), False)):
        *_, step = sampler.steps_of(DATA, schedule, (2, *SHAPE), times=times_of_run)
        error = np.abs(numpy(step.x) - image)
        assert (error[:, :, :2].max() == 0.0) == exact
        assert error[:, :, 2:].max() > 0.1


# Image to image, and grids with jumps


@pytest.mark.once
def test_noising_and_denoising_keeps_the_distribution():
    """SDEdit with the exact denoiser: from data to the noise level of any strength, and back, to data."""
    data = correlated()
    for strength in (0.3, 0.7):
        path = Sampler("ddpm", "uniform_log_snr", steps=100).times(COSINE, strength)
        m = COSINE.at(np.float32(path[0]))
        x = m.alpha * data.sample(4000) + m.sigma * initial_noise((4000, *SHAPE), 1)
        sampler = Sampler("dpm_solver_pp", "uniform_log_snr", steps=100)
        *_, step = sampler.steps_of(data, COSINE, (4000, *SHAPE), x=x, times=path)
        covariance = np.cov(numpy(step.x).reshape(4000, -1).T)
        np.testing.assert_allclose(covariance, data.covariance, atol=0.03)


@pytest.mark.once
@pytest.mark.parametrize("schedule", [COSINE, schedules.LinearBeta(), schedules.CosineBeta(100)], ids=repr)
def test_the_times_of_a_strength(schedule):
    sampler = Sampler("ddim", "trailing", 10)
    whole = sampler.times(schedule)
    np.testing.assert_array_equal(sampler.times(schedule, 1.0), whole)
    np.testing.assert_array_equal(sampler.times(schedule, 0.0), [0.0])
    for strength in (0.01, 0.34, 0.5, 0.77, 0.96):
        path = sampler.times(schedule, strength)
        assert path[0] == pytest.approx(strength, abs=0.5 / (schedule.num_steps or 1e9) + 1e-9)
        assert np.all(np.diff(path) < -0.01 + 1e-9)
        assert abs(len(path) - 1 - 10 * strength) <= 1
        assert set(path[1:]) <= set(whole)
    for bad in (-0.1, 1.1, "half"):
        with pytest.raises(ValueError, match="strength"):
            sampler.times(schedule, bad)


@pytest.mark.once
@pytest.mark.parametrize("schedule", [COSINE, schedules.LinearBeta()], ids=repr)
def test_a_strength_below_the_end_of_a_run_is_no_step(schedule):
    """Of a run that ends at t = 0.1: never up."""
    sampler = Sampler("ddim", "trailing", 10, to_zero=False)
    for strength in (0.0, 0.05, 0.1):
        np.testing.assert_array_equal(sampler.times(schedule, strength), [0.0])
    np.testing.assert_allclose(sampler.times(schedule, 0.12), [0.12, 0.1])


@pytest.mark.once
def test_jumps():
    falling = times.Trailing()(COSINE, 5)
    a, b, c, d, e, f = falling
    path = times.Jumps("trailing", length=2, repeats=3)(COSINE, 5)
    np.testing.assert_array_equal(path, [a, b, c, d, b, c, d, b, c, d, e, f, d, e, f, d, e, f])
    np.testing.assert_array_equal(times.Jumps(repeats=1)(COSINE, 5), falling)
    with pytest.raises(ValueError, match="length"):
        times.Jumps(length=0)
    with pytest.raises(ValueError, match="repeats"):
        times.Jumps(repeats=0)


@pytest.mark.once
@pytest.mark.parametrize(("solver", "count"), [("ddim", 400), ("ddpm", 400), ("dpm_solver_pp", 40), ("uni_pc", 40)])
def test_a_run_with_jumps_still_draws_the_data(solver, count):
    """With the exact denoiser going back changes nothing but the sample: mean and covariance stay those of the data.
    Solvers of order 1 need many steps for it."""
    sampler = Sampler(solver, times.Jumps("uniform_log_snr", length=count // 4, repeats=2), steps=count)
    steps = list(sampler.steps_of(DATA, COSINE, (3000, *SHAPE)))
    assert len(steps) == count * 2 + 4 == steps[0].total
    x = numpy(steps[-1].x).reshape(3000, -1)
    np.testing.assert_allclose(x.mean(0), MEAN.reshape(-1), atol=0.05)
    np.testing.assert_allclose(np.cov(x.T), STD**2 * np.eye(16), atol=0.04)


@pytest.mark.once
def test_noise_between_noises():
    a, b = (np.random.default_rng(seed).normal(size=(8, 8, 3)) for seed in (0, 1))
    path = kdiff.random.slerp(a, b, np.linspace(0, 1, 5))
    np.testing.assert_allclose(path[[0, -1]], [a, b], atol=1e-6)
    norms = np.linalg.norm(path.reshape(5, -1), axis=1)
    assert norms.min() > 0.98 * min(np.linalg.norm(a), np.linalg.norm(b))
    angles = [np.arccos(np.sum(p * q) / np.linalg.norm(p) / np.linalg.norm(q)) for p, q in itertools.pairwise(path)]
    # Equal on the arc, but for `a` and `b` of different length.
    np.testing.assert_allclose(angles, np.mean(angles), rtol=0.1)
    np.testing.assert_allclose(kdiff.random.slerp(a, a, [0.3])[0], a, atol=1e-6)
    with pytest.raises(ValueError, match="the same shape"):
        kdiff.random.slerp(a, b[0], [0.5])


@pytest.mark.once
@pytest.mark.parametrize(
    ("one", "message"),
    [
        (lambda: Inpaint(MEAN, np.full((4, 4), 1.5)), r"in \[0, 1\]"),
        (lambda: Inpaint(MEAN, np.ones((5, 4))), r"mask.*\(4, 4\).*\(5, 4\)"),
        (lambda: Inpaint(np.zeros((8, 8, 1)), LEFT), r"image.*\(4, 4, 1\)"),
        (lambda: Inpaint(np.full(SHAPE, np.nan), LEFT), "NaN"),
        (lambda: Inpaint(MEAN, LEFT, np.zeros((5, 4, 1))), r"noise.*\(4, 4, 1\).*\(5, 4, 1\)"),
        (lambda: Inpaint(MEAN, LEFT, np.full(SHAPE, np.inf)), "`noise` must be finite"),
        (lambda: PiGDM(operators.Downsample(3), np.zeros((1, 1, 1))), "3 must divide"),
        (lambda: PiGDM("downsample", np.zeros((4, 4, 1))), r"measurement.*\(2, 2, 1\)"),
        (lambda: DPS("downsample", np.zeros((2, 2, 1)), scale=None), "scale"),
        (lambda: PiGDM("downsample", np.zeros((2, 2, 1)), std=0.0), "std"),
    ],
)
def test_what_does_not_fit_is_an_error_before_the_run(one, message):
    def denoise(x, m):
        raise AssertionError("the run has begun")

    with pytest.raises(ValueError, match=message):
        Sampler("ddim", steps=3, guidance=one())(denoise, COSINE, (2, *SHAPE))


@pytest.mark.once
def test_configurations():
    paints = (Inpaint(MEAN, LEFT), Inpaint(MEAN, LEFT, MEAN))
    for one in (*paints, PiGDM("downsample", np.zeros((2, 2, 1))), DPS(OPERATORS[2], np.zeros(SHAPE), 0.5)):
        again = type(one).from_config(one.get_config())
        assert again == one
