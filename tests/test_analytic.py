"""The exact denoisers, against each other, against sums over samples, and against NumPy in float64."""

import numpy as np
import pytest
from keras import ops

from kdiff import analytic, schedules
from kdiff.schedules import Marginal
from tests.toys import exact_denoiser, numpy

RNG = np.random.default_rng(0)
TURN = np.linalg.qr(RNG.standard_normal((3, 3)))[0]
FULL = TURN @ np.diag([0.01, 0.5, 2.0]) @ TURN.T
MIXTURES = {
    "one variance": analytic.GaussianMixture(RNG.normal(size=(4, 3)), 0.04),
    "variances": analytic.GaussianMixture(RNG.normal(size=(4, 3)), [0.01, 0.1, 0.2, 1.0], [1, 2, 3, 4]),
    "coordinates": analytic.GaussianMixture(RNG.normal(size=(2, 3)), RNG.uniform(0.01, 1, (2, 3))),
    "full": analytic.GaussianMixture(RNG.normal(size=(2, 3)), np.stack([FULL, 0.3 * FULL]), [0.3, 0.7]),
    "gaussian": analytic.Gaussian([0.3, -0.2, 0.1], FULL),
    "points": analytic.Points(RNG.normal(size=(5, 3))),
}
each = pytest.mark.parametrize("data", MIXTURES.values(), ids=MIXTURES)
LEVELS = [0.02, 0.4, 0.9]


def reference(data, x_t, alpha, sigma):
    """(E[x | x_t], log p(x_t)) from the densities of the components, one point and one component at a time."""
    count, size = len(data.means), 3
    covariances = data.covariances
    if covariances.ndim < 3:
        column = covariances[:, None] if covariances.ndim == 1 else covariances
        covariances = np.stack([np.diag(v) for v in np.broadcast_to(column, (count, size))])
    weights = data.weights / data.weights.sum()
    x_hat, logs = [], []
    for x in x_t.astype("float64"):
        c = [alpha**2 * cov + sigma**2 * np.eye(size) for cov in covariances]
        d = [x - alpha * mean for mean in data.means]
        log = [
            np.log(w) - 0.5 * (di @ np.linalg.solve(ci, di) + np.linalg.slogdet(2 * np.pi * ci)[1])
            for w, di, ci in zip(weights, d, c, strict=True)
        ]
        r = np.exp(log - np.logaddexp.reduce(log))
        means = [
            m + alpha * v @ np.linalg.solve(ci, di) for m, v, ci, di in zip(data.means, covariances, c, d, strict=True)
        ]
        x_hat.append(np.einsum("k,ki->i", r, means))
        logs.append(np.logaddexp.reduce(log))
    return np.stack(x_hat), np.array(logs)


@each
@pytest.mark.parametrize("t", LEVELS)
def test_denoiser_score_and_likelihood(data, t):
    m = schedules.Cosine().at(t)
    x_t = RNG.normal(size=(6, 3)).astype("float32")
    x_hat, logs = reference(data, x_t, float(m.alpha), float(m.sigma))
    np.testing.assert_allclose(numpy(data(x_t, m)), x_hat, rtol=1e-3, atol=1e-3)
    # Near t = 0 the density of points far from the data is e^-thousands.
    np.testing.assert_allclose(numpy(data.log_prob(x_t, m)), logs, rtol=1e-3, atol=1e-3)
    score = (float(m.alpha) * x_hat - x_t) / float(m.sigma) ** 2
    np.testing.assert_allclose(numpy(data.score(x_t, m)), score, rtol=2e-3, atol=2e-3 * np.abs(score).max())


def test_each_row_may_have_its_own_level():
    data, schedule = MIXTURES["full"], schedules.Rectified()
    x_t, t = RNG.normal(size=(3, 3)).astype("float32"), np.array([0.1, 0.5, 0.9], "float32")
    alone = [numpy(data(x_t[i : i + 1], schedule.at(t[i])))[0] for i in range(3)]
    np.testing.assert_allclose(numpy(data(x_t, schedule.at(t))), alone, atol=1e-5)


