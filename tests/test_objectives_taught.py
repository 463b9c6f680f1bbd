"""Objectives of few steps. On Gaussian data what they learn is known: there each has nothing left to learn.

Flow of N(mean, c^2) from s = sigma / alpha to r, in z = x_t / alpha:

    z_r - mean = (z_s - mean) K_r / K_s,     K^2 = c^2 + s^2,

so that the x_hat of a jump is mean + (z_s - mean) c^2 (s + r) / (K_s (s K_r + r K_s)).
"""

import keras
import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import lora, losses, objectives, random, reflow, schedules, solvers, students
from kdiff.blocks import GuidanceEmbedding, Input, Interval, LabelEmbedding, SinusoidalEmbedding
from kdiff.denoisers import interval
from kdiff.networks import MLP
from kdiff.objectives.taught import implied_output, joined_jumps
from kdiff.predictions import Karras, Prediction, TrigFlow
from kdiff.solvers.base import flow_to
from kdiff.tangents import FiniteDifference
from kdiff.times import TimeSampler
from tests.toys import draw_weights, mostly_once, numpy

MEAN, C = np.float32([0.3, -0.2]), np.float32([0.5, 0.8])
RECTIFIED, COSINE, EXPLODING = schedules.Rectified(1e-3), schedules.Cosine(), schedules.VarianceExploding(0.01, 20.0)


def jump(x_t, m, distance):
    """The x_hat of the jump over this distance, an angle."""
    m = m.like(x_t)
    s = m.sigma / m.alpha
    r = ops.tan(ops.maximum(ops.arctan2(m.sigma, m.alpha) - distance[:, None], 0.0))
    mean, c = ops.convert_to_tensor(MEAN), ops.convert_to_tensor(C)
    k_s, k_r = ops.sqrt(c**2 + s**2), ops.sqrt(c**2 + r**2)
    return mean + (x_t / m.alpha - mean) * c**2 * (s + r) / (k_s * (s * k_r + r * k_s))


class Exact(keras.layers.Layer):
    """A network that answers as it should, times 1 + gain, plus bias, both 0: the gradient by them is to vanish."""

    def __init__(self, schedule, prediction):
        super().__init__(autocast=False)
        self.condition_inputs = {"interval": Input(None, None, True)}
        self.schedule, self.prediction = schedule, prediction
        self.gain = self.add_weight(shape=(2,), initializer="zeros", name="gain")
        self.bias = self.add_weight(shape=(2,), initializer="zeros", name="bias")
        self.built = True

    def call(self, inputs, training=None):
        m = self.schedule.at(inputs["time"] / 1000.0)
        x_t = inputs["image"] / self.prediction.input_scale(m.like(inputs["image"]))
        distance = inputs.get("interval")
        x_hat = jump(x_t, m, ops.zeros_like(m.t) if distance is None else distance)
        return implied_output(self.prediction, x_hat, x_t, m) * (1.0 + self.gain) + self.bias


class Given(TimeSampler):
    """These times, in turn of the calls."""

    named = False

    def __init__(self, *tables):
        self.tables, self.calls = tables, 0

    def __call__(self, schedule, batch, key):
        self.calls += 1
        return ops.convert_to_tensor(self.tables[(self.calls - 1) % len(self.tables)], "float32")


def exact_model(schedule, prediction, objective="denoising", **options):
    prediction = Prediction.get(prediction)
    model = kdiff.DiffusionModel(
        Exact(schedule, prediction), schedule, prediction, objective=objective, codec="identity", ema=None, **options
    )
    model.build((None, 2))
    return model


def gradient(model, x, loss="mse"):
    """(loss, gradient by gain and bias, which is what one step of SGD takes away)."""
    model.compile(keras.optimizers.SGD(1.0), loss)
    value = float(model.train_on_batch(x))
    return value, -np.concatenate([numpy(model.network.gain), numpy(model.network.bias)])


X = np.random.default_rng(0).normal(MEAN, C, (64, 2)).astype("float32")
TIMES = Given(np.linspace(0.05, 0.95, 64), np.linspace(0.9, 0.1, 64))


# With a teacher that is exact every loss is 0


