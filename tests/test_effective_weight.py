"""Which recipes are the same objective, and which are not."""

import sys

import numpy as np
import pytest
from scipy import stats

import kdiff
from kdiff import objectives, predictions, random, schedules, times, weightings
from kdiff.objectives import effective_weight, loss_weight, same_objective
from kdiff.schedules import NoiseSchedule
from tests.toys import numpy, tiny_network

LOG_SNR = np.linspace(-8.5, 8.5, objectives.POINTS)
EDM = schedules.VarianceExploding()


class _Straight(NoiseSchedule):
    """A schedule of a user's own, without a formula for its slope."""

    def log_snr(self, t):
        return 12.0 - 24.0 * t

    def time(self, log_snr):
        return (12.0 - log_snr) / 24.0


def ratio(weight, expected):
    """The quotient, over its median."""
    quotient = weight(LOG_SNR) / expected(LOG_SNR)
    return quotient / np.median(quotient)


KNOWN = [
    # Kingma and Gao 2023, table 1 (appendix D.2), of |noise_hat - noise|^2.
    (("cosine", "noise", None, "uniform"), lambda x: 1 / np.cosh(x / 2)),
    (("cosine", "velocity", None, "uniform"), lambda x: np.exp(-x / 2)),
    (("rectified", "flow", None, "uniform"), lambda x: np.exp(-x / 2)),
    (
        (EDM, predictions.Karras(0.5), None, times.LogNormalSigma()),
        lambda x: stats.norm.pdf(x, 2.4, 2.4) * (np.exp(-x) + 0.25),
    ),
    (("cosine", "noise", "variational", "uniform"), lambda x: np.ones_like(x)),
    # By hand: p(l) of SD3's logit-normal times is N(-2 mean, (2 std)^2), and the flow's error (1 + e^(-x / 2))^2.
    (
        ("rectified", "flow", None, times.LogitNormal(0.2, 1.5)),
        lambda x: stats.norm.pdf(x, -0.4, 3.0) * (1 + np.exp(-x / 2)) ** 2,
    ),
    (("cosine", "velocity", weightings.Sigmoid(-1.0), "uniform"), lambda x: 1 / (1 + np.exp(x + 1))),
]


@pytest.mark.once
@pytest.mark.parametrize(("recipe", "expected"), KNOWN)
def test_published_effective_weights(recipe, expected):
    """Up to a factor. At -8.5 float32 and Rectified's 1e-5 are felt: 1 %."""
    np.testing.assert_allclose(ratio(effective_weight(*recipe), expected), 1.0, atol=1e-2)


@pytest.mark.once
@pytest.mark.parametrize("name", ["variational", "likelihood"])
@pytest.mark.parametrize(
    ("schedule", "prediction", "sampler"),
    [
        ("cosine", "velocity", "uniform"),
        ("rectified", "flow", times.LogitNormal()),
        ("linear_beta", "noise", "discrete"),
        (EDM, predictions.Karras(), times.LogNormalSigma()),
        (schedules.Shifted("cosine", 2.0), "data", times.Antithetic()),
        (_Straight(), "score", times.Mode()),
    ],
)
def test_the_variational_bound_has_the_weight_one(schedule, prediction, sampler, name):
    """Not only up to a factor, and whatever the rest of the recipe."""
    np.testing.assert_allclose(effective_weight(schedule, prediction, name, sampler)(LOG_SNR), 1.0, rtol=1e-5)


