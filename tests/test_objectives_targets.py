"""Targets of objectives of few steps: constants, by the right weights, at the right times."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import objectives, random, students
from kdiff.denoisers import INTERVAL
from kdiff.predictions import Prediction
from tests.helpers_gradients import value_and_gradients
from tests.helpers_taught import COSINE, RECTIFIED, TABLE, Given, X, diffusion, exact_model
from tests.toys import draw_weights, mostly_once, numpy

NOW, OWN, AVERAGE = (True, False), (False, False), (False, True)  # whether in training, and by the averaged weights
MADE = {
    "ProgressiveDistillation": (
        lambda teacher: objectives.ProgressiveDistillation(teacher, 2),
        ("cosine", "velocity"),
        [NOW],
    ),
    "Consistency": (objectives.Consistency, ("cosine", "velocity"), [NOW, OWN]),
    "Consistency, averaged": (
        lambda _: objectives.Consistency(pairs=objectives.Easy(8), ema=True),
        ("cosine", "velocity"),
        [NOW, AVERAGE],
    ),
    "SCM": (objectives.SCM, ("cosine", "trig_flow"), [NOW, OWN, OWN]),
    "Shortcut": (lambda _: objectives.Shortcut(), ("rectified", "flow"), [NOW, AVERAGE, AVERAGE]),
    "MeanFlow": (lambda _: objectives.MeanFlow(), ("rectified", "flow"), [NOW, OWN, OWN]),
    "LCM": (lambda teacher: objectives.LCM(teacher, 10), (TABLE, "velocity"), [NOW, AVERAGE]),
    "DistributionMatching": (
        lambda teacher: objectives.DistributionMatching(teacher, students.student(teacher, "denoising", ema=None)),
        ("cosine", "velocity"),
        [NOW],
    ),
}


def learner(name):
    """A student whose averages differ from its weights."""
    make, (schedule, prediction), _ = MADE[name]
    teacher = diffusion(schedule, prediction)
    model = students.student(teacher, make(teacher), ema=0.9)
    draw_weights(model.network, 3)
    return model


def problem_of(model, training=True):
    return model.objective.problem(model, ops.convert_to_tensor(X), {}, random.Keys(random.key_of(0)), training)


class Target(keras.layers.Layer):
    """The target, and nothing of the output."""

    def __init__(self, model):
        super().__init__()
        self.model, self.built = model, True

    def call(self, x):
        problem = problem_of(self.model)
        return problem.target + 0.0 * problem.output


@pytest.mark.parametrize("name", mostly_once(list(MADE)))
def test_no_gradient_flows_through_the_target(name):
    made = Target(learner(name))
    _, slopes = value_and_gradients(made, ops.convert_to_tensor(X))
    assert any("network" in path or "mlp" in path for path in slopes)
    for slope in slopes.values():
        np.testing.assert_array_equal(slope, 0.0)


@pytest.mark.once
@pytest.mark.parametrize("name", list(MADE))
def test_which_weights_are_asked(name, monkeypatch):
    """In training those that learn, for the output, and what is published for the target; else the averages alone."""
    model, asked = learner(name), []
    output = type(model).output

    def watched(self, x_t, m, conditions, training=None, ema=False):
        if self is model:
            asked.append((bool(training), bool(ema)))
        return output(self, x_t, m, conditions, training, ema)

    monkeypatch.setattr(type(model), "output", watched)
    problem_of(model)
    assert asked == MADE[name][-1]
    asked.clear()
    problem_of(model, training=False)
    assert asked == [AVERAGE] * len(MADE[name][-1])


@pytest.mark.once
def test_mean_flow_leads_from_more_noise_to_less(monkeypatch):
    """The first examples from the later of two times to the earlier, the others nowhere."""
    first, second = np.linspace(0.1, 0.9, 64).astype("float32"), np.linspace(0.8, 0.2, 64).astype("float32")
    model, seen = exact_model(RECTIFIED, "flow", objectives.MeanFlow(share=0.5), times=Given(first, second)), []
    output = type(model).output

    def watched(self, x_t, m, conditions, training=None, ema=False):
        seen.append((numpy(m.t), numpy(conditions[INTERVAL])))
        return output(self, x_t, m, conditions, training, ema)

    monkeypatch.setattr(type(model), "output", watched)
    problem_of(model)
    t, interval = seen[0]
    np.testing.assert_allclose(t, np.where(np.arange(64) < 32, np.maximum(first, second), first), atol=1e-6)
    angle = [np.arctan2(numpy(m.sigma), numpy(m.alpha)) for m in map(RECTIFIED.at, (t, np.minimum(first, second)))]
    np.testing.assert_allclose(interval, np.where(np.arange(64) < 32, angle[0] - angle[1], 0.0), atol=1e-5)


@pytest.mark.once
def test_weights_of_losses():
    """That of progressive distillation is at the time of its output; that of sCM is e^w, with -w beside it."""
    model = exact_model(
        COSINE, "velocity", objectives.ProgressiveDistillation(exact_model(COSINE, "velocity"), 4), weighting="min_snr"
    )
    keys = random.Keys(random.key_of(0))
    i = np.floor(4 * numpy(random.uniform(next(keys), (64,))))
    m = COSINE.sampled_at(((4 - i) / 4).astype("float32"))
    snr, gain = np.exp(numpy(m.log_snr)), numpy(Prediction.get("velocity").gain(m))
    np.testing.assert_allclose(numpy(problem_of(model).weight), np.minimum(snr, 5.0) * gain**2, rtol=1e-4)
    model = learner("SCM")
    model.objective.series.assign(np.linspace(-0.5, 0.7, 8))
    problem = problem_of(model)
    assert numpy(problem.weight).std() > 0.1
    np.testing.assert_allclose(np.log(numpy(problem.weight)), -numpy(problem.extra), atol=1e-5)