LAWS = {
    "MeanFlow": (
        lambda: objectives.MeanFlow(exact_model(RECTIFIED, "flow"), 1.0, "forward_mode", 0.0),
        RECTIFIED,
        "flow",
    ),
    "sCD": (
        lambda: objectives.SCM(exact_model(COSINE, TrigFlow()), "forward_mode", 0, None, 0),
        COSINE,
        TrigFlow(),
    ),
    "CD": (
        lambda: objectives.Consistency(exact_model(EXPLODING, Karras()), objectives.Discretised(1, 300, 300)),
        EXPLODING,
        Karras(),
    ),
    "MeanFlow, differences": (
        lambda: objectives.MeanFlow(exact_model(RECTIFIED, "flow"), 1.0, FiniteDifference(0.005), 0.0),
        RECTIFIED,
        "flow",
    ),
    "sCD, differences": (
        lambda: objectives.SCM(exact_model(EXPLODING, TrigFlow()), FiniteDifference(0.005), 0, None, 0),
        EXPLODING,
        TrigFlow(),
    ),
    "CD, cosine": (
        lambda: objectives.Consistency(exact_model(COSINE, "velocity"), objectives.Discretised(1, 300, 300)),
        COSINE,
        "velocity",
    ),
}


@pytest.mark.parametrize("name", mostly_once(list(LAWS), 3))
def test_a_right_network_has_nothing_to_learn(name):
    """Its loss is 0, and so is the gradient, to the errors of derivatives, of Heun's steps and of float32: 1e-9.

    That of a network that is wrong by 0.1 is not.
    """
    make, schedule, prediction = LAWS[name]
    model = exact_model(schedule, prediction, make(), times=Given(*TIMES.tables))
    loss, slope = gradient(model, X)
    assert loss < 1e-8
    assert np.abs(slope).max() < 5e-5
    model = exact_model(schedule, prediction, make(), times=Given(*TIMES.tables))
    model.network.bias.assign([0.1, -0.1])
    assert gradient(model, X)[0] > 1e-5


# Without a teacher the mean of its gradient is


def product(values):
    """Two-point quadrature of x = mean +- c and noise = +-1, in both coordinates: 16 points, exact for degree 3."""
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 4)).reshape(4, -1).T.astype("float32")
    x, noise = np.tile(MEAN + C * signs[:, :2], (values, 1)), np.tile(signs[:, 2:], (values, 1))
    return x, ops.convert_to_tensor(noise)


UNTAUGHT = {
    "MeanFlow": (lambda: objectives.MeanFlow(None, 0.5, FiniteDifference(0.005), 0.0), RECTIFIED, "flow"),
    "Shortcut": (lambda: objectives.Shortcut(0.5, 1024), COSINE, "velocity"),
    "sCT": (
        lambda: objectives.SCM(None, FiniteDifference(0.005), 0, None, 0),
        COSINE,
        TrigFlow(),
    ),
    "Shortcut, flow": (lambda: objectives.Shortcut(0.5, 1024), RECTIFIED, "flow"),
}


@pytest.mark.parametrize("name", mostly_once(list(UNTAUGHT), 3))
def test_a_right_network_is_right_on_the_mean(name, monkeypatch):
    """The loss is not 0, for data and noise lie on both sides of the flow, but its gradient is: here over all of a
    quadrature, at each of four times, or pairs of times, without any sampling error. (The shortest of a shortcut's
    steps are asked with an interval of 0, which is wrong by the square of their length.)
    """
    make, schedule, prediction = UNTAUGHT[name]
    x, noise = product(4)
    late, early = (np.repeat(np.float32(times), 16) for times in ([0.9, 0.7, 0.5, 0.3], [0.6, 0.1, 0.45, 0.05]))
    monkeypatch.setattr(random, "normal", lambda key, shape: noise)
    for bias, small in (([0.0, 0.0], True), ([0.1, -0.1], False)):
        model = exact_model(schedule, prediction, make(), times=Given(late, early))
        model.network.bias.assign(bias)
        loss, slope = gradient(model, x)
        assert loss > 0.05
        assert (np.abs(slope).max() < 2e-5) == small


# Targets by formulas