SD3 = times.LogitNormal(0.3, 0.8)
SAME = [
    # The noise's error on a cosine schedule is the flow's on the same schedule, with its weight.
    (("cosine", "noise", None, "uniform"), ("cosine", "flow", weightings.Uniform("noise"), "uniform")),
    # Velocity on a cosine schedule is flow matching (Kingma and Gao 2023, appendix D.3).
    (("cosine", "velocity", None, "uniform"), ("rectified", "flow", None, "uniform")),
    (("cosine", "velocity", None, "uniform"), ("cosine", "data", "velocity", "stratified")),
    # EDM's weight is the plain error of EDM's network.
    (
        (EDM, predictions.Karras(), weightings.EDM(), times.LogNormalSigma()),
        (EDM, predictions.Karras(), None, times.LogNormalSigma()),
    ),
    (
        (EDM, predictions.Karras(), None, times.LogNormalSigma()),
        ("cosine", predictions.TrigFlow(), None, times.LogNormalSigma()),
    ),
    # SD3's objective is one on a cosine schedule if the noise levels are drawn as often, and the flow's error counts.
    (
        ("rectified", "flow", None, SD3),
        ("cosine", "velocity", weightings.Uniform("flow"), times.LogNormalSigma(0.3, 0.8)),
    ),
    # A shift of the schedule is a shift of the logit-normal times. (Rectified is drawn short of its ends by epsilon;
    # with 1e-5 that is 6 % of the weight where it has fallen to 1e-4.)
    (
        (schedules.Rectified(1e-6), "flow", None, times.LogitNormal(0.3 + float(np.log(3.0)), 0.8)),
        (schedules.Shifted.by_factor(schedules.Rectified(1e-6), 3.0), "flow", None, SD3),
    ),
    # CosMap gives rectified flow the noise levels of a cosine schedule.
    (("rectified", "flow", "cos_map", "uniform"), ("cosine", "noise", weightings.Uniform("flow"), "uniform")),
    # Schedule and times do not matter to what is stated per unit of log-SNR.
    (
        ("cosine", "velocity", weightings.Sigmoid(-1.0), "uniform"),
        ("linear_beta", "noise", weightings.Sigmoid(-1.0), "discrete"),
    ),
    (("cosine", "noise", "variational", "uniform"), ("rectified", "flow", "likelihood", times.LogitNormal())),
    # Uniform log-SNR is a density as any other: the bound, with no weight but the noise's own.
    (("cosine", "noise", None, "log_uniform"), ("rectified", "data", "variational", "uniform")),
]


@pytest.mark.once
@pytest.mark.parametrize(("a", "b"), SAME)
def test_recipes_that_are_the_same(a, b):
    assert same_objective(a, b)
    assert same_objective(b, a)


OTHER = [
    (("cosine", "noise", None, "uniform"), ("cosine", "velocity", None, "uniform")),
    (("cosine", "noise", None, "uniform"), ("linear_vp", "noise", None, "uniform")),
    (("cosine", "noise", None, "uniform"), ("cosine", "noise", "variational", "uniform")),
    (("cosine", "noise", "min_snr", "uniform"), ("cosine", "noise", "soft_min_snr", "uniform")),
    (("rectified", "flow", None, SD3), ("rectified", "flow", None, "uniform")),
    (("rectified", "flow", None, SD3), ("rectified", "flow", None, times.LogitNormal(0.3, 0.9))),
    # Velocity on a cosine schedule, shifted or not, has no normal density of noise levels.
    (("rectified", "flow", None, SD3), (schedules.Shifted("cosine", -0.6), "velocity", None, "uniform")),
    (("rectified", "flow", None, SD3), ("cosine", "velocity", None, times.LogNormalSigma(0.3, 0.8))),
    (("cosine", "velocity", None, "uniform"), (schedules.Shifted("cosine", 1.0), "velocity", None, "uniform")),
    # The shape of one is that of the other, but only one is per unit of log-SNR.
    (
        ("cosine", "noise", weightings.Sigmoid(np.log(4.0)), "uniform"),
        ("cosine", "noise", weightings.SoftMinSNR(4.0), "uniform"),
    ),
    (("cosine", "noise", weightings.Sigmoid(0.0), "uniform"), ("cosine", "noise", weightings.Sigmoid(0.1), "uniform")),
]


@pytest.mark.once
@pytest.mark.parametrize(("a", "b"), OTHER)
def test_recipes_that_are_not_the_same(a, b):
    assert not same_objective(a, b)
    assert not same_objective(b, a)


