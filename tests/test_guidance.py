"""Guidance: denoisers made from denoisers, against the exact scores of a mixture of Gaussians."""

import itertools
from functools import partial

import numpy as np
import pytest
from keras import ops

from kdiff import Sampler, analytic, backend, guidance, operators, schedules
from kdiff.denoisers import Denoiser, Estimate, Given
from kdiff.guidance import AdaptiveProjected, CFGPlusPlus, CFGZeroStar, ClassifierFree
from kdiff.guidance.base import Place, Run, tensors
from kdiff.sampling import initial_noise
from kdiff.schedules import Marginal
from kdiff.solvers.base import half_step
from tests.toys import SCHEDULES, numpy

MEANS, STDS, WEIGHTS = np.array([[-0.8, 0.2], [0.5, -0.6], [0.4, 0.7]]), np.array([0.5, 0.3, 0.4]), [0.3, 0.3, 0.4]
MIXTURE = analytic.GaussianMixture(MEANS, STDS**2, WEIGHTS)
LABELS = np.array([0, 1, 2, 2])
POINTS = np.random.default_rng(0).normal(size=(4, 2)).astype("float32")
COSINE = schedules.Cosine()


def wide(x, m):
    return 3.0 * x


def exact_score(x, alpha, sigma, label=None):
    """The gradient of log p(x_t), or of log p(x_t | label), in float64, by the formulas alone."""
    variances = alpha**2 * STDS**2 + sigma**2
    distances = x[:, None] - alpha * MEANS
    logs = np.log(WEIGHTS) - np.log(variances) - 0.5 * (distances**2).sum(-1) / variances
    if label is not None:
        logs = np.where(np.arange(3) == label[:, None], 0.0, -np.inf)
    r = np.exp(logs - logs.max(1, keepdims=True))
    r /= r.sum(1, keepdims=True)
    return -np.sum(r[..., None] * distances / variances[:, None], axis=1)


def exact_guided(x, alpha, sigma, scale, label=LABELS):
    """x_hat of the guided score (1 - w) score + w score_label."""
    w = np.reshape(scale, (-1, 1))
    score = (1 - w) * exact_score(x, alpha, sigma) + w * exact_score(x, alpha, sigma, label)
    return (x + sigma**2 * score) / alpha


def at(schedule, t):
    m = schedule.at(np.float32(t))
    return m, float(m.alpha), float(m.sigma)


def answers(m, x=POINTS):
    """x_c and x_u."""
    denoise = MIXTURE.conditional(LABELS)
    given = numpy(denoise(ops.convert_to_tensor(x), m).x_hat)
    return given, numpy(MIXTURE(ops.convert_to_tensor(x), m))


def in_a_run(one, denoise, shape, now, then=None, schedule=COSINE, index=0, memory=None):
    """The guided denoiser of a step of a run of samples of this shape."""
    denoise = Denoiser.of(denoise)
    rows = tensors(one.rows(Run(shape, conditions=lambda some: some)))
    memory = one.start(ops.zeros(shape)) if memory is None else memory
    given = Given(denoise.conditions, (rows,), (memory,))
    place = Place(ops.convert_to_tensor(np.int32(index)), now, then or now, schedule)
    return one.over(Denoiser(denoise.answer, given, denoise.nulls), place)


def ask(one, m, x=POINTS, **options):
    """x_hat, and what is remembered, of a guidance of the mixture in a run."""
    estimate = in_a_run(one, MIXTURE.conditional(LABELS), x.shape, m, **options)(ops.convert_to_tensor(x), m)
    return numpy(estimate.x_hat), estimate.memory[-1]


def by_conditions(function, nulls=None, **conditions):
    """The denoiser x_hat = function(x, m, **conditions)."""
    conditions = {name: ops.convert_to_tensor(value) for name, value in conditions.items()}
    return Denoiser(lambda given, x, m: Estimate(function(x, m, **given.conditions)), Given(conditions), nulls)


# Thresholding


@pytest.mark.once
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_clip_bounds_every_estimate(solver):
    run = list(Sampler(solver, steps=4, guidance="clip").steps_of(wide, COSINE, (4, 4)))
    assert all(np.abs(numpy(step.x_hat)).max() <= 1 for step in run)
    free = list(Sampler(solver, steps=4).steps_of(wide, COSINE, (4, 4)))
    assert np.abs(numpy(free[0].x_hat)).max() > 1