@pytest.mark.parametrize("case", mostly_once([("velocity", COSINE, 4), ("flow", RECTIFIED, 2), (Karras(), COSINE, 1)]))
def test_progressive_distillation_is_two_steps_of_ddim(case):
    """Salimans and Ho 2022, algorithm 2, in float64, from the marginals and the exact denoiser."""
    prediction, schedule, steps = case
    prediction = Prediction.get(prediction)
    model = exact_model(
        schedule, prediction, objectives.ProgressiveDistillation(exact_model(schedule, prediction), steps)
    )
    problem = model.objective.problem(model, ops.convert_to_tensor(X), {}, random.Keys(random.key_of(0)), True)
    keys = random.Keys(random.key_of(0))
    i = np.floor(steps * numpy(random.uniform(next(keys), (64,))))
    noise = numpy(random.normal(next(keys), X.shape)).astype("float64")
    now, mid, then = (
        [
            numpy(field).astype("float64")[:, None]
            for field in schedule.sampled_at(((steps - i - part) / steps).astype("float32"))
        ]
        for part in (0.0, 0.5, 1.0)
    )

    def denoised(x, m):
        _, alpha, sigma, _ = m
        return MEAN + alpha * C**2 / (alpha**2 * C**2 + sigma**2) * (x - alpha * MEAN)

    def ddim(x, x_hat, a, b):
        return b[1] * x_hat + b[2] / a[2] * (x - a[1] * x_hat)

    x_now = now[1] * X + now[2] * noise
    x_mid = ddim(x_now, denoised(x_now, now), now, mid)
    x_then = ddim(x_mid, denoised(x_mid, mid), mid, then)
    ratio = then[2] / now[2]
    x_target = (x_then - ratio * x_now) / (then[1] - ratio * now[1])
    m = schedule.sampled_at(((steps - i) / steps).astype("float32"))
    made = numpy(prediction.denoise(problem.target, x_now.astype("float32"), m))
    np.testing.assert_allclose(made, x_target, atol=2e-4)
    assert set(np.unique(i)) == set(range(steps))


def test_improved_pairs():
    """Song and Dhariwal 2023, eqs. of sections 3.4 and 3.5: the number of levels, their places, their probabilities."""
    pairs = objectives.Discretised(1000, 10, 80)
    counts = [float(numpy(pairs.intervals(np.int32(step)))) for step in (0, 249, 250, 499, 500, 749, 750, 5000)]
    assert counts == [10, 10, 20, 20, 40, 40, 80, 80]
    s = np.exp(np.random.default_rng(0).normal(-1.1, 2.0, 4000)).astype("float32")
    s = s[(s > 0.002) & (s < 80.0)]
    above, below = (numpy(value) for value in pairs(ops.convert_to_tensor(s), 0.002, 80.0, np.int32(0)))
    grid = np.linspace(0.002 ** (1 / 7), 80.0 ** (1 / 7), 11) ** 7
    found = np.searchsorted(grid, s)
    np.testing.assert_allclose(above, grid[found], rtol=1e-4)
    np.testing.assert_allclose(below, grid[found - 1], rtol=1e-4)


def test_easy_pairs():
    """Geng et al. 2024, section 3.2, with q = 2, k = 8, b = 1: at first r is 0 where sigmoid(-s) > 1/8."""
    pairs = objectives.Easy(100)
    s = np.float32([0.1, 1.9, 2.0, 10.0])
    for step, a in ((0, 0), (99, 0), (100, 1), (350, 3)):
        same, r = (numpy(value) for value in pairs(ops.convert_to_tensor(s), 0.002, 80.0, np.int32(step)))
        np.testing.assert_array_equal(same, s)
        expected = s * np.maximum(0, 1 - 2.0 ** -(a + 1) * (1 + 8 / (1 + np.exp(s))))
        np.testing.assert_allclose(r, expected, rtol=1e-4, atol=1e-6)
    first = numpy(pairs(ops.convert_to_tensor(s), 0.002, 80.0, np.int32(0))[1])
    assert (first == 0).tolist() == [True, True, False, False]


def test_consistency_training_compares_one_noise():
    """The target is f of the same data and noise at r, and x where r is the clean end."""
    model = exact_model(EXPLODING, Karras(), objectives.Consistency(pairs=objectives.Easy(1)), times=Given([0.8, 0.1]))
    problem = model.objective.problem(model, ops.convert_to_tensor(X[:2]), {}, random.Keys(random.key_of(0)), True)
    keys = random.Keys(random.key_of(0))
    next(keys)
    noise = numpy(random.normal(next(keys), (2, 2)))
    s = numpy(EXPLODING.at(np.float32([0.8, 0.1])).sigma)
    r = s * np.maximum(0, 1 - 0.5 * (1 + 8 / (1 + np.exp(s))))
    assert r[0] > 1.0
    assert r[1] == 0.0
    factor = C / np.sqrt(C**2 + r[0] ** 2)
    np.testing.assert_allclose(numpy(problem.target)[0], MEAN + factor * (X[0] + r[0] * noise[0] - MEAN), rtol=1e-4)
    np.testing.assert_allclose(numpy(problem.target)[1], X[1], atol=1e-5)
    np.testing.assert_allclose(numpy(problem.weight), 1 / (s - r), rtol=1e-4)


