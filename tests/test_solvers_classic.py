"""Runge-Kutta, multistep and adaptive solvers: their formulas, variants and limits, and what they do at t = 0."""

import numpy as np
import pytest
from keras import ops

from kdiff import Sampler, schedules
from kdiff.denoisers import Denoiser
from kdiff.solvers import DDIM, DDPM, DDIMInversion
from kdiff.solvers.adaptive import Adaptive, Control
from kdiff.solvers.base import History
from kdiff.solvers.multistep import DEIS, IPNDM, LMS, PNDM
from kdiff.solvers.runge_kutta import DPM2, RK4, DPM2Ancestral, Euler, EulerAncestral, Heun
from kdiff.solvers.stages import Angle, Ratio
from tests.toys import (
    EAGER,
    GAUSSIAN_DATA,
    MIXTURE,
    SCHEDULES,
    Compiled,
    exact_denoiser,
    exact_moments,
    measured_order,
    moments,
    numpy,
    solve,
    walk,
)

DENOISE = Denoiser.of(MIXTURE)
COSINE = schedules.Cosine()
CONTINUOUS = [COSINE, schedules.Rectified(), schedules.LinearBeta()]


def of(cases, *kept):
    """All cases, or, where each is a program to compile, these."""
    return cases if EAGER else [cases[i] for i in kept]


# Variants; the solvers as their names give them are in test_solvers.py. With the steps between which each has settled.
VARIANTS = [
    (EulerAncestral(0.0), (16, 32), 0),
    (Heun("ratio"), (16, 32), 0),
    (DPM2("ratio"), (16, 32), 0),
    (DPM2Ancestral(0.0), (16, 32), 0),
    (LMS(1), (16, 32), 0),
    (LMS(2), (32, 64), 4),
    (LMS(3), (32, 64), 4),
    (DEIS(1), (16, 32), 0),
    (DEIS(2, lower_final=False), (16, 32), 0),
    (DEIS(4, lower_final=False), (8, 16), 4),
    (IPNDM(1), (16, 32), 0),
    (IPNDM(2), (16, 32), 0),
    (IPNDM(3), (16, 32), 4),
    (PNDM("heun", 1), (16, 32), 4),
    (PNDM("dpm2", 2), (16, 32), 4),
    (Adaptive(1e-9, 1e-9, 2, max_substeps=1), (8, 16), 0),
]


@pytest.mark.once
@pytest.mark.parametrize(("solver", "steps", "warm"), of(VARIANTS, 1, 13), ids=str)
def test_measured_order_of_the_variants(solver, steps, warm):
    """On a mixture, to an eighth, because the next order is not yet nothing."""
    (order,), _ = measured_order(Compiled(solver), COSINE, steps, warm=warm)
    np.testing.assert_allclose(order, solver.order, rtol=0.125)


