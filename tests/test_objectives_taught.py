"""Objectives of few steps: on Gaussian data, where what they learn is known, each has nothing left to learn."""

import io
import warnings
import zipfile

import keras
import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import codecs, objectives, random, solvers, students
from kdiff.blocks import Interval
from kdiff.denoisers import interval
from kdiff.networks import MLP
from kdiff.objectives.taught import joined_jumps
from kdiff.predictions import Karras, TrigFlow
from kdiff.solvers.base import flow_to
from kdiff.tangents import FiniteDifference
from kdiff.times import LogSNR, Scaled
from tests.helpers_taught import (
    COSINE,
    EXPLODING,
    MEAN,
    RECTIFIED,
    TABLE,
    TIMES,
    C,
    Given,
    X,
    diffusion,
    exact_model,
    gradient,
    jump,
    network,
    product,
)
from tests.toys import draw_weights, mostly_once, numpy

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
        lambda: objectives.Consistency(exact_model(EXPLODING, Karras()), objectives.Discretised(1, 300, 300), c=1.0),
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
        lambda: objectives.Consistency(exact_model(COSINE, "velocity"), objectives.Discretised(1, 300, 300), c=1.0),
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


UNTAUGHT = {
    "MeanFlow": (lambda: objectives.MeanFlow(None, 0.5, FiniteDifference(0.005), 0.0), RECTIFIED, "flow"),
    "Shortcut": (lambda: objectives.Shortcut(0.5, 1024), COSINE, "velocity"),
    "sCT": (lambda: objectives.SCM(None, FiniteDifference(0.005), 0, None, 0), COSINE, TrigFlow()),
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


TRAINED = {
    "ProgressiveDistillation": ("cosine", "velocity", lambda teacher: objectives.ProgressiveDistillation(teacher, 2)),
    "MeanFlow": ("rectified", "flow", lambda _: objectives.MeanFlow(tangent="forward_mode")),
    "Consistency": ("cosine", "velocity", lambda teacher: objectives.Consistency(teacher, ema=True)),
    "SCM": ("cosine", "trig_flow", lambda teacher: objectives.SCM(teacher, "forward_mode", 5)),
    "Shortcut": ("rectified", "flow", lambda _: objectives.Shortcut()),
    "DistributionMatching": (
        "cosine",
        "velocity",
        lambda teacher: objectives.DistributionMatching(
            teacher, students.student(teacher, "denoising", ema=None), every=1
        ),
    ),
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
    model.compile(keras.optimizers.Adam(1e-2))
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


EASY = objectives.Consistency(pairs=objectives.Easy(100))
FAST = {"time_label": LogSNR(100.0)}


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
        refused("SCM: the prediction must be TrigFlow", COSINE, "velocity", "scm"),
        refused("SCM: it learns its weight", COSINE, "trig_flow", "scm", weighting="p2"),
        refused("SCM: the schedule must be cont", TABLE, "trig_flow", "scm"),
        refused("Consistency: the schedule must be continuous", TABLE, "velocity", EASY),
        refused("Consistency: x_hat must be x itself at the cl", COSINE, "data", EASY),
        refused("Consistency: with Noise.. on Cosine.. x_hat changes by", COSINE, "noise", EASY),
        refused("MeanFlow: the network learns from its own deriv", RECTIFIED, "flow", "mean_flow", time_label="scaled"),
        refused("SCM: the network learns from i", COSINE, "trig_flow", "scm", **FAST),
        refused("Shortcut: it draws its own noise levels", RECTIFIED, "flow", "shortcut", weighting="variational"),
        refused("Shortcut: the prediction must have one output", RECTIFIED, "learned_variance", "shortcut"),
    ],
)
def test_what_makes_no_sense_is_refused(schedule, prediction, make, options, message):
    with pytest.raises(ValueError, match=message):
        kdiff.DiffusionModel(
            **{"network": network(), "codec": "identity", "time_label": Scaled(10.0), **options},
            schedule=schedule,
            prediction=prediction,
            objective=make,
        )