def test_two_jumps_are_one():
    """Exact halves give the exact whole, however short."""
    for times in ((0.9, 0.5, 0.2), (0.301, 0.3005, 0.3)):
        now, mid, then = (COSINE.at(np.full(8, t, "float32")) for t in times)
        x_t = ops.convert_to_tensor(X[:8])
        first = jump(x_t, now, interval(now, mid))
        x_mid = flow_to(x_t, first, now.like(x_t), mid.like(x_t))
        joined = joined_jumps(first, jump(x_mid, mid, interval(mid, then)), now, mid, then)
        np.testing.assert_allclose(numpy(joined), numpy(jump(x_t, now, interval(now, then))), atol=3e-4)


@pytest.mark.parametrize("solver", mostly_once(["flow_map", solvers.TCD(0.0), "consistency"]))
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_flow_map_is_sampled_exactly_in_any_steps(solver, steps):
    """`FlowMap` ends in one place, where the flow leads; the others in the distribution of the data."""
    model = exact_model(RECTIFIED, "flow")
    noise = np.random.default_rng(1).normal(size=(2000, 2)).astype("float32")
    sampled = model.sample(2000, sampler=kdiff.Sampler(solver, steps=steps), noise=noise, batch_size=2000)
    if solver == "consistency" and steps > 1:
        np.testing.assert_allclose(sampled.mean(axis=0), MEAN, atol=0.06)
        np.testing.assert_allclose(sampled.std(axis=0), C, atol=0.05)
        return
    begin = RECTIFIED.sampled_at(np.float32(1.0))
    s = float(begin.sigma / begin.alpha)
    z = float(begin.sigma) * noise / float(begin.alpha)
    np.testing.assert_allclose(sampled, MEAN + (z - MEAN) * C / np.sqrt(C**2 + s**2), atol=2e-3)


# As parts of a model


def network(**conditions):
    made = MLP(16, 1, conditions={"interval": Interval(8), **conditions})
    made.build({"image": (None, 2), "time": (None,), **({"label": (None,)} if conditions else {})})
    return draw_weights(made)


def diffusion(schedule="cosine", prediction="velocity", **options):
    """A model whose averages differ from its weights."""
    model = kdiff.DiffusionModel(network(), schedule, prediction, codec="identity", ema=0.9, **options)
    model.build((None, 2))
    draw_weights(model.network, 1)
    model.update_ema()
    return model


TRAINED = {
    "ProgressiveDistillation": ("cosine", "velocity", lambda teacher: objectives.ProgressiveDistillation(teacher, 2)),
    "MeanFlow": ("rectified", "flow", lambda _: objectives.MeanFlow(tangent="forward_mode")),
    "Consistency": ("cosine", "velocity", lambda teacher: objectives.Consistency(teacher, ema=True)),
    "SCM": (
        "cosine",
        "trig_flow",
        lambda teacher: objectives.SCM(teacher, "forward_mode", 5),
    ),
    "Shortcut": ("rectified", "flow", lambda _: objectives.Shortcut()),
}


@pytest.mark.parametrize("name", mostly_once(list(TRAINED), 4))
def test_it_trains_samples_and_is_saved(name, tmp_path):
    """Compiled where the backend compiles; the loaded model has the teacher, and trains on alike."""
    schedule, prediction, make = TRAINED[name]
    teacher = diffusion(schedule, prediction)
    before, trainable = [numpy(value).copy() for value in teacher.variables], len(teacher.trainable_variables)
    model = students.student(teacher, make(teacher))
    for weight, average in zip(model.network.weights, teacher.ema_weights.values, strict=True):
        np.testing.assert_array_equal(numpy(weight), numpy(average))
    model.compile(keras.optimizers.Adam(1e-2), losses.PseudoHuber() if name == "Consistency" else "mse")
    assert len(model.network.trainable_variables) == trainable
    order = {"batch_size": 32, "shuffle": False, "verbose": 0}
    old = numpy(model.network.trainable_variables[0]).copy()
    assert np.isfinite(model.fit(X, **order).history["loss"]).all()
    for value, variable in zip(before, teacher.variables, strict=True):
        np.testing.assert_array_equal(value, numpy(variable))
    assert np.abs(numpy(model.network.trainable_variables[0]) - old).max() > 1e-3
    assert len(model.ema_weights.values) == len(model.network.weights)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert repr(loaded.sampler) == repr(model.sampler)
    np.testing.assert_allclose(loaded.sample(4), model.sample(4), atol=1e-5)
    again = [one.fit(X, **order).history["loss"][0] for one in (model, loaded)]
    assert again[0] == pytest.approx(again[1], rel=1e-3)