@pytest.mark.once
def test_a_shift_of_the_schedule_moves_the_density_alone():
    """sech((l - 1) / 2) of a shifted cosine, times the velocity's own 1 + e^-l, is no shifted e^(-l / 2)."""
    places = np.array([-6.0, 0.0, 6.0])
    weight = effective_weight(schedules.Shifted("cosine", 1.0), "velocity")(places)
    expected = 1 / np.cosh((places - 1) / 2) * (1 + np.exp(-places))
    np.testing.assert_allclose(weight / weight[1], expected / expected[1], rtol=1e-3)


@pytest.mark.once
@pytest.mark.parametrize("schedule", [schedules.Cosine(), schedules.Rectified(), EDM], ids=repr)
def test_likelihood_weighting_is_the_published_one(schedule):
    """Song et al. 2021: g^2 / 2 on the error of the score, t uniform, g^2 = d sigma^2/dt - 2 sigma^2 d log(alpha)/dt.

    By differences in float64 of the float32 scales, to 1 %.
    """
    t = np.linspace(0.1, 0.9, 9)
    m, early, late = (schedule.at((t + d).astype("float32")) for d in (0.0, -5e-3, 5e-3))
    g2 = (numpy(late.sigma).astype("float64") ** 2 - numpy(early.sigma).astype("float64") ** 2) / 1e-2
    g2 -= 2 * numpy(m.sigma) ** 2 * np.log(numpy(late.alpha).astype("float64") / numpy(early.alpha)) / 1e-2
    weight = loss_weight(schedule, predictions.Score(), weightings.Likelihood(), times.Uniform(), m)
    np.testing.assert_allclose(numpy(weight), g2 / 2, rtol=1e-2)


@pytest.mark.once
def test_loss_weight():
    """None; the weight times gain^2; and that over the density of log-SNR."""
    schedule, m = schedules.Cosine(), schedules.Cosine().at(np.float32([0.2, 0.5, 0.8]))
    velocity, uniform = predictions.Velocity(), times.Uniform()
    snr = np.exp(numpy(m.log_snr).astype("float64"))
    assert loss_weight(schedule, velocity, None, uniform, m) is None
    weight = loss_weight(schedule, velocity, weightings.MinSNR(5.0), uniform, m)
    np.testing.assert_allclose(numpy(weight), np.minimum(snr, 5) / (snr + 1), rtol=1e-4)
    for sampler, density in ((uniform, 1.0), (times.PowerLaw(1.0), 2 * np.array([0.2, 0.5, 0.8]))):
        weight = loss_weight(schedule, velocity, weightings.Variational(), sampler, m)
        per_log_snr = density / np.abs(numpy(schedule.slope(m.t)))
        np.testing.assert_allclose(numpy(weight), 0.5 * snr / (snr + 1) / per_log_snr, rtol=1e-4)
    assert numpy(loss_weight(schedule, velocity, weightings.EDM(), uniform, schedule.at(0.5))).shape == ()