@pytest.mark.once
def test_an_objective_that_is_refused_leaves_the_teacher_as_it_was():
    teacher = diffusion()
    for make in (
        lambda: objectives.ProgressiveDistillation(teacher, steps=0),
        lambda: students.student(teacher, objectives.ProgressiveDistillation(teacher, 5, "leading")),
        lambda: students.student(teacher, objectives.ProgressiveDistillation(teacher), codec="pixels"),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            make()
        assert teacher.trainable_variables
    students.student(teacher, objectives.ProgressiveDistillation(teacher))
    assert not teacher.trainable_variables


@pytest.mark.once
def test_the_codec_is_the_teachers_with_its_numbers():
    teacher = diffusion(codec=codecs.Standard())
    objective = objectives.ProgressiveDistillation(teacher)
    assert students.student(teacher, objective).objective is objective
    with pytest.raises(ValueError, match="the codec must be the teacher's"):
        students.student(teacher, objective, codec=codecs.Standard(5.0, 10.0))


@pytest.mark.once
def test_a_teacher_is_saved_without_its_optimizer(tmp_path):
    """Beside its weights and averages nothing; and by itself whole."""
    teacher = diffusion()
    teacher.compile(keras.optimizers.Adam(1e-3))
    teacher.fit(X, batch_size=64, verbose=0)
    model = students.student(teacher, objectives.ProgressiveDistillation(teacher))
    model.compile("sgd")
    model.save(tmp_path / "student.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = keras.saving.load_model(tmp_path / "student.keras")
    assert not loaded.objective.teacher.compiled
    for one, other in zip(loaded.objective.teacher.variables, model.objective.teacher.variables, strict=True):
        np.testing.assert_array_equal(numpy(one), numpy(other))
    teacher.save(tmp_path / "teacher.keras")
    names = {name: names_in(tmp_path / f"{name}.keras") for name in ("student", "teacher")}
    assert any("teacher" in name for name in names["student"])
    assert not any("teacher" in name and "optimizer" in name for name in names["student"])
    assert any("optimizer" in name for name in names["teacher"])


def names_in(file):
    """The names of what a file of a model has."""
    import h5py

    found = []
    with zipfile.ZipFile(file) as whole, whole.open("model.weights.h5") as weights:
        h5py.File(io.BytesIO(weights.read())).visit(found.append)
    return found


@pytest.mark.once
def test_a_teacher_that_was_taught_itself_is_saved_without_its_teacher(tmp_path, monkeypatch):
    """Also if it was loaded with it. A file of an older kdiff, which has all of them, is read."""

    def third(file):
        first = diffusion()
        second = students.student(first, objectives.ProgressiveDistillation(first, 2))
        second.save(tmp_path / "second.keras")
        second = keras.saving.load_model(tmp_path / "second.keras")
        assert second.objective.teacher is not None
        model = students.student(second, objectives.ProgressiveDistillation(second, 1))
        draw_weights(model.network, 5)
        model.reset_ema()
        model.save(file)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(objectives.Taught, "taken", lambda self: None)
        old = third(tmp_path / "old.keras")
    model = third(tmp_path / "new.keras")
    taught = [
        [name for name in names_in(tmp_path / f"{one}.keras") if name.count("teacher") > 1] for one in ("old", "new")
    ]
    assert taught[0]
    assert not taught[1]
    assert repr(model.objective.teacher.objective) == "Denoising()"
    for name in ("old", "new"):
        loaded = keras.saving.load_model(tmp_path / f"{name}.keras")
        assert repr(loaded.objective.teacher.objective) == "Denoising()"
        np.testing.assert_allclose(loaded.sample(4), old.sample(4), atol=1e-5)
        for one, other in zip(loaded.objective.teacher.weights, model.objective.teacher.weights, strict=True):
            np.testing.assert_array_equal(numpy(one), numpy(other))


def test_the_averages_of_a_teacher_are_used_in_a_loop_of_ones_own(tmp_path):
    """From its first step, before which no method of the models is called: of a teacher that was loaded, or given its
    weights, and of a student that was loaded with its teacher.
    """

    def student_of(teacher):
        return students.student(teacher, objectives.ProgressiveDistillation(teacher, 2))

    def target(model):
        keys = random.Keys(random.key_of(0))
        return numpy(model.objective.problem(model, ops.convert_to_tensor(X), {}, keys, True).target)

    teacher = diffusion()
    model = student_of(teacher)
    teacher.save(tmp_path / "teacher.keras")
    model.save(tmp_path / "student.keras")
    given = type(teacher).from_config(teacher.get_config())
    given.build((None, 2))
    given.set_weights(teacher.get_weights())
    found = {
        "loaded": student_of(keras.saving.load_model(tmp_path / "teacher.keras")),
        "given": student_of(given),
        "with its student": keras.saving.load_model(tmp_path / "student.keras"),
    }
    for name, one in found.items():
        np.testing.assert_allclose(target(one), target(model), atol=1e-5, err_msg=name)
    assert np.abs(target(student_of(diffusion(ema=None))) - target(model)).max() > 1e-2  # without averages


def test_tangents_are_normalised_and_warmed():
    """SCM's g = a - r b, with r = step / warmup, and then g / (|g| + c) (its equations 4 to 7)."""

    def g(c, warmup=0, step=0):
        objective = objectives.SCM(None, FiniteDifference(0.005), warmup, c, 0)
        model = exact_model(COSINE, TrigFlow(), objective, times=Given(*TIMES.tables))
        model.network.bias.assign([0.1, -0.1])
        model.step.assign(step)
        made = objective.problem(model, ops.convert_to_tensor(X), {}, random.Keys(random.key_of(0)), True)
        return numpy(made.target - made.output)

    whole, without = g(None), g(None, 10, 0)
    assert np.abs(whole - without).max() > 0.1
    np.testing.assert_allclose(g(None, 10, 5), 0.5 * (whole + without), atol=1e-5)
    np.testing.assert_allclose(g(None, 10, 25), whole, atol=1e-5)
    length = np.sqrt((whole**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(g(0.1), whole / (length + 0.1), atol=1e-5)


def problem_of(objective, schedule, prediction, **options):
    """Of a network that is wrong by 0.1."""
    model = exact_model(schedule, prediction, objective, times=Given(*TIMES.tables), **options)
    model.network.bias.assign([0.1, -0.1])
    made = objective.problem(model, ops.convert_to_tensor(X), {}, random.Keys(random.key_of(0)), True)
    return made, ((numpy(made.output) - numpy(made.target)) ** 2).sum(axis=1)


@pytest.mark.once
def test_mean_flow_weighs_errors_by_their_size():
    """Geng et al. 2025, section 4.3: w = 1 / (|Delta|^2 + c)^p, of the sum over the coordinates."""
    tangent = FiniteDifference(0.005)
    made, error = problem_of(objectives.MeanFlow(None, 0.5, tangent, 0.5, 1e-2), RECTIFIED, "flow")
    np.testing.assert_allclose(numpy(made.weight), 2.0 / np.sqrt(error + 1e-2), rtol=1e-4)


@pytest.mark.once
def test_weightings_of_shortcuts_and_consistency_are_used():
    for make, schedule, prediction in (
        (lambda: objectives.Shortcut(), COSINE, "velocity"),
        (lambda: objectives.Consistency(pairs=objectives.Easy(100), c=1.0), COSINE, "velocity"),
    ):
        weights = [
            numpy(problem_of(make(), schedule, prediction, weighting=one)[0].weight)
            for one in ("truncated_snr", "min_snr")
        ]
        assert np.abs(weights[1] - weights[0]).max() > 0.1


@pytest.mark.once
def test_a_scale_of_1_is_no_guidance():
    """It asks for no null row, and the teacher is called once."""
    model = diffusion()
    made = students.student(model, objectives.ProgressiveDistillation(model, guidance=1.0))
    assert made.objective.scales(X, random.key_of(0)) is None


@pytest.mark.once
def test_wrong_teachers():
    model = diffusion()
    for make, message in (
        (lambda: objectives.ProgressiveDistillation(kdiff.DiffusionModel(MLP(8, 1))), "has no weights yet"),
        (lambda: objectives.SCM(guidance=2.0), "needs a teacher"),
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
            "are not every seco",
        ),
        (lambda: objectives.Shortcut(steps=12), "a power of 2"),
        (lambda: objectives.SCM(model, guidance=(5.0, 2.0)), r"\(low, high\) in this order"),
        (lambda: objectives.SCM(model, guidance=float("inf")), "guidance"),
        (
            lambda: students.student(noisy := diffusion("cosine", "noise"), objectives.ProgressiveDistillation(noisy)),
            "x_hat changes by .* times as much as the output at t = 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for wrong in (None, "model"):
        with pytest.raises(TypeError, match="`teacher` must be a DiffusionModel"):
            objectives.ProgressiveDistillation(wrong)
    low = MLP(16, 1, conditions={"interval": Interval(8)}, dtype="mixed_bfloat16")
    with pytest.raises(ValueError, match="needs a network that computes in float32"):
        kdiff.DiffusionModel(low, "rectified", "flow", objective="mean_flow", time_label=Scaled(10.0))