@pytest.mark.parametrize("name", mostly_once(list(TRAINED)))
def test_mixed_precision(name):
    """The network in bfloat16: the loss is near that of the same weights in float32."""
    schedule, prediction, make = TRAINED[name]
    teacher, found = diffusion(schedule, prediction), []
    for policy in ("float32", "mixed_bfloat16"):
        low = MLP(16, 1, conditions={"interval": Interval(8)}, dtype=policy)
        model = students.student(teacher, make(teacher), network=low)
        model.compile(keras.optimizers.Adam(1e-3))
        found.append(model.fit(X, batch_size=64, shuffle=False, verbose=0).history["loss"][0])
    assert found[1] == pytest.approx(found[0], rel=0.1, abs=0.02)


# Latent consistency models, and guidance that is distilled in

TABLE = schedules.ScaledLinearBeta(100)


def labelled(steering=False):
    """A model of two classes, its embedding steered or not, trained for a step."""
    waves = SinusoidalEmbedding(8)
    embedding = GuidanceEmbedding(waves, "timestep_cond", 8, 16) if steering else None
    made = MLP(16, 1, embedding=embedding, conditions={"label": LabelEmbedding(2, dropout=0.1)})
    made.build(
        {"image": (None, 2), "time": (None,), "label": (None,), **({"timestep_cond": (None,)} if steering else {})}
    )
    model = kdiff.DiffusionModel(draw_weights(made), TABLE, "velocity", codec="identity", ema=0.9)
    model.build({"image": (None, 2), "label": (None,)})
    return model


LABELS = np.arange(64) % 2


@pytest.mark.parametrize("guidance", mostly_once([3.0, (2.0, 5.0), None]))
def test_latent_consistency_follows_the_guided_teacher(guidance):
    """The target, from what the teacher and the network answer, in NumPy; luo et al. 2023, eqs. 9, 13 and 14."""
    teacher = labelled(True)
    model = students.student(teacher, objectives.LCM(teacher, 10, guidance))
    draw_weights(model.network, 3)
    model.reset_ema()
    conditions = {"label": ops.convert_to_tensor(LABELS, "int32")}
    problem = model.objective.problem(model, ops.convert_to_tensor(X), conditions, random.Keys(random.key_of(0)), False)
    keys = random.Keys(random.key_of(0))
    i = np.floor(10 * numpy(random.uniform(next(keys), (64,)))).astype("int64")
    noise, drawn = numpy(random.normal(next(keys), X.shape)), numpy(random.uniform(next(keys), (64,)))
    now, then = (TABLE.at(np.maximum((i + more) / 10, 0.01).astype("float32")) for more in (1, 0))
    (_, a, s, _), (_, a_r, s_r, _) = ([numpy(field)[:, None] for field in m] for m in (now, then))
    x_t = a * X + s * noise

    def answer(one, x, m, told, label):
        given = {"label": ops.convert_to_tensor(label, "int32"), **told}
        return numpy(one.denoise(ops.convert_to_tensor(x), m, **given))

    scale = 2.0 + 3.0 * drawn[:, None] if isinstance(guidance, tuple) else guidance or 1.0
    none = answer(teacher, x_t, now, {}, np.full(64, 2))
    x_hat = none + scale * (answer(teacher, x_t, now, {}, LABELS) - none)
    x_r = a_r * x_hat + s_r / s * (x_t - a * x_hat)
    told = {"timestep_cond": ops.convert_to_tensor(scale[:, 0])} if isinstance(guidance, tuple) else {}

    def f(x, m, index):
        steps = 10.0 * index[:, None]
        c_skip, c_out = 0.25 / (steps**2 + 0.25), steps / np.sqrt(steps**2 + 0.25)
        return c_skip * x + c_out * answer(model, x.astype("float32"), m, told, LABELS)

    np.testing.assert_allclose(numpy(problem.output), f(x_t, now, 10 * i + 9), atol=2e-4)
    np.testing.assert_allclose(numpy(problem.target), f(x_r, then, np.maximum(10 * i - 1, 0)), atol=2e-4)