def test_dynamic_threshold_is_its_formula():
    x_hat = np.random.default_rng(0).normal(0, 2, (3, 50)).astype("float32")
    x_hat[2] /= 100  # an example within [-1, 1] stays as it is
    for quantile, highest in ((0.9, float("inf")), (0.5, 1.5)):
        guided = guidance.DynamicThreshold(quantile, highest)(lambda x, m: x)
        s = np.clip(np.quantile(np.abs(x_hat), quantile, axis=-1), 1.0, highest)[:, None]
        received = numpy(guided(ops.convert_to_tensor(x_hat), COSINE.at(np.float32(0.5))).x_hat)
        np.testing.assert_allclose(received, np.clip(x_hat, -s, s) / s, atol=1e-5)


@pytest.mark.once
def test_the_learned_variance_is_that_under_the_conditions():
    def answer(given, x, m):
        return Estimate(x, ops.cast(given.conditions["label"], "float32")[:, None] + 0.0 * x)

    denoise = Denoiser(answer, Given({"label": ops.convert_to_tensor(LABELS, "int32")}), {"label": np.int32(9)})
    for one in (guidance.Clip(0.5), ClassifierFree(2.0), ClassifierFree(2.0)(guidance.Clip(0.5)(denoise))):
        guided = one(denoise) if isinstance(one, guidance.Guidance) else one
        estimate = guided(ops.convert_to_tensor(POINTS), COSINE.at(np.float32(0.5)))
        np.testing.assert_array_equal(numpy(estimate.share)[:, 0], LABELS)


@pytest.mark.once
def test_guidance_is_applied_in_order():
    both = Sampler(guidance=[guidance.Clip(2.0), "dynamic_threshold"])
    assert both == Sampler(guidance=(guidance.Clip(2.0), guidance.DynamicThreshold()))
    assert repr(Sampler(guidance="clip")).endswith("guidance=(Clip(),))")
    (step,) = Sampler(steps=1, guidance=[guidance.Clip(2.0), guidance.DynamicThreshold(1.0)]).steps_of(
        wide, SCHEDULES[0], (4, 4)
    )
    assert np.abs(numpy(step.x_hat)).max() <= 1


@pytest.mark.once
def test_thresholding_before_classifier_free_changes_both_answers():
    m, *_ = at(COSINE, 0.7)
    given, none = (np.clip(value, -0.3, 0.3) for value in answers(m))
    guided = ClassifierFree(3.0)(guidance.Clip(0.3)(MIXTURE.conditional(LABELS)))
    np.testing.assert_allclose(numpy(guided(POINTS, m).x_hat), none + 3 * (given - none), atol=1e-5)


# Classifier-free guidance


@pytest.mark.parametrize("schedule", [*SCHEDULES[-2:], schedules.VarianceExploding()], ids=repr)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, np.array([0.5, 1.0, 2.0, 7.5])], ids=str)
def test_classifier_free_is_the_guided_score(schedule, scale):
    for t in (0.1, 0.4, 0.8):
        m, alpha, sigma = at(schedule, t)
        x = POINTS * np.float32(np.hypot(alpha, sigma))
        wanted = exact_guided(x.astype("float64"), alpha, sigma, scale)
        np.testing.assert_allclose(ask(ClassifierFree(scale), m, x)[0], wanted, atol=3e-5, rtol=1e-4)


def test_both_answers_come_from_one_batch():
    sizes = []

    def function(x, m, label):
        sizes.append((tuple(x.shape), tuple(label.shape), tuple(m.t.shape)))
        return x

    denoise = by_conditions(function, {"label": np.int32(-1)}, label=LABELS.astype("int32"))
    ClassifierFree(2.0)(denoise)(ops.convert_to_tensor(POINTS), COSINE.at(np.float32(0.5)))
    ClassifierFree(2.0)(denoise)(ops.convert_to_tensor(POINTS), COSINE.at(np.full(4, 0.5, "float32")))
    assert sizes == [((8, 2), (8,), ()), ((8, 2), (8,), (8,))]


@pytest.mark.once
def test_guided_samples_follow_the_exact_guided_flow():
    """dz / ds = (z - x_hat) / s in z = x / alpha, s = sigma / alpha, of the exact guided score, by RK4 in float64."""
    times = Sampler("dpm_solver_pp", "uniform_log_snr", steps=400).times(COSINE)
    x = np.random.default_rng(1).normal(size=(4, 2))
    start, end = (at(COSINE, t)[1:] for t in (times[0], times[-2]))
    z, logs = x / start[0], np.linspace(np.log(start[1] / start[0]), np.log(end[1] / end[0]), 4001)

    def slope(z, u):
        return z - exact_guided(z, 1.0, np.exp(u), 2.5)

    for u, after in itertools.pairwise(logs):
        h = after - u
        a = slope(z, u)
        b = slope(z + h / 2 * a, u + h / 2)
        c = slope(z + h / 2 * b, u + h / 2)
        z = z + h / 6 * (a + 2 * b + 2 * c + slope(z + h * c, after))
    sampler = Sampler("dpm_solver_pp", "uniform_log_snr", steps=400, guidance=ClassifierFree(2.5))
    received = numpy(sampler(MIXTURE.conditional(LABELS), COSINE, (4, 2), x=x * start[1] / start[1]))
    np.testing.assert_allclose(received, exact_guided(z, 1.0, end[1] / end[0], 2.5), atol=2e-3)


