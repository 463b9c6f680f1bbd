"""Every ordered pair of guidance rules runs, compiled and not, and a rule with a memory is a function of values."""

import inspect
import os
from itertools import pairwise

import keras
import numpy as np
import pytest
from keras import layers, ops

import kdiff
from kdiff import Sampler, analytic, backend, guidance, operators, random, schedules
from kdiff.blocks import LabelEmbedding, MultiHeadAttention
from kdiff.denoisers import Denoiser, Estimate, Given
from kdiff.guidance.base import Run, tensors
from kdiff.networks import UNet
from kdiff.sampling import State
from tests.toys import draw_weights, numpy

SHAPE = (4, 2, 1)
COSINE = schedules.Cosine()
PACKAGE = os.path.dirname(kdiff.__file__)


class Smooth(guidance.Guidance):
    """A rule with a memory, as the documentation shows it."""

    def start(self, x):
        return 0.0 * x

    def guide(self, denoise, x, m, here):
        estimate = denoise(x, m)
        x_hat = 0.5 * (estimate.x_hat + here.memory)
        return estimate.guided(x_hat, remember=x_hat)


@pytest.fixture(scope="module")
def parts():
    attention = MultiHeadAttention(name="bridge")
    attention.build((None, 8, 2))
    classifier = keras.Sequential([keras.Input(SHAPE), layers.Flatten(), layers.Dense(3)])
    return draw_weights(attention, scale=1.0), draw_weights(classifier)


def denoiser(attention):
    """A small network of two conditions, a convolution and an attention."""
    kernel = np.full((3, 3, 1, 1), 0.1, "float32")

    def answer(given, x, m):
        labels = ops.cast(given.conditions["a"] + 2 * given.conditions["label"], "float32")
        blurred = backend.convolution(x, ops.convert_to_tensor(kernel), None, (1, 1), "same", (1, 1))
        tokens = ops.reshape(x + blurred, (-1, 8, 1)) + ops.reshape(0.3 * labels, (-1, 1, 1)) * ops.convert_to_tensor(
            [[1.0, -0.5]]
        )
        return Estimate(ops.tanh(ops.reshape(attention(tokens)[..., :1], ops.shape(x)) + 0.3 * x))

    labels = {
        name: ops.convert_to_tensor(np.array(value, "int32"))
        for name, value in (("a", [0, 1, 2]), ("label", [2, 1, 0]))
    }
    return Denoiser(answer, Given(labels), {"a": np.int32(3), "label": np.int32(3)})


RULES = 17


def rules(classifier):
    """One of each class, with arrays that differ from sample to sample."""
    image, mask = np.zeros(SHAPE), np.eye(4)[:, :2]
    known = [
        guidance.ClassifierFree([1.0, 2.0, 3.0], drop=("a",), rescale=0.3, prediction="velocity"),
        guidance.AdaptiveProjected([2.0, 3.0, 4.0], drop=("label",), radius=1.0),
        guidance.CFGPlusPlus([0.3, 0.6, 0.9]),
        guidance.CFGZeroStar([1.5, 2.0, 2.5], negative={"label": np.int32([0, 1, 1])}),
        guidance.Successive({"a": [1.0, 2.0, 3.0], "label": 1.5}),
        guidance.Autoguidance(lambda x, m: 0.5 * x, [1.0, 1.5, 2.0]),
        guidance.ClassifierGuidance(classifier, [0.0, 0.5, 1.0]),
        guidance.PerturbedAttention([0.0, 1.0, 2.0]),
        guidance.Clip(0.9),
        guidance.Control("picture", [0.0, 0.5, 1.0], begin=0.9),
        guidance.DynamicThreshold(0.8),
        guidance.Inpaint(image, mask, image + 1.0),
        guidance.DPS(operators.Mask(mask), image, [0.1, 0.2, 0.3]),
        guidance.PiGDM(operators.Mask(mask), image, scale=[0.1, 0.2, 0.3], iterations=2),
        guidance.MomentMatching(operators.Mask(mask), image, 0.1, scale=[0.1, 0.2, 0.3], iterations=1),
        guidance.Seamless(),
        Smooth(),
    ]
    family = {kind for kind in guidance.Guidance.names().values() if kind.__module__.startswith("kdiff.")}
    assert family == {type(one) for one in known} - {Smooth}
    assert len(known) == RULES
    return known