def test_a_lora_learns_latent_consistency():
    teacher = labelled()
    model = students.student(teacher, objectives.LCM(teacher, 10, 4.0))
    before = [numpy(weight).copy() for weight in model.network.weights]
    lora.enable(model, 2, "dense")
    model.compile(keras.optimizers.Adam(1e-2), losses.PseudoHuber(0.001, whole=False))
    model.fit({"image": X, "label": LABELS}, verbose=0)
    assert len(model.network.trainable_variables) > 0
    assert all("lora" in weight.path for weight in model.network.trainable_variables)
    kept = [numpy(weight) for weight in model.network.weights if "lora" not in weight.path]
    for value, old in zip(kept, before, strict=True):
        np.testing.assert_array_equal(value, old)
    assert model.sample(2, label=1).shape == (2, 2)


# Reflow, and the loops


def test_reflow_pairs_are_where_the_flow_leads(tmp_path):
    model = exact_model(RECTIFIED, "flow")
    made = reflow.pairs(model, 50, sampler="heun", steps=40, seed=3, batch_size=20)
    s = float(RECTIFIED.sampled_at(np.float32(1.0)).sigma / RECTIFIED.sampled_at(np.float32(1.0)).alpha)
    z = made["noise"] * s
    np.testing.assert_allclose(made["encoded"], MEAN + (z - MEAN) * C / np.sqrt(C**2 + s**2), atol=5e-3)
    assert made["noise"].std() == pytest.approx(1.0, abs=0.15)
    with pytest.raises(ValueError, match="pairs: the sampler must be deterministic"):
        reflow.pairs(model, 4, sampler="ddpm")


def test_reflow_learns_with_the_noise_that_is_given():
    """On pairs of the line x = noise, with any t, the velocity is 0: a network that answers 0 has no loss."""
    model = exact_model(RECTIFIED, "flow", "reflow")
    model.network.gain.assign([-1.0, -1.0])
    model.compile(keras.optimizers.SGD(0.0))
    assert model.evaluate({"encoded": X, "noise": X}, verbose=0) < 1e-10
    assert model.evaluate(X, verbose=0) > 0.5
    other = exact_model(RECTIFIED, "flow")
    other.compile("sgd")
    with pytest.raises(ValueError, match="takes no \\['noise'\\]"):
        other.fit({"encoded": X, "noise": X})


@pytest.mark.data
def test_pairs_are_written_and_read(tmp_path):
    made = {"encoded": X, "noise": X + 1, "label": LABELS}
    kdiff.data.save_pairs(made, tmp_path / "pairs")
    read = list(kdiff.data.load_pairs(tmp_path / "pairs", 16, shuffle=None))
    for name, value in made.items():
        np.testing.assert_array_equal(np.concatenate([np.asarray(batch[name]) for batch in read]), value)
    shuffled = np.concatenate([np.asarray(batch["label"]) for batch in kdiff.data.load_pairs(tmp_path / "pairs", 16)])
    assert sorted(shuffled) == sorted(LABELS)
    assert (shuffled != LABELS).any()
    with pytest.raises(ValueError, match="the same number of rows"):
        kdiff.data.save_pairs({"encoded": X, "noise": X[:3]}, tmp_path / "other")


def test_progressive_halves(tmp_path):
    """Each student begins as the one before, and the last is an ordinary model that samples in one step."""
    teacher = diffusion()
    model = students.progressive(teacher, X, (2, 1), optimizer=keras.optimizers.Adam(1e-3), epochs=1, verbose=0)
    assert repr(model.objective) == "Denoising()"
    assert model.sampler.steps == 1
    assert model.sample(3).shape == (3, 2)
    assert all(variable.trainable for variable in model.network.trainable_variables)
    size = model.count_params()
    assert size < 3 * sum(int(np.prod(weight.shape)) for weight in model.network.weights)  # without a teacher
    with pytest.raises(ValueError, match="progressive: each of `steps` must be half"):
        students.progressive(teacher, X, (8, 3))


# What makes no sense is refused by name


def refused(message, schedule, prediction, make, **options):
    return pytest.param(schedule, prediction, make, options, message, id=message[:40])