@pytest.mark.once
def test_outside_of_its_interval_it_is_off():
    for t in (0.2, 0.5, 0.8):
        m, alpha, sigma = at(COSINE, t)
        for lowest, highest in ((0.0, 0.9), (1.1, float("inf")), (0.5, 2.0)):
            given, none = answers(m)
            wanted = none + 4 * (given - none) if lowest <= sigma / alpha <= highest else given
            received, _ = ask(ClassifierFree(4.0, lowest=lowest, highest=highest), m)
            np.testing.assert_allclose(received, wanted, atol=2e-6)
    m = Marginal(*(ops.convert_to_tensor(v, "float32") for v in (0.5, 0.5, 0.5, 0.0)))  # at the ends it is on
    given, none = answers(m)
    for lowest, highest in ((1.0, 2.0), (0.5, 1.0)):
        received, _ = ask(ClassifierFree(4.0, lowest=lowest, highest=highest), m)
        np.testing.assert_allclose(received, none + 4 * (given - none), atol=2e-6)


class Throughout(ClassifierFree):
    """Evaluates both estimates in every step, whatever the interval."""

    named = False
    remembers = True


def guided_run(sampler, compiled=True):
    """x at the end of a run of 4 samples of the mixture, and the rows of each evaluation, counted when it is made."""
    denoise, shape, rows = MIXTURE.conditional(LABELS), (4, 2), []

    def count(x):
        rows.append(len(x))
        return np.zeros((len(x), 1), "float32")

    def answer(given, x, m):
        estimate = denoise.answer(given, x, m)
        return estimate._replace(x_hat=estimate.x_hat + backend.by_numpy(count, ops.stop_gradient(x), (1,)))

    advance = partial(sampler.advance, answer, denoise.nulls, COSINE)
    advance = backend.compiled(advance) if compiled else backend.without_gradients(advance)
    given = denoise.given._replace(rows=tensors(sampler.rows(Run(shape))))
    *_, step = sampler.steps_from(initial_noise(shape), sampler.times(COSINE), advance, COSINE, given)
    return numpy(step.x), rows


@pytest.mark.parametrize("solver", ["ddim", pytest.param("heun", marks=pytest.mark.once)])
def test_outside_of_its_interval_it_asks_for_one_estimate(solver):
    """sigma / alpha = tan(pi t / 2), from 5 at the second of 8 steps to 0.2 at the last; Heun's second call is at the
    end of the step, or in the middle of the last one. Compiled too, and with the same samples."""
    inside = [False, False, False, True, True, True, False, False]
    if solver == "heun":
        inside = [one for pair in zip(inside, [*inside[1:], False], strict=True) for one in pair]
    options = {"lowest": 0.5, "highest": 2.0}
    x, rows = guided_run(Sampler(solver, steps=8, guidance=ClassifierFree(4.0, **options)))
    assert rows == [8 if one else 4 for one in inside]
    wanted, rows = guided_run(Sampler(solver, steps=8, guidance=Throughout(4.0, **options)))
    assert rows == [8] * len(inside)
    np.testing.assert_allclose(x, wanted, atol=1e-6)
    plain, _ = guided_run(Sampler(solver, steps=8))
    assert np.abs(x - plain).max() > 1e-2


@pytest.mark.once
def test_the_other_rules_with_an_interval():
    """All but one with momentum, which remembers the difference of the two estimates from before the interval."""
    for kind, some in (
        (CFGPlusPlus, 4),
        (CFGZeroStar, 4),
        (AdaptiveProjected, 8),
        (partial(AdaptiveProjected, momentum=0.0), 4),
    ):
        _, rows = guided_run(Sampler(steps=4, guidance=kind(2.0, lowest=0.5, highest=2.0)), compiled=False)
        assert rows == [some, some, 8, some]