@pytest.mark.once
@pytest.mark.parametrize("weighting", [weightings.Variational(), weightings.Sigmoid(-1.0)], ids=repr)
@pytest.mark.parametrize(
    ("schedule", "prediction", "sampler"),
    [
        (schedules.Cosine(), predictions.Velocity(), times.Systematic()),
        (schedules.Rectified(), predictions.Flow(), times.LogitNormal(points="systematic")),
        (EDM, predictions.Karras(), times.LogNormalSigma(points="systematic")),
        (schedules.LinearBeta(), predictions.Noise(), times.Discrete()),
        (schedules.Cosine(), predictions.Data(), objectives.LossAware(8, history=1, points="systematic")),
        (_Straight(), predictions.Score(), times.PowerLaw(0.5, points="systematic")),
    ],
)
def test_the_loss_itself_depends_on_neither_schedule_nor_times(schedule, prediction, sampler, weighting):
    """The mean over random times of what the model computes, for an error of x_hat that is known at each log-SNR.

    4,000 times in equal spaces; of Discrete, drawn at random, 5 standard errors.
    """
    draw, density = sampler, sampler
    if isinstance(sampler, objectives.LossAware):
        draw, density = sampler.draw, times.Uniform()
        losses = np.float32([1.0, 5.0, 2.0, 0.5, 3.0, 0.2, 0.7, 1.5])
        sampler.update(schedule, (np.arange(8, dtype="float32") + 0.5) / 8, losses)
        assert np.ptp(numpy(sampler.probabilities())) > 0.3

    def error(log_snr):
        return np.exp(-(log_snr**2) / 8 - log_snr)

    m = schedule.at(draw(schedule, 4000, random.key_of(0)))
    log_snr = numpy(m.log_snr).astype("float64")
    of_output = error(log_snr) / numpy(prediction.gain(m)).astype("float64") ** 2
    losses = numpy(loss_weight(schedule, prediction, weighting, density, m)) * of_output
    if isinstance(sampler, objectives.LossAware):
        losses = losses * numpy(sampler.importance(schedule, m.t))
    places = np.linspace(-12, 12, 4000)
    exact = np.trapezoid(numpy(weighting(places)) * error(places), places)
    tolerance = 5 * losses.std() / np.sqrt(4000) if isinstance(sampler, times.Discrete) else 3e-3 * exact
    assert losses.mean() == pytest.approx(exact, abs=tolerance)


@pytest.mark.once
def test_normalised_weights():
    weight = effective_weight("cosine", "noise", weightings.MinSNR(), "uniform", normalise=True)
    places = np.linspace(-15, 15, 400)
    assert np.trapezoid(weight(places), places) == pytest.approx(1.0, abs=1e-3)
    assert weight(np.linspace(-5, 5, 400)).max() == pytest.approx(weight(places).max(), rel=1e-2)
    plain = effective_weight("cosine", "noise", weightings.MinSNR(), "uniform")
    assert np.ptp(plain(LOG_SNR) / weight(LOG_SNR)) < 1e-9
    np.testing.assert_array_equal(plain(np.array([-15.5, 16.0])), 0.0)
    assert plain(np.zeros((2, 3))).shape == (2, 3)


@pytest.mark.once
def test_models_are_recipes():
    """Of a model its attributes decide; the ends of the schedules are not compared."""
    model = kdiff.DiffusionModel(tiny_network(), "cosine", "velocity")
    assert objectives.Recipe.of(model).weighting is None
    assert same_objective(model, ("rectified", "flow", None, "uniform"))
    assert same_objective(model, (schedules.Cosine(-8.0, 8.0), "velocity", None, "uniform"))
    assert not same_objective(model, kdiff.DiffusionModel(tiny_network(), "cosine", "noise"))


@pytest.mark.once
@pytest.mark.parametrize("wrong", [("cosine", "noise"), "cosine", 3])
def test_what_is_no_recipe(wrong):
    with pytest.raises(TypeError, match="schedule"):
        same_objective(wrong, wrong)


@pytest.mark.once
def test_schedules_without_common_noise_levels():
    low, high = (schedules.Cosine(*ends) for ends in ((-15.0, -5.0), (5.0, 15.0)))
    with pytest.raises(ValueError, match="no log-SNR in common"):
        same_objective((low, "noise", None, "uniform"), (high, "noise", None, "uniform"))


@pytest.mark.once
def test_a_plot_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"kdiff\[plot\]"):
        objectives.plot_objective(("cosine", "noise", None, "uniform"))


@pytest.mark.once
def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    recipes = [("cosine", "noise", None, "uniform"), ("rectified", "flow", None, SD3)]
    figure = objectives.plot_objective(*recipes, path=tmp_path / "objective.png", labels=["DDPM", "SD3"])
    assert (tmp_path / "objective.png").stat().st_size > 1000
    of_noise, of_data = figure.axes
    for axes in (of_noise, of_data):
        for line in axes.lines:
            assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(1.0, abs=0.02)
    x, y = of_noise.lines[0].get_data()
    np.testing.assert_allclose(y, effective_weight(*recipes[0], normalise=True)(x))
    assert len(objectives.plot_objective(recipes[0], normalise=False).axes[0].lines) == 1