@pytest.mark.once
@pytest.mark.parametrize(
    ("schedule", "prediction", "make", "options", "message"),
    [
        refused(
            "Shortcut: the network must have the input 'interval'", RECTIFIED, "flow", "shortcut", network=MLP(8, 1)
        ),
        refused("MeanFlow: the prediction must be Flow", RECTIFIED, "velocity", "mean_flow"),
        refused("MeanFlow: the schedule must be linear", COSINE, "flow", "mean_flow"),
        refused("MeanFlow: it has a weight of its own", RECTIFIED, "flow", "mean_flow", weighting="min_snr"),
        refused(
            "SCM: the prediction must be TrigFlow",
            COSINE,
            "velocity",
            "scm",
        ),
        refused(
            "SCM: it learns its weight",
            COSINE,
            "trig_flow",
            "scm",
            weighting="p2",
        ),
        refused("SCM: the schedule must be cont", TABLE, "trig_flow", "scm"),
        refused("Consistency: the schedule must be continuous", TABLE, "velocity", "consistency"),
        refused("Consistency: x_hat must be x itself at the cl", COSINE, "data", "consistency"),
        refused("Shortcut: it draws its own noise levels", RECTIFIED, "flow", "shortcut", weighting="variational"),
        refused("Shortcut: the prediction must have one output", RECTIFIED, "learned_variance", "shortcut"),
    ],
)
def test_what_makes_no_sense_is_refused(schedule, prediction, make, options, message):
    with pytest.raises(ValueError, match=message):
        kdiff.DiffusionModel(
            **{"network": network(), "codec": "identity", **options},
            schedule=schedule,
            prediction=prediction,
            objective=make,
        )


@pytest.mark.once
def test_wrong_teachers():
    model = diffusion()
    for make, message in (
        (lambda: objectives.ProgressiveDistillation(kdiff.DiffusionModel(MLP(8, 1))), "has no weights yet"),
        (lambda: objectives.Consistency(guidance=2.0), "needs a teacher"),
        (lambda: objectives.ProgressiveDistillation(model, guidance=(1.0, 2.0, 3.0)), "a number, or \\(low, high\\)"),
        (lambda: students.student(model, objectives.ProgressiveDistillation(model, guidance=2.0)), "cannot be guided"),
        (lambda: students.student(model, objectives.LCM(model)), "the schedule must be discrete"),
        (lambda: students.student(model, "denoising", network=MLP(8, 1)), "must have all weights"),
        (
            lambda: students.student(model, objectives.ProgressiveDistillation(model), codec="pixels"),
            "the codec must be the teach",
        ),
        (
            lambda: students.student(model, objectives.ProgressiveDistillation(model, 5, "leading")),
            "are not every second of",
        ),
        (lambda: objectives.Shortcut(steps=12), "a power of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for wrong in (None, "model"):
        with pytest.raises(TypeError, match="`teacher` must be a DiffusionModel"):
            objectives.ProgressiveDistillation(wrong)
    low = MLP(16, 1, conditions={"interval": Interval(8)}, dtype="mixed_bfloat16")
    with pytest.raises(ValueError, match="needs a network that computes in float32"):
        kdiff.DiffusionModel(low, "rectified", "flow", objective="mean_flow")


@pytest.mark.once
def test_losses():
    """Pseudo-Huber against its formula, in NumPy; with weights, of the whole example, and of each number."""
    a, b = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype("float32")
    size = np.sqrt(np.sum((a - b) ** 2, axis=(1, 2)) + 12 * 0.00054**2) - 0.00054 * np.sqrt(12)
    np.testing.assert_allclose(numpy(losses.PseudoHuber()(a, b)), size.mean(), rtol=1e-5)
    weights = np.arange(5, dtype="float32")[:, None]
    np.testing.assert_allclose(
        numpy(losses.PseudoHuber()(a, b, sample_weight=weights)), (weights[:, 0] * size).mean(), rtol=1e-5
    )
    each = np.sqrt((a - b) ** 2 + 0.01) - 0.1
    np.testing.assert_allclose(numpy(losses.PseudoHuber(0.1, whole=False)(a, b)), each.mean(), rtol=1e-5)
    again = keras.losses.deserialize(keras.losses.serialize(losses.PseudoHuber(0.1, whole=False)))
    assert (again.c, again.whole) == (0.1, False)