@pytest.mark.once
@pytest.mark.parametrize("schedule", of([*CONTINUOUS, schedules.VarianceExploding(0.02, 20.0)], 3), ids=repr)
@pytest.mark.parametrize(
    ("solver", "places", "weights"),
    [
        (Heun(), [0, 1], [1 / 2, 1 / 2]),
        (DPM2(), [0, 1 / 2], [0, 1]),
        (RK4(), [0, 1 / 2, 1 / 2, 1], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("zero", [False, True])
def test_runge_kutta_in_the_angle(schedule, solver, places, weights, zero):
    """In float64: the difference to DDIM's step, y' = v - v_0, from a stage to the next; to t = 0 without its end."""
    start, end = 1.2, 0.0 if zero else 0.5
    if zero:
        places, weights = ([0, 1 / 2], [0, 1]) if solver.order == 2 else ([0, 1 / 3, 2 / 3], [1 / 4, 0, 3 / 4])
    now = schedule.at_log_snr(np.float32(-2 * np.log(np.tan(start))))
    then = schedule.at(np.float32(0.0)) if zero else schedule.at_log_snr(np.float32(-2 * np.log(np.tan(end))))
    end = float(np.arctan2(float(then.sigma), float(then.alpha)))
    w = np.random.default_rng(0).normal(size=(8, 2)) * 0.8
    size = float(np.hypot(float(now.alpha), float(now.sigma)))
    *_, (x, _) = walk(solver, schedule, [now, then], size * w)

    def estimates(w, angle):
        x_hat = MIXTURE._denoise(np, w / np.cos(angle), 1.0, np.tan(angle))
        return x_hat, (w - np.cos(angle) * x_hat) / np.sin(angle)

    def line(angle):
        return np.cos(angle) * first[0] + np.sin(angle) * first[1]

    def velocity(angle, x_hat, noise):
        return np.cos(angle) * noise - np.sin(angle) * x_hat

    first = estimates(w, start)
    bends = [np.zeros_like(w)]
    for place in places[1:]:
        angle = start + place * (end - start)
        found = estimates(line(angle) + place * (end - start) * bends[-1], angle)
        bends.append(velocity(angle, *found) - velocity(angle, *first))
    expected = line(end) + (end - start) * sum(weight * bend for weight, bend in zip(weights, bends, strict=True))
    size = np.hypot(float(then.alpha), float(then.sigma))
    np.testing.assert_allclose(numpy(x), size * expected, rtol=2e-4, atol=2e-5)


@pytest.mark.once
@pytest.mark.parametrize("solver", [Heun("ratio"), DPM2("ratio")], ids=repr)
def test_in_the_ratio_the_step_to_zero_is_eulers(solver):
    marginals = [COSINE.at(np.float32(t)) for t in (0.3, 0.0)]
    x = np.random.default_rng(0).normal(size=(8, 2))
    (a, _), (b, _) = (next(walk(one, COSINE, marginals, x)) for one in (solver, Euler()))
    np.testing.assert_allclose(numpy(a), numpy(b), atol=1e-6)


@pytest.mark.once
def test_the_middle_of_a_step():
    """Of the angle, and of log s, also where one end is near pi / 2 or 0."""
    for log_snrs in ((-14.0, 3.0), (-2.0, 14.0), (-1.0, 1.5)):
        now, then = (COSINE.at_log_snr(np.float32(value)) for value in log_snrs)
        angles = np.arctan(np.exp(-0.5 * np.array(log_snrs)))
        angle = angles[0] + 0.3 * (angles[1] - angles[0])
        found = [float(one.at(COSINE, now, then, 0.3).log_snr) for one in (Angle(), Ratio())]
        middle = log_snrs[0] + 0.3 * (log_snrs[1] - log_snrs[0])
        np.testing.assert_allclose(found, [-2 * np.log(np.tan(angle)), middle], rtol=1e-4)


@pytest.mark.once
def test_equal_steps_of_sigma_give_ipndm_its_full_order():
    """There it is Adams and Bashforth's method, as is LMS."""
    log_snrs = -2 * np.log(np.linspace(4.0, 0.5, 12))
    x = np.random.default_rng(0).normal(size=(8, 2))
    for terms in (2, 3, 4) if EAGER else (4,):
        a, b = (solve(Compiled(s), COSINE, log_snrs, x) for s in (IPNDM(terms), LMS(terms)))
        np.testing.assert_allclose(a, b, atol=2e-5)


def history(log_snrs):
    """One with these places, the newest first."""
    return History(0, 0, (), tuple(ops.convert_to_tensor(np.float32(value)) for value in log_snrs))


@pytest.mark.once
def test_lms_coefficients_are_the_integrals_of_lagrange_polynomials():
    """Against NumPy's exact integration of polynomials, in float64; of lower orders too, with places yet unknown."""
    s = np.array([7.0, 5.5, 3.0, 2.6, 1.1])  # the oldest first; the last is `then`
    marginals = [COSINE.at_log_snr(np.float32(-2 * np.log(v))) for v in s]
    for order in (2, 3, 4):
        past = history([-2 * np.log(v) if i < order - 1 else -100.0 * (i + 1) for i, v in enumerate(s[2::-1])])
        ours = LMS(4).coefficients(ops.convert_to_tensor(order), marginals[3], marginals[4], past)
        known = s[4 - order : 4]
        for i, c in enumerate(reversed(ours), start=order - 4):
            others, expected = np.delete(known, i), 0.0
            if i >= 0:
                integral = np.polynomial.Polynomial.fromroots(others).integ()
                expected = (integral(s[4]) - integral(s[3])) / np.prod(known[i] - others)
            np.testing.assert_allclose(float(c), expected, rtol=1e-4)


@pytest.mark.once
def test_the_coefficients_of_equal_steps_are_adams_and_bashforths():
    now, then = (COSINE.at_log_snr(np.float32(-2 * np.log(s))) for s in (3.0, 2.0))
    table = {2: [-1 / 2, 0, 0], 3: [-16 / 12, 5 / 12, 0], 4: [-59 / 24, 37 / 24, -9 / 24]}
    for order, weights in table.items():
        found = IPNDM().coefficients(ops.convert_to_tensor(order), now, then, history([-1.0, -2.0, -3.0]))
        np.testing.assert_allclose([float(c) for c in found], -np.array(weights), rtol=1e-5, atol=1e-6)


# Noise

CHURN = {"s_churn": 4.0, "s_min": 0.05, "s_max": 20.0}
STOCHASTIC = [
    *(kind(**CHURN) for kind in (Euler, Heun, DPM2, RK4)),
    Heun("ratio", **CHURN),
    EulerAncestral(0.5),
    DPM2Ancestral(0.5),
]


def errors_of_moments(solver, log_snrs):
    marginals = [COSINE.at_log_snr(np.float32(value)) for value in log_snrs]
    found, exact = moments(Compiled(solver), COSINE, marginals, draws=2), exact_moments(GAUSSIAN_DATA, marginals[-1])
    return [a - b for a, b in zip(found, exact, strict=True)]


@pytest.mark.once
@pytest.mark.parametrize("solver", of(STOCHASTIC, 1), ids=repr)
def test_mean_and_covariance_converge_with_the_declared_order(solver):
    """The error falls at least as steps^-order, unless it is at float32's rounding, 1e-5, already."""
    coarse, fine = (errors_of_moments(solver, np.linspace(-3, 3, n + 1)) for n in (12, 36))
    for one, other in zip(coarse, fine, strict=True):
        assert np.abs(other).max() < max(np.abs(one).max() / 3 ** (solver.order - 0.35), 1e-5)
        assert np.abs(other).max() < 0.05


@pytest.mark.once
def test_noise_is_added_only_between_s_min_and_s_max():
    """And all that is added is right: with churn the covariance is another than without, but where there is none."""
    log_snrs = np.linspace(-3, 3, 5)
    plain = errors_of_moments(Heun(), log_snrs)[1]
    same = errors_of_moments(Heun(s_churn=4.0, s_min=5.0), log_snrs)[1]  # above the run's first ratio, e^1.5
    also = errors_of_moments(Heun(s_churn=4.0, s_max=0.2), log_snrs)[1]  # below the last at which a step begins
    other = errors_of_moments(Heun(s_churn=4.0), log_snrs)[1]
    np.testing.assert_allclose(same, plain, atol=1e-6)
    np.testing.assert_allclose(also, plain, atol=1e-6)
    assert np.abs(other - plain).max() > 1e-3


@pytest.mark.once
def test_churn_is_edm():
    """Karras et al. 2022, algorithm 2, in float64, with sigma / alpha as their sigma and s_noise not 1."""
    schedule, solver = schedules.Cosine(), Heun("ratio", s_churn=2.0, s_min=0.3, s_max=3.0, s_noise=1.1)
    s = np.array([4.0, 2.0, 0.8, 0.2, 0.1])
    draws = np.random.default_rng(1).normal(size=(4, 8, 2)).astype("float32")
    marginals = [schedule.at_log_snr(np.float32(-2 * np.log(v))) for v in s]
    start = np.random.default_rng(0).normal(size=(8, 2))
    z, noises = start, iter(draws)
    ours = walk(solver, schedule, marginals, start * float(marginals[0].alpha), noise=lambda: next(noises))

    def slope(z, s):
        return (z - MIXTURE._denoise(np, z, 1.0, s)) / s

    for i, (x, _) in enumerate(ours):
        gamma = min(2.0 / 4, np.sqrt(2) - 1) if 0.3 <= s[i] <= 3.0 else 0.0
        up = s[i] + gamma * s[i]
        z_up = z + np.sqrt(up**2 - s[i] ** 2) * 1.1 * draws[i]
        d = slope(z_up, up)
        euler = z_up + (s[i + 1] - up) * d
        z = z_up + (s[i + 1] - up) * 0.5 * (d + slope(euler, s[i + 1]))
        np.testing.assert_allclose(numpy(x) / float(marginals[i + 1].alpha), z, rtol=2e-4, atol=2e-5)


@pytest.mark.once
def test_after_churn_the_time_is_that_of_the_noise():
    """Networks are told the time: where noise is added that of the new level, and elsewhere exactly the grid's."""
    schedule, solver, asked = schedules.Cosine(), Euler(s_churn=2.0, s_min=0.5), []

    def denoise(x, m):
        asked.append(m)
        return x

    now = [schedule.at(np.float32(t)) for t in (0.6, 0.1)]
    for m in now:
        solver.step(
            Denoiser.of(denoise), schedule, ops.ones((1, 2)), m, schedule.at(np.float32(0.05)), lambda: 0.0, 0.4
        )
    assert float(asked[0].t) > 0.61
    np.testing.assert_allclose(float(asked[0].t), float(schedule.time(asked[0].log_snr)), rtol=1e-6)
    assert float(asked[1].t) == float(now[1].t)


@pytest.mark.once
@pytest.mark.parametrize("order", [2, 3])
def test_both_methods_of_the_adaptive_solver_have_their_order(order):
    """DPM-Solver-12 and -23: halving h divides the local errors by 2^order and 2^(order + 1)."""
    schedule, start = COSINE, np.array([[0.7, -0.4]])
    z, m = ops.convert_to_tensor(start.astype("float32")), schedule.at_log_snr(np.float32(0.0))
    errors = []
    for h in (0.4, 0.2):
        low, high, _ = Adaptive(order=order)._pair(Denoiser.of(exact_denoiser()), schedule, z, m, np.float32(h))
        # For N(mean, std^2) the exact z - mean is proportional to sqrt(std^2 + (sigma / alpha)^2).
        wide = [np.sqrt(0.25 + s**2) for s in (1.0, np.exp(-h))]
        exact = 0.3 + (start - 0.3) * wide[1] / wide[0]
        errors.append([np.abs(numpy(one) - exact).max() for one in (low, high)])
    low, high = np.log2(np.divide(*errors))
    np.testing.assert_allclose(low, order, atol=0.35)
    if order == 2:  # of order 3, the error is that of float32
        np.testing.assert_allclose(high, 3, atol=0.35)
    assert errors[1][1] < 0.2 * errors[1][0]


# Limits, and whole runs


def run(solver, schedule, steps, shape=(3, 2)):
    """The end of a run from t = 1 to 0 in equal steps of t, outside of the sampling loop."""
    generator = np.random.default_rng(0)

    def noise():
        return ops.convert_to_tensor(generator.normal(size=shape).astype("float32"))

    marginals = [schedule.at(np.float32(t)) for t in Sampler(steps=steps).times(schedule)]
    *_, (x, _) = walk(solver, schedule, marginals, marginals[0].sigma * noise(), exact_denoiser(), noise)
    return numpy(x)


@pytest.mark.once
@pytest.mark.parametrize("schedule", of(SCHEDULES[:1] + SCHEDULES[-2:], 0), ids=repr)
@pytest.mark.parametrize(
    ("solver", "other"),
    of(
        [
            (Euler(), DDIM()),
            (EulerAncestral(0.0), DDIM()),
            (EulerAncestral(), DDPM()),
            (EulerAncestral(0.3), DDIM(0.3)),
            (DPM2Ancestral(0.0), DPM2("ratio")),
            (LMS(1), DDIM()),
            (DEIS(1), DDIM()),
            (IPNDM(1), DDIM()),
        ],
        3,
        4,
    ),
    ids=repr,
)
def test_limits(solver, other, schedule):
    """Methods that are another one by another name."""
    a, b = (run(Compiled(one), schedule, 6) for one in (solver, other))
    np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.once
@pytest.mark.parametrize("kind", of([Euler, Heun, DPM2, RK4], 1))
def test_churn_of_nothing_is_no_churn(kind):
    """s_churn = 0, and s_churn > 0 that is too small to be seen, are the deterministic method."""
    still, hardly, much = (run(Compiled(kind(s_churn=s)), COSINE, 6) for s in (0.0, 1e-9, 2.0))
    np.testing.assert_allclose(hardly, still, atol=2e-4)
    assert np.abs(much - still).max() > 1e-2


@pytest.mark.once
def test_the_warm_up_of_pndm():
    """Its steps are the warm-up's own, and not one more."""
    log_snrs, x = np.linspace(-3, 3, 7), np.random.default_rng(0).normal(size=(8, 2))
    for solver, warm in ((PNDM(), 3), (PNDM("heun", 1), 1)) if EAGER else ((PNDM("heun", 1), 1),):
        for count in (warm, warm + 1):
            a, b = (solve(Compiled(s), COSINE, log_snrs[: count + 1], x) for s in (solver, solver.warmup))
            assert np.allclose(a, b, atol=1e-6) == (count == warm)


class TestAdaptive:
    SPAN = (-6.0, 0.0, 3.0, 12.0)

    def go(self, solver, schedule=CONTINUOUS[0]):
        """(x, exact, control) of a run over three steps of the grid, the last one long."""
        marginals = [schedule.at_log_snr(np.float32(value)) for value in self.SPAN]
        start = np.random.default_rng(0).normal(size=(16, 2)) * float(marginals[0].sigma)
        *_, (x, state) = walk(Compiled(solver), schedule, marginals, start)
        exact = MIXTURE.flow(start, schedule, float(marginals[0].t), float(marginals[-1].t))
        return numpy(x), exact, state

    @pytest.mark.parametrize("order", [2, 3])
    def test_the_error_follows_the_tolerance(self, order):
        errors, tried = [], []
        for tolerance in (1e-1, 1e-2, 1e-3, 1e-4) if EAGER else (1e-1, 1e-4):
            x, exact, control = self.go(Adaptive(tolerance, tolerance, order))
            errors.append(np.sqrt(np.mean((x - exact) ** 2)))
            tried.append(int(control.tried))
            assert errors[-1] < tolerance
        assert np.all(np.diff(errors) < 0)
        assert np.all(np.diff(tried) > 0)
        # Of order p, the error falls as the number of sub-steps to the power -p, so both fall as the tolerance does.
        assert errors[-1] < errors[0] / 30

    @pytest.mark.parametrize(
        ("error", "taken", "factor"),
        [
            (0.5, True, 0.9 * 0.5 ** (-0.7 / 3) * 2.0 ** (0.4 / 3)),
            (1.7, False, 0.9 * 1.7 ** (-0.7 / 3) * 2.0 ** (0.4 / 3)),
            (1e-5, True, 5.0),
            (1e5, False, 0.2),
            (1e-5, False, 0.9),  # one that was not taken is never followed by a longer one
            (float("nan"), False, 0.2),
            (float("inf"), False, 0.2),
        ],
    )
    def test_the_next_sub_step(self, error, taken, factor):
        """h 0.9 error^(-0.7 / p) error_before^(0.4 / p), from a fifth of h to five times h; p is the order."""
        before = Control(*(ops.convert_to_tensor(value) for value in (np.float32(0.3), np.float32(2.0), np.int32(4))))
        error, taken = ops.convert_to_tensor(np.float32(error)), ops.convert_to_tensor(taken)
        after = Adaptive()._control(before, error, before.h, taken)
        np.testing.assert_allclose(float(after.h), 0.3 * factor, rtol=1e-5)
        assert int(after.tried) == 5
        np.testing.assert_allclose(float(after.error), float(error) if taken else 2.0, rtol=1e-5)

    def test_a_good_sub_step_that_the_grid_cut_short_keeps_the_longer_one(self):
        before = Control(*(ops.convert_to_tensor(value) for value in (np.float32(0.3), np.float32(1.0), np.int32(4))))
        error, short = ops.convert_to_tensor(np.float32(0.9)), ops.convert_to_tensor(np.float32(0.01))
        after = Adaptive()._control(before, error, short, ops.convert_to_tensor(True))
        np.testing.assert_allclose(float(after.h), 0.3, rtol=1e-6)

    def test_sub_steps_are_bounded_and_the_end_is_reached(self):
        """A tolerance that cannot be met: no more sub-steps than allowed, and about as good as equal steps."""
        x, exact, control = self.go(Adaptive(1e-12, 0.0, max_substeps=8))
        assert int(control.tried) == 3 * 8
        assert np.sqrt(np.mean((x - exact) ** 2)) < 0.05

    def test_the_sub_step_is_carried_across_the_grid(self):
        """Otherwise each step of the grid would begin with `first` again."""
        solver = Compiled(Adaptive(1e-3, 1e-3, first=0.01))
        x = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(16, 2)), "float32")
        marginals = [CONTINUOUS[0].at_log_snr(np.float32(value)) for value in (-2.0, 0.0, 2.0)]
        x, _, once = solver.step(DENOISE, CONTINUOUS[0], x, *marginals[:2], None, solver.init(x, 2))
        _, _, twice = solver.step(DENOISE, CONTINUOUS[0], x, *marginals[1:], None, once)
        _, _, again = solver.step(DENOISE, CONTINUOUS[0], x, *marginals[1:], None, solver.init(x, 2))
        assert int(twice.tried) - int(once.tried) < int(again.tried)

    def test_a_denoiser_that_fails_far_away_is_left_out(self):
        """NaN at a stage that went too far only shortens the sub-step."""

        def denoise(x, m):
            return ops.where(m.log_snr > limit[0], np.float32("nan"), 1.0) * MIXTURE(x, m)

        schedule, x = CONTINUOUS[0], ops.convert_to_tensor(np.random.default_rng(0).normal(size=(4, 2)), "float32")
        now, then, limit = schedule.at_log_snr(-2.0), schedule.at_log_snr(4.0), [3.9]
        z, _, control = Adaptive(1e-2, 1e-2, first=2.9).step(
            Denoiser.of(denoise), schedule, x, now, then, None, Adaptive(first=2.9).init(x, 1)
        )
        assert int(control.tried) > 1
        assert np.all(np.isfinite(numpy(z)))


@pytest.mark.once
def test_euler_has_an_inverse_without_churn():
    assert Euler().inverse() == DDIMInversion()
    with pytest.raises(ValueError, match="stochastic"):
        Euler(s_churn=1.0).inverse()
    with pytest.raises(ValueError, match="no inverse"):
        Heun().inverse()


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Euler(s_churn=-1.0), "s_churn"),
        (lambda: Heun(s_min=-0.1), "s_min"),
        (lambda: Heun(s_min=2.0, s_max=1.0), r"s_max.*\[2.0, inf\]"),
        (lambda: DPM2(s_noise=-1.0), "s_noise"),
        (lambda: RK4(s_churn="much"), "s_churn"),
        (lambda: EulerAncestral(1.1), "EulerAncestral.*eta"),
        (lambda: DPM2Ancestral(-0.1), "eta"),
        (lambda: LMS(5), "order.*4.*5"),
        (lambda: LMS(0), "order.*1.*0"),
        (lambda: DEIS(5), "order"),
        (lambda: IPNDM(5), "terms"),
        (lambda: PNDM("ddim"), "Unknown RungeKutta.*heun"),
        (lambda: PNDM(warm=0), "warm.*0"),
        (lambda: PNDM(Heun(s_churn=1.0)), "no churn"),
        (lambda: Heun("time"), "Unknown Variable.*angle.*ratio"),
        (lambda: Adaptive(rtol=-1.0), "rtol"),
        (lambda: Adaptive(atol=-1.0), "atol"),
        (lambda: Adaptive(0.0, 0.0), "above zero"),
        (lambda: Adaptive(order=4), "order"),
        (lambda: Adaptive(max_substeps=0), "max_substeps"),
        (lambda: Adaptive(first=0.0), "first"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
