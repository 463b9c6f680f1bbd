"""Latent consistency models, and guidance that is distilled in."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import lora, losses, objectives, random, solvers, students
from tests.helpers_taught import LABELS, TABLE, X, diffusion, labelled
from tests.toys import draw_weights, mostly_once, numpy


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


def test_a_scale_that_was_drawn_in_training_is_needed(tmp_path):
    """Also when the teacher is released, by the loaded model, and by one that goes on from it."""
    teacher = labelled(True)
    model = students.student(teacher, objectives.LCM(teacher, 10, (2.0, 5.0)))
    model.objective = "denoising"
    model.save(tmp_path / "model.keras")
    further = students.student(model, "denoising")
    for one in (model, keras.saving.load_model(tmp_path / "model.keras"), further):
        with pytest.raises(ValueError, match=r"drawn from 2 to 5, and needs one: `timestep_cond=2`"):
            one.sample(2, label=1)
    assert model.sample(2, label=1, timestep_cond=[2.0, 4.0]).shape == (2, 2)
    assert teacher.sample(2, label=1).shape == (2, 2)


@pytest.mark.once
def test_a_network_with_an_interval_is_sampled_as_it_was_trained():
    """It is told the way to the data in both: x_hat of the solver's first step is the output at t = 1."""
    teacher = diffusion(TABLE, time_label="index")
    model = students.student(teacher, objectives.LCM(teacher, 1))
    draw_weights(model.network, 3)
    problem = model.objective.problem(model, ops.convert_to_tensor(X), {}, random.Keys(random.key_of(0)), False)
    keys = random.Keys(random.key_of(0))
    next(keys)  # of the times
    now, then = TABLE.at(np.float32(1.0)), TABLE.sampled_at(0.0)
    x_t = now.alpha * X + now.sigma * random.normal(next(keys), X.shape)
    denoise = model.denoiser_in_step(ema=True)
    _, estimate, _ = solvers.LCM().step(denoise, TABLE, x_t, now, then, lambda: 0.0, ())
    np.testing.assert_allclose(numpy(problem.output), numpy(estimate.x_hat), atol=1e-5)


def test_it_is_sampled_at_times_that_it_has_learned():
    teacher = diffusion("cosine_beta", "velocity")
    steps = teacher.schedule.num_steps // 20
    model = students.student(teacher, objectives.LCM(teacher, steps))
    for count in (1, 3, 4):
        times = model.sampler.clone(steps=count).times(model.schedule)[:-1]
        np.testing.assert_allclose(times * steps, np.round(times * steps), atol=1e-5)
        assert times[0] == 1.0


def test_a_lora_learns_latent_consistency():
    teacher = labelled()
    model = students.student(teacher, objectives.LCM(teacher, 10, 4.0))
    before = [numpy(weight).copy() for weight in model.network.weights]
    lora.enable(model, 2, "dense")
    model.compile(keras.optimizers.Adam(1e-2), losses.PseudoHuber(0.001, whole=False))
    model.fit({"image": X, "label": LABELS}, verbose=0)
    assert len(model.network.trainable_variables) > 0
    assert all("lora" in weight.path for weight in model.network.trainable_variables)
    b = [weight for weight in model.network.trainable_variables if "kernel_b" in weight.path]
    assert all(np.abs(numpy(weight)).max() > 0 for weight in b)  # they begin at 0
    kept = [numpy(weight) for weight in model.network.weights if "lora" not in weight.path]
    for value, old in zip(kept, before, strict=True):
        np.testing.assert_array_equal(value, old)
    assert model.sample(2, label=1).shape == (2, 2)