def test_a_gradient_through_a_rule_with_an_interval():
    """That of DPS, whose network is the guided one; the last of 3 steps is inside."""
    measured = guidance.DPS(operators.Mask(np.float32([1.0, 0.0])), np.zeros(2), 0.3)
    x, wanted = (
        guided_run(Sampler(steps=3, guidance=[kind(4.0, highest=1.0), measured]), compiled)[0]
        for kind, compiled in ((ClassifierFree, True), (Throughout, False))
    )
    np.testing.assert_allclose(x, wanted, atol=2e-6)


@pytest.mark.reference
@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaling_is_that_of_diffusers(rescale):
    """Of a network that predicts v; here v is that of the exact answers."""
    import torch
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    m, alpha, sigma = at(COSINE, 0.6)
    x = np.random.default_rng(2).normal(size=(4, 2)).astype("float32")
    given, none = ((alpha * x - value) / sigma for value in answers(m, x))
    v = rescale_noise_cfg(*(torch.tensor(value) for value in (none + 5 * (given - none), given)), rescale).numpy()
    received, _ = ask(ClassifierFree(5.0, rescale=rescale), m, x)
    np.testing.assert_allclose(received, alpha * x - sigma * v, atol=2e-5)


@pytest.mark.reference
@pytest.mark.parametrize(
    "options", [{"parallel": 1.0}, {}, {"radius": 0.3}, {"momentum": 0.0, "parallel": 0.4}], ids=str
)
def test_adaptive_projection_is_that_of_diffusers(options):
    """Over three questions, with the momentum between them."""
    import torch
    from diffusers.guiders import adaptive_projected_guidance as apg

    one = AdaptiveProjected(6.0, **options)
    buffer = apg.MomentumBuffer(one.momentum) if one.momentum else None
    memory = one.start(ops.convert_to_tensor(POINTS))
    for index, t in enumerate((0.8, 0.5, 0.3)):
        m, *_ = at(COSINE, t)
        given, none = answers(m)
        parts = [torch.tensor(value) for value in (given, none)]
        radius = one.radius if np.isfinite(one.radius) else 0.0
        # Its "original formulation" is the paper's, with the paper's scale less one.
        wanted = apg.normalized_guidance(*parts, 5.0, buffer, one.parallel, radius, True, norm_dim=-1)
        received, memory = ask(one, m, index=index, memory=memory)
        np.testing.assert_allclose(received, wanted.numpy(), atol=2e-5)


@pytest.mark.once
@pytest.mark.parametrize("t", [(0.9, 0.7), (0.4, 0.2), (0.1, 0.0)])
def test_cfg_plus_plus_takes_the_noise_without_the_condition(t):
    """DDIM's step from its estimate is the paper's step."""
    (now, alpha, sigma), (then, alpha_then, sigma_then) = (at(COSINE, time) for time in t)
    given, none = answers(now)
    noise = (POINTS - alpha * none) / sigma
    if t[1] == 0:  # a run ends at data without noise
        alpha_then, sigma_then = 1.0, 0.0
    wanted = alpha_then * (none + 0.6 * (given - none)) + sigma_then * noise
    sampler = Sampler("ddim", guidance=CFGPlusPlus(0.6))
    step, *_ = sampler.steps_of(MIXTURE.conditional(LABELS), COSINE, (4, 2), x=POINTS, times=np.array(t))
    np.testing.assert_allclose(numpy(step.x), wanted, atol=1e-5)
    assert float(half_step(now, then)) > 0


@pytest.mark.once
def test_cfg_zero_star_is_its_formula():
    schedule = schedules.Rectified()
    m, _, sigma = at(schedule, 0.6)
    given, none = ((POINTS - value) / sigma for value in answers(m))  # v = noise - x = (x_t - x) / t
    s = (given * none).sum(-1, keepdims=True) / (none * none).sum(-1, keepdims=True)
    received, _ = ask(CFGZeroStar(4.0, zero_steps=0), m)
    np.testing.assert_allclose(received, POINTS - sigma * (s * none + 4 * (given - s * none)), atol=2e-5)
    run = list(
        Sampler("euler", steps=5, guidance=CFGZeroStar(4.0, zero_steps=2)).steps_of(
            MIXTURE.conditional(LABELS), schedule, (4, 2)
        )
    )
    np.testing.assert_allclose(numpy(run[0].x), numpy(run[1].x), atol=1e-6)  # the velocity is 0
    assert np.abs(numpy(run[2].x) - numpy(run[1].x)).max() > 0.01


@pytest.mark.once
def test_what_stands_in_for_none():
    m, *_ = at(COSINE, 0.5)
    negative = np.array([1, 2, 0, 0], "int32")
    given, _ = answers(m)
    other = numpy(MIXTURE.conditional(negative)(POINTS, m).x_hat)
    one = ClassifierFree(3.0, negative={"label": negative})
    np.testing.assert_allclose(ask(one, m)[0], other + 3 * (given - other), atol=1e-5)