def test_a_gaussian_is_a_mixture_of_one_and_images_are_vectors():
    m = schedules.Cosine().at(0.6)
    x = RNG.normal(size=(4, 2, 2, 1)).astype("float32")
    data = analytic.Gaussian(np.full((2, 2, 1), 0.3), 0.25)
    np.testing.assert_allclose(numpy(data(x, m)), numpy(exact_denoiser()(ops.convert_to_tensor(x), m)), atol=1e-5)
    assert data.sample(5).shape == (5, 2, 2, 1)
    assert data == analytic.Gaussian.from_config(data.get_config())


@pytest.mark.once
@each
def test_samples_have_the_mean_and_covariance(data):
    x = data.sample(20000, seed=1)
    weights = data.weights / data.weights.sum()
    mean = np.einsum("k,ki->i", weights, data.means)
    np.testing.assert_allclose(x.mean(0), mean, atol=5 * x.std() / np.sqrt(len(x)))
    clean = Marginal(0.0, 1.0, 1e-3, 13.8)  # the density of the data, to its width
    assert np.all(numpy(data.log_prob(x[:50], clean)) > numpy(data.log_prob(x[:50] + 6.0, clean)))


@pytest.mark.once
@each
def test_posterior_samples_have_the_posterior_mean_and_variance(data):
    """Over many draws from one x_t, the mean is the denoiser's; over many x, x_t, their law is that of the data."""
    m = schedules.Cosine().at(0.5)
    x_t = np.repeat(RNG.normal(size=(1, 3)).astype("float32"), 20000, 0)
    x = numpy(data.posterior_sample(x_t, m, seed=2))
    np.testing.assert_allclose(x.mean(0), numpy(data(x_t[:1], m))[0], atol=5 * x.std() / np.sqrt(len(x)) + 1e-5)
    clean = data.sample(20000, seed=3)
    noisy = float(m.alpha) * clean + float(m.sigma) * RNG.normal(size=clean.shape).astype("float32")
    again = numpy(data.posterior_sample(noisy, m, seed=4))
    np.testing.assert_allclose(np.cov(again.T), np.cov(clean.T), atol=0.05 * clean.var())


@pytest.mark.once
@pytest.mark.parametrize("schedule", [schedules.Cosine(), schedules.Rectified(), schedules.LinearBeta()], ids=repr)
def test_the_flow_of_a_gaussian_keeps_standard_scores(schedule):
    """The closed form, the Runge-Kutta method, and the way back, agree."""
    data = analytic.Gaussian([0.3, -0.2, 0.1], FULL)
    x = RNG.normal(size=(5, 3))
    closed = data.flow(x, schedule, 0.9, 0.1)
    mixture = analytic.GaussianMixture(data.means, data.covariances)
    np.testing.assert_allclose(mixture.flow(x, schedule, 0.9, 0.1), closed, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(data.flow(closed, schedule, 0.1, 0.9), x, atol=1e-9)


@pytest.mark.once
def test_the_flow_of_a_mixture_keeps_quantiles():
    """In one dimension the probability flow keeps the share of probability below a point."""
    from math import erf

    data, schedule = analytic.GaussianMixture([[-1.0], [0.5]], [0.04, 0.09], [1.0, 2.0]), schedules.Cosine()
    x = np.linspace(-1.5, 1.5, 7)[:, None]

    def below(x, t):
        m = schedule.at(t)
        stds = np.sqrt(float(m.alpha) ** 2 * np.array([0.04, 0.09]) + float(m.sigma) ** 2)
        z = (x - float(m.alpha) * np.array([-1.0, 0.5])) / stds
        return (0.5 * (1 + np.vectorize(erf)(z / np.sqrt(2)))) @ np.array([1 / 3, 2 / 3])

    np.testing.assert_allclose(below(data.flow(x, schedule, 0.95, 0.1), 0.1), below(x, 0.95), atol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: analytic.GaussianMixture([1.0, 2.0]), "means"),
        (lambda: analytic.GaussianMixture([[1.0, 2.0]], [0.1, 0.2]), "covariances"),
        (lambda: analytic.GaussianMixture([[1.0, 2.0]], np.zeros((2, 2, 2))), "covariances"),
        (lambda: analytic.GaussianMixture([[1.0, 2.0]], -1.0), "eigenvalue"),
        (lambda: analytic.GaussianMixture([[1.0], [2.0]], 1.0, [1.0, 0.0]), "weights"),
        (lambda: analytic.Gaussian(1.0), "mean"),
        (lambda: analytic.Points([[1.0]]).sample(0), "num_samples"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
