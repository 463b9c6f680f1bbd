"""Progressive distillation: its target, and the loop."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import objectives, random, students
from kdiff.objectives.taught import noised
from kdiff.predictions import Karras, Prediction
from tests.helpers_taught import COSINE, LABELS, MEAN, RECTIFIED, C, X, diffusion, exact_model, labelled
from tests.toys import draw_weights, mostly_once, numpy


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


def test_a_step_is_two_of_the_teacher_as_it_is_sampled():
    """Of a teacher that was distilled itself too, and whose network has the input "interval"."""
    teacher = diffusion()
    first = students.student(teacher, objectives.ProgressiveDistillation(teacher, 2))
    draw_weights(first.network, 2)
    first.reset_ema()
    second = students.student(first, objectives.ProgressiveDistillation(first, 1))
    problem = second.objective.problem(second, ops.convert_to_tensor(X), {}, random.Keys(random.key_of(0)), True)
    keys = random.Keys(random.key_of(0))
    next(keys)
    noise = numpy(random.normal(next(keys), X.shape))
    now = COSINE.sampled_at(np.ones(len(X), "float32"))
    x_t = noised(ops.convert_to_tensor(X), ops.convert_to_tensor(noise), now)
    x_hat = second.prediction.denoise(problem.target, x_t, now)
    sampled = first.sample(len(X), x=numpy(x_t), batch_size=len(X))
    np.testing.assert_allclose(numpy(x_hat), sampled, atol=2e-3 * np.abs(sampled).max())


def test_progressive_halves(tmp_path, monkeypatch):
    """Each student begins as the one before, from which it learns; the last is an ordinary model, sampled in a step."""
    teacher, begun = diffusion(), []
    student = students.student

    def watched(model, objective, **changes):
        made = student(model, objective, **changes)
        begun.append((model, objective.teacher, objective.steps, made))
        return made

    monkeypatch.setattr(students, "student", watched)
    model = students.progressive(teacher, X, (2, 1), optimizer=keras.optimizers.Adam(1e-3), epochs=1, verbose=0)
    (first, taught, two, middle), (second, taught_again, one, last) = begun
    assert first is taught is teacher
    assert second is taught_again is middle
    assert (two, one, last) == (2, 1, model)
    assert repr(model.objective) == "Denoising()"
    assert model.sampler.steps == 1
    assert model.sample(3).shape == (3, 2)
    assert all(variable.trainable for variable in model.network.trainable_variables)
    size = model.count_params()
    assert size < 3 * sum(int(np.prod(weight.shape)) for weight in model.network.weights)  # without a teacher
    with pytest.raises(ValueError, match="progressive: each of `steps` must be half"):
        students.progressive(teacher, X, (8, 3))


def test_scales_of_guidance_are_handed_on(monkeypatch):
    """The first student learns the guided teacher; the second is told the scale, and tells the first the same."""
    teacher, asked = labelled(True), []
    model = students.progressive(
        teacher, {"image": X, "label": LABELS}, (2, 1), guidance=(2.0, 5.0), epochs=1, verbose=0
    )
    assert model.sample(3, label=1, timestep_cond=3.0).shape == (3, 2)
    first = students.student(teacher, objectives.ProgressiveDistillation(teacher, 2, guidance=(2.0, 5.0)))
    second = students.student(
        first, objectives.ProgressiveDistillation(first, 1, guidance=(2.0, 5.0), teacher_told=True)
    )
    inputs = type(model)._inputs

    def watched(self, x_t, m, conditions):
        asked.append((self, numpy(conditions["timestep_cond"]), numpy(conditions["label"])))
        return inputs(self, x_t, m, conditions)

    monkeypatch.setattr(type(model), "_inputs", watched)
    labels = {"label": ops.convert_to_tensor(LABELS, "int32")}
    second.objective.problem(second, ops.convert_to_tensor(X), labels, random.Keys(random.key_of(0)), True)
    assert [one for one, _, _ in asked] == [second, first, first]
    for _, scale, label in asked:
        assert 2.0 <= scale.min() < scale.max() <= 5.0
        np.testing.assert_array_equal(scale, asked[0][1])
        np.testing.assert_array_equal(label, LABELS)
    with pytest.raises(ValueError, match="a teacher is told a scale that is drawn"):
        objectives.ProgressiveDistillation(first, 1, guidance=3.0, teacher_told=True)