def in_steps(samplers, denoise, compiled, models):
    """x after two steps of a run of each sampler; all of them are one program, which compiles faster than many."""
    run = Run((3, *SHAPE), conditions=lambda some: some)
    begin = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype("float32")

    def advance(xs, now, then, index, states):
        key, first = ops.convert_to_tensor(random.key_of(0)), np.int32(0)
        options = (denoise.answer, denoise.nulls, COSINE)
        moved = zip(samplers, xs, states, strict=True)
        return [one.advance(*options, x, now, then, key, index, first, state) for one, x, state in moved]

    advance = backend.compiled(advance, *models) if compiled else backend.without_gradients(advance)
    xs, states = [ops.convert_to_tensor(begin)] * len(samplers), []
    for one in samplers:
        memory = tuple(rule.start(xs[0]) for rule in one.active)
        states.append(State(one.solver.init(xs[0], 2), Given(denoise.conditions, tensors(one.rows(run)), memory)))
    for index, (now, then) in enumerate(pairwise(np.float32([0.9, 0.6, 0.3]))):
        xs, _, states = zip(*advance(xs, now, then, np.int32(index), list(states)), strict=True)
        xs, states = list(xs), list(states)
    return [numpy(x) for x in xs]


def check_pairs(parts, first, apart):
    """The rule numbered `first` before those that are numbered so far after it, in a circle of all."""
    denoise, known = denoiser(parts[0]), rules(parts[1])
    samplers = [Sampler("ddim", guidance=[known[first], known[(first + one) % len(known)]]) for one in apart]
    plain = in_steps(samplers, denoise, False, parts)
    assert np.isfinite(plain).all()
    if keras.backend.backend() != "torch":  # which runs every step as it stands
        np.testing.assert_allclose(in_steps(samplers, denoise, True, parts), plain, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("first", range(RULES))
def test_ordered_pairs_run_compiled_and_not(parts, first):
    """All on PyTorch; elsewhere, where each is compiled, a rule is twice the first and twice the second."""
    check_pairs(parts, first, range(RULES) if keras.backend.backend() == "torch" else (0, 1))


@pytest.mark.thorough
@pytest.mark.parametrize("first", range(RULES))
def test_every_ordered_pair_runs_compiled_and_not(parts, first):
    check_pairs(parts, first, range(RULES))


def test_a_memory_is_that_of_the_last_step_and_of_the_first_question():
    """Of the estimates under the samples' own conditions, whoever asks about others beside them."""
    seen = []

    class Watched(Smooth):
        named = False

        def guide(self, denoise, x, m, here):
            estimate = super().guide(denoise, x, m, here)
            seen.append((numpy(here.memory), numpy(denoise(x, m).x_hat)))
            return estimate

    data = analytic.GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], 0.1)
    denoise = data.conditional(np.array([0, 1, 1]))
    for guides, asked in (([Watched()], 3), ([Watched(), guidance.ClassifierFree(2.0)], 6)):
        for solver, evaluations in (("ddim", 1), ("heun", 2)):
            seen.clear()
            list(Sampler(solver, steps=3, guidance=guides).steps_of(denoise, COSINE, (3, 2)))
            memory = np.zeros((3, 2))
            for before, x_hat in seen[::evaluations]:  # the estimate of Heun's step is its first
                np.testing.assert_allclose(before, np.concatenate([memory] * (asked // 3)), atol=1e-6)
                memory = 0.5 * (x_hat[:3] + memory)


def test_what_a_rule_answers_must_be_an_estimate_of_the_denoisers():
    class Bare(guidance.Guidance):
        named = False

        def guide(self, denoise, x, m, here):
            return denoise(x, m).x_hat

    class Unguided(Bare):
        named = False

        def guide(self, denoise, x, m, here):
            return denoise(x, m)

    for one in (Bare(), Unguided()):
        with pytest.raises(TypeError, match=r"must return `estimate.guided\(x_hat\)`"):
            Sampler(steps=2, guidance=one)(lambda x, m: x, COSINE, (2, 2))


@pytest.mark.parametrize(("scale", "most"), [(None, 6), (3.0, 9)])
def test_few_frames_lie_between_the_loop_and_the_network(scale, most):
    """From `steps_from`, the loop, to the network's call, both ends counted once."""
    depths = []

    class Watching(UNet):
        named = False

        def call(self, inputs, training=None):
            names = [frame.function for frame in inspect.stack(0) if frame.filename.startswith(PACKAGE)]
            if "steps_from" in names:  # not where the model is built
                depths.append(names.index("steps_from") + 1)
            return super().call(inputs, training)

    network = Watching.residual(8, 2, 1, conditions={"label": LabelEmbedding(3, dropout=0.1)})
    model = kdiff.DiffusionModel(network, ema=None)
    model.build({"image": (None, 4, 4, 1), "label": (None,)})
    model.sample(2, label=1, steps=2, guidance=scale)
    assert depths
    assert max(depths) <= most