@pytest.mark.once
def test_some_conditions_alone_are_left_out():
    def function(x, m, a, b):
        return x + ops.reshape(100.0 * a + b, (-1, 1))

    denoise = by_conditions(function, {"a": np.float32(0), "b": np.float32(0)}, a=np.ones(4, "f"), b=np.ones(4, "f"))
    x = np.zeros((4, 2), "float32")
    for drop, wanted in ((None, 2 * 101), (("a",), 1 + 200), (["b"], 100 + 2)):
        received = numpy(ClassifierFree(2.0, drop=drop)(denoise)(x, COSINE.at(np.float32(0.5))).x_hat)
        np.testing.assert_allclose(received, wanted)


@pytest.mark.once
def test_two_classifier_free_guidances_compose():
    """Two scales for two conditions, as in InstructPix2Pix: four answers, each pair in one batch."""

    def function(x, m, a, b):
        return x + ops.reshape(100.0 * a + b, (-1, 1))

    denoise = by_conditions(function, {"a": np.float32(0), "b": np.float32(0)}, a=np.ones(1, "f"), b=np.ones(1, "f"))
    guided = ClassifierFree(2.0, drop=("a",))(ClassifierFree(5.0, drop=("b",))(denoise))
    received = numpy(guided(np.zeros((1, 2), "float32"), COSINE.at(np.float32(0.5))).x_hat)
    np.testing.assert_allclose(received, 200 + 5)


@pytest.mark.once
@pytest.mark.parametrize("one", [ClassifierFree(), AdaptiveProjected(), CFGPlusPlus(), CFGZeroStar()], ids=repr)
@pytest.mark.parametrize("solver", ["ddpm", "heun", "dpm_solver_pp", "uni_pc"])
def test_it_runs_with_any_solver(one, solver):
    sampler = Sampler(solver, steps=6, guidance=one)
    x = numpy(sampler(MIXTURE.conditional(LABELS), COSINE, (4, 2)))
    assert np.isfinite(x).all()
    free = numpy(Sampler(solver, steps=6)(MIXTURE.conditional(LABELS), COSINE, (4, 2)))
    assert np.abs(x - free).max() > 1e-3


@pytest.mark.once
def test_off_is_off():
    free = numpy(Sampler("ddim", steps=5)(MIXTURE.conditional(LABELS), COSINE, (4, 2)))
    for one in (ClassifierFree(1.0), AdaptiveProjected(np.ones(4))):
        assert not one.active
        received = Sampler("ddim", steps=5, guidance=one)(MIXTURE.conditional(LABELS), COSINE, (4, 2))
        np.testing.assert_array_equal(numpy(received), free)
    assert CFGPlusPlus(1.0).active
    assert ClassifierFree([1.0, 2.0]).active


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: guidance.Clip(-1.0), "limit"),
        (lambda: guidance.DynamicThreshold(1.5), "quantile"),
        (lambda: guidance.DynamicThreshold(highest=0.5), "highest"),
        (lambda: Sampler(guidance="clap"), "Did you mean 'clip'"),
        (lambda: ClassifierFree("strong"), "scale.*strong"),
        (lambda: ClassifierFree(float("nan")), "scale"),
        (lambda: ClassifierFree(lowest=2.0, highest=1.0), "highest"),
        (lambda: ClassifierFree(rescale=2.0), "rescale"),
        (lambda: ClassifierFree(prediction="learned_variance"), "one output"),
        (lambda: AdaptiveProjected(momentum=2.0), "momentum"),
        (lambda: CFGZeroStar(zero_steps=-1), "zero_steps"),
        (
            lambda: Sampler(steps=3, guidance=ClassifierFree([1.0, 2.0]))(MIXTURE.conditional(LABELS), COSINE, (4, 2)),
            r"scale.*\(4,\) for one value per sample",
        ),
        (lambda: Sampler(steps=3, guidance=ClassifierFree())(MIXTURE, COSINE, (4, 2)), "dropout"),
        (
            lambda: Sampler(steps=3, guidance=ClassifierFree(drop=["text"]))(
                MIXTURE.conditional(LABELS), COSINE, (4, 2)
            ),
            r"\['text'\] cannot be left out",
        ),
        (lambda: Sampler(steps=3, guidance=ClassifierFree(negative={"label": 1}))(MIXTURE, COSINE, (4, 2)), "negative"),
        (lambda: CFGPlusPlus()(MIXTURE.conditional(LABELS))(POINTS, COSINE.at(np.float32(0.5))), "Sampler"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
