"""Guidance of and by models: in `DiffusionModel.sample`, compiled, saved and loaded; image to image and back."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import kdiff
from kdiff import Sampler, backend, identity_attention, schedules
from kdiff.blocks import LabelEmbedding, MultiHeadAttention
from kdiff.guidance import (
    Autoguidance,
    ClassifierFree,
    ClassifierGuidance,
    DynamicThreshold,
    Inpaint,
    PerturbedAttention,
    PiGDM,
)
from kdiff.networks import UNet
from tests.test_guidance import LABELS, MIXTURE, POINTS, at, by_conditions, in_a_run
from tests.toys import draw_weights, images, mostly_once, numpy, tiny_network

COSINE = schedules.Cosine()
SHAPE = (8, 8, 1)


def model_of(network=None, **options):
    model = kdiff.DiffusionModel(network or labelled(), **options)
    model.build({"image": (None, *SHAPE), "label": (None,)})
    draw_weights(model.network)
    model.reset_ema()
    return model


def labelled(dropout=0.2, **options):
    conditions = {"label": LabelEmbedding(3, dropout=dropout)}
    return UNet.attention(8, 1, 1, conditions=conditions, **options)


@pytest.fixture(scope="module")
def model():
    return model_of()


def denoised(model, x, m, label):
    return numpy(model.denoise(ops.convert_to_tensor(x), m, label=np.array(label, "int32")))


def first(model, one, x, m, t, **conditions):
    """The first estimate of a run from x with this guidance."""
    steps = Sampler("ddim", "trailing", 4, guidance=one)
    step = next(iter(model.sample_steps(len(x), sampler=steps, x=x, **conditions)))
    return step.x_hat


# In a model


@pytest.mark.once
def test_a_number_is_the_scale_of_classifier_free(model):
    labels = [0, 1, 2]
    sampler = Sampler("ddim", steps=3)
    number = model.sample(3, sampler=sampler, guidance=4, label=labels)
    rule = model.sample(3, sampler=sampler.replaced(guidance=ClassifierFree(4.0)), label=labels)
    np.testing.assert_allclose(number, rule, atol=1e-6)
    off = model.sample(3, sampler=sampler, guidance=1.0, label=labels)
    np.testing.assert_array_equal(off, model.sample(3, sampler=sampler, label=labels))
    assert np.abs(off - number).max() > 1e-3


@pytest.mark.once
def test_a_number_leaves_the_other_rules_of_the_sampler(model):
    """Its classifier-free guidance has the new scale and keeps its place; without one it is the first."""
    threshold, labels = DynamicThreshold(0.5, 1.0), [0, 1, 2]
    wanted = model.sample(3, sampler=Sampler("ddim", steps=3, guidance=[ClassifierFree(4.0), threshold]), label=labels)
    for own in ([threshold], [ClassifierFree(2.0), threshold]):
        found = model.sample(3, sampler=Sampler("ddim", steps=3, guidance=own), guidance=4.0, label=labels)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    rescaled = [threshold, ClassifierFree(2.0, rescale=0.5)]
    sampler = model._sampler(Sampler("ddim", guidance=rescaled), None, 3.0)
    assert sampler.guidance == (threshold, ClassifierFree(3.0, rescale=0.5))


@pytest.mark.eager
def test_it_is_the_formula(model):
    x = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype("float32")
    m = model.schedule.at(np.float32(1.0))
    given, none = (denoised(model, x, m, label) for label in ([0, 1, 2], [3, 3, 3]))
    scale = np.array([1.0, 2.0, 5.0]).reshape(3, 1, 1, 1)
    received = first(model, ClassifierFree(scale.ravel()), x, m, 1.0, label=[0, 1, 2])
    np.testing.assert_allclose(received, np.clip(none + scale * (given - none), -1, 1), atol=1e-4)
    negative = first(model, ClassifierFree(3.0, negative={"label": 2}), x, m, 1.0, label=[0, 1, 2])
    other = denoised(model, x, m, [2, 2, 2])
    np.testing.assert_allclose(negative, np.clip(other + 3 * (given - other), -1, 1), atol=1e-4)


@pytest.mark.eager
def test_samples_do_not_depend_on_the_batch(model):
    """With a scale, a mask and an image of its own for each sample."""
    image, mask = images(5, SHAPE), np.random.default_rng(1).integers(0, 2, (5, 8, 8))
    rules = [ClassifierFree(np.arange(1.0, 6.0)), Inpaint(image, mask)]
    options = {"sampler": Sampler("ddpm", steps=3, guidance=rules), "label": [0, 1, 2, 0, 1]}
    whole = model.sample(5, **options)
    np.testing.assert_allclose(model.sample(5, batch_size=2, **options), whole, atol=1e-5)
    kept = np.broadcast_to(mask[..., None] == 0, image.shape)
    np.testing.assert_allclose(whole[kept], image[kept], atol=3e-3)  # t = 0 of the cosine schedule has sigma = 6e-4


@pytest.mark.parametrize(
    ("solver", "least", "most"), [("ddpm", 1e-3, 2.0), pytest.param("ddim", 0.0, 1e-4, marks=pytest.mark.once)]
)
def test_known_pixels_of_one_noise(model, solver, least, most):
    """With a deterministic solver that begins from the image they had it anyway; DDPM draws other noise."""
    image, mask, noise = images(2, SHAPE), np.eye(8), np.random.default_rng(2).normal(size=(2, *SHAPE))
    begin = {"image": image, "noise": noise, "strength": 0.6, "label": [0, 1]}
    plain, one = (
        model.sample(2, sampler=Sampler(solver, steps=4, guidance=Inpaint(image, mask, *more)), **begin)
        for more in ((), (noise,))
    )
    assert least <= np.abs(one - plain).max() <= most
    np.testing.assert_allclose(one[:, mask == 0], image[:, mask == 0], atol=3e-3)


def test_other_arrays_compile_nothing_again(model):
    count = [0]

    class CountedScale(ClassifierFree):
        def guide(self, denoise, x, m, here):
            count[0] += 1
            return super().guide(denoise, x, m, here)

    for scale in (2.0, 3.0, 4.5):
        model.sample(2, sampler=Sampler("ddim", steps=3, guidance=CountedScale(scale)), label=0)
    if keras.backend.backend() != "torch":  # which runs every step as it stands
        assert count[0] == 1
    known = len(model._compiled_steps)
    model.sample(2, sampler=Sampler("ddim", steps=3, guidance=CountedScale(9.0)), label=1)
    assert len(model._compiled_steps) == known


@pytest.mark.once
def test_the_models_own_guidance_is_saved(tmp_path):
    sampler = Sampler("ddim", steps=3, guidance=[ClassifierFree(3.0, lowest=0.1, rescale=0.5), "clip"])
    model = model_of(sampler=sampler)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.sampler == sampler
    np.testing.assert_allclose(loaded.sample(2, label=1), model.sample(2, label=1), atol=1e-5)


@pytest.mark.eager
@pytest.mark.parametrize("policy", mostly_once(["mixed_bfloat16", "mixed_float16"]))
def test_mixed_precision(policy):
    model = model_of(labelled(dtype=policy))
    rules = [ClassifierFree(2.0), PerturbedAttention(1.0), PiGDM("downsample", np.zeros((4, 4, 1)))]
    x = model.sample(2, sampler=Sampler("ddim", steps=3, guidance=rules), label=0)
    assert x.dtype == np.float32
    assert np.isfinite(x).all()


@pytest.mark.once
def test_another_schedule(model):
    x = model.sample(2, sampler="ddim", steps=3, guidance=2.0, schedule="rectified", label=[0, 2])
    assert np.isfinite(x).all()
    assert np.abs(x - model.sample(2, sampler="ddim", steps=3, schedule="rectified", label=[0, 2])).max() > 1e-3


@pytest.mark.once
def test_a_learned_variance_passes():
    prediction = kdiff.predictions.LearnedVariance()
    model = model_of(labelled(out_channels=2), schedule=schedules.LinearBeta(20), prediction=prediction)
    for rule in (ClassifierFree(2.0), PiGDM("downsample", np.zeros((4, 4, 1)), iterations=1)):
        sampler = Sampler(kdiff.solvers.DDPM("learned"), steps=3, guidance=rule)
        assert np.isfinite(model.sample(2, sampler=sampler, label=0)).all()


# By other models


@pytest.mark.eager
def test_autoguidance_is_its_formula(model):
    weak = model_of(labelled(seed=3), schedule="rectified", prediction="flow")
    draw_weights(weak.network, seed=1)
    weak.reset_ema()
    x = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype("float32")
    m = model.schedule.at(np.float32(1.0))
    there = weak.schedule.at_log_snr(m.log_snr)
    good = denoised(model, x, m, [0, 1, 2])
    scale = float(there.alpha / m.alpha)
    bad = denoised(weak, scale * x, there._replace(t=ops.clip(there.t, 0.0, 1.0)), [0, 1, 2])
    received = first(model, Autoguidance(weak, 2.5), x, m, 1.0, label=[0, 1, 2])
    np.testing.assert_allclose(received, np.clip(bad + 2.5 * (good - bad), -1, 1), atol=2e-4)
    # Its weights are arguments of the compiled step: others give other samples.
    before = model.sample(2, sampler=Sampler("ddim", steps=2, guidance=Autoguidance(weak)), label=0)
    draw_weights(weak.network, seed=9)
    weak.reset_ema()
    after = model.sample(2, sampler=Sampler("ddim", steps=2, guidance=Autoguidance(weak)), label=0)
    assert np.abs(before - after).max() > 1e-4


def test_autoguidance_by_any_denoiser():
    m, *_ = at(COSINE, 0.5)
    x = ops.convert_to_tensor(POINTS)
    received = Autoguidance(lambda x, m: 0.5 * x, 3.0)(MIXTURE)(x, m).x_hat
    np.testing.assert_allclose(numpy(received), 0.5 * POINTS + 3 * (numpy(MIXTURE(x, m)) - 0.5 * POINTS), atol=1e-5)


class Posterior(keras.Model):
    """The exact classifier of the mixture's noisy points: log p(label | x_t) up to a constant."""

    def call(self, inputs, training=None):
        x, m = inputs["image"], COSINE.at(inputs["time"] / 1000.0)
        return MIXTURE._parts(ops, x, ops.reshape(m.alpha, (-1, 1, 1)), ops.reshape(m.sigma, (-1, 1, 1)))[0]


@pytest.mark.once
@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_an_exact_classifier_gives_the_exact_condition(t):
    """score + grad log p(y | x_t) is the score of p(x_t | y); with scale s, of p(x_t) p(y | x_t)^s."""
    m, *_ = at(COSINE, t)
    x = ops.convert_to_tensor(POINTS)
    given, none = numpy(MIXTURE.conditional(LABELS)(x, m).x_hat), numpy(MIXTURE(x, m))
    for scale in (1.0, 2.5):
        one = ClassifierGuidance(Posterior(), scale, LABELS, noisy=True)
        received = in_a_run(one, MIXTURE, (4, 2), m)(x, m).x_hat
        np.testing.assert_allclose(numpy(received), none + scale * (given - none), atol=1e-4)


@pytest.mark.eager
def test_a_classifier_of_clean_images_is_asked_about_the_estimate(model):
    """Against finite differences of log p(y | x_hat(x_t))."""
    classifier = keras.Sequential([keras.Input(SHAPE), layers.Flatten(), layers.Dense(3)])
    draw_weights(classifier)
    x = 0.3 * np.random.default_rng(0).normal(size=(1, *SHAPE)).astype("float32")
    m, step = model.schedule.at(np.float32(0.3)), 0.03

    def log_probability(x):
        return float(numpy(ops.log_softmax(classifier(denoised(model, x, m, [1]))))[0, 2])

    one = ClassifierGuidance(classifier, 0.7, labels=np.array([2], "int32"))
    denoiser = by_conditions(model.denoise, label=np.ones(1, "int32"))
    change = numpy(one(denoiser)(ops.convert_to_tensor(x), m).x_hat) - denoised(model, x, m, [1])
    factor = 0.7 * float(m.sigma) ** 2 / float(m.alpha)
    for row, column in ((2, 3), (6, 1)):
        move = np.zeros_like(x)
        move[0, row, column] = step
        slope = (log_probability(x + move) - log_probability(x - move)) / (2 * step)
        assert change[0, row, column, 0] / factor == pytest.approx(slope, rel=0.05, abs=2e-3)


@pytest.mark.once
def test_classifier_guidance_runs_in_a_model(model):
    classifier = keras.Sequential([keras.Input(SHAPE), layers.Flatten(), layers.Dense(3)])
    draw_weights(classifier)
    sampler = Sampler("ddim", steps=3)
    free = model.sample(3, sampler=sampler, label=[0, 1, 2])
    for labels in (None, [2, 2, 0], 1):
        rule = ClassifierGuidance(classifier, 5.0, labels)
        assert np.abs(model.sample(3, sampler=sampler, guidance=rule, label=[0, 1, 2]) - free).max() > 1e-4


# By spoilt attention


def test_identity_attention_leaves_each_position_to_itself():
    layer = MultiHeadAttention(2)
    layer.build((None, 4, 4, 8))
    draw_weights(layer)
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype("float32")
    with identity_attention.switched_on(layer.path):
        received = layer(x)
    np.testing.assert_allclose(numpy(received), numpy(layer.output_layer(layer.value(x))), atol=1e-6)
    assert np.abs(numpy(layer(x)) - numpy(received)).max() > 1e-3


@pytest.mark.eager
@pytest.mark.once
def test_scales_that_change_nothing():
    rules = {0.0: PerturbedAttention, 1.0: lambda scale: Autoguidance(MIXTURE, scale)}
    for off, rule in rules.items():
        assert not rule(off).active
        assert not rule([off, off]).active
        for on in ([off, 2.0], 0.5, off + 0.1):
            assert rule(on).active, on


def test_perturbed_attention_is_its_formula(model):
    x = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype("float32")
    m = model.schedule.at(np.float32(1.0))
    good = denoised(model, x, m, [0, 1, 2])
    with identity_attention.switched_on("bridge"):
        bad = denoised(model, x, m, [0, 1, 2])
    assert np.abs(good - bad).max() > 1e-4
    received = first(model, PerturbedAttention(2.0), x, m, 1.0, label=[0, 1, 2])
    np.testing.assert_allclose(received, np.clip(good + 2 * (good - bad), -1, 1), atol=1e-4)
    both = model.sample(2, sampler=Sampler("ddim", steps=2), guidance=[PerturbedAttention(), ClassifierFree()], label=0)
    assert np.isfinite(both).all()


# Images to begin from


@pytest.mark.once
def test_image_to_image(model):
    image = images(3, SHAPE)
    options = {"sampler": Sampler("ddim", "trailing", 8), "label": [0, 1, 2]}
    np.testing.assert_array_equal(model.sample(3, image=image, strength=0.0, **options), image)
    near, far = (model.sample(3, image=image, strength=strength, **options) for strength in (0.2, 0.8))
    assert np.abs(near - image).mean() < np.abs(far - image).mean()
    assert len(list(model.sample_steps(3, image=image, strength=0.5, **options))) == 4
    one = model.sample(3, image=image[0], strength=0.5, **options)
    np.testing.assert_allclose(one[0], model.sample(3, image=image, strength=0.5, **options)[0], atol=1e-5)
    whole = (255 * (image + 1) / 2).astype("uint8")
    np.testing.assert_allclose(
        model.sample(3, image=whole, strength=0.2, **options),
        model.sample(3, image=whole / np.float32(127.5) - 1, strength=0.2, **options),
        atol=1e-5,
    )


@pytest.mark.once
def test_there_and_back(model):
    """The noise that inversion finds makes the image again; more iterations, more exactly; in any batch size."""
    image = 0.5 * images(3, SHAPE)
    options = {"sampler": "ddim", "steps": 8, "label": [0, 1, 2]}
    errors = []
    for iterations in (1, 4):
        noise = model.invert(image, iterations=iterations, **options)
        assert noise.shape == image.shape
        errors.append(np.abs(model.sample(3, x=noise, **options) - image).max())
    assert errors[1] < min(0.01, errors[0])
    np.testing.assert_allclose(model.invert(image, batch_size=2, iterations=4, **options), noise, atol=1e-4)
    path = list(model.invert_steps(image, iterations=4, **options))
    assert [step.index for step in path] == list(range(1, 9))
    assert path[-1].t == 1.0
    np.testing.assert_allclose(path[-1].x, np.clip(noise, -1, 1), atol=1e-4)  # as pictures, which decoding clips


@pytest.mark.once
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sample(2, label=0, image=images(2, SHAPE), strength=1.5), r"strength.*\[0.0, 1.0\].*1.5"),
        (lambda m: m.sample(2, label=0, strength=0.5), "needs an `image`"),
        (lambda m: m.sample(2, label=0, image=images(3, SHAPE), strength=0.5), r"image.*\(2, 8, 8, 1\)"),
        (lambda m: m.sample(2, label=0, image=images(2, SHAPE), x=images(2, SHAPE)), "not from both"),
        (lambda m: m.sample(2, label=0, x=images(2, (8, 8, 2))), r"`x` cannot be of the shape \(2, 8, 8, 2\)"),
        (lambda m: m.sample(2, label=7, guidance=2.0), "Labels must be"),
        (lambda m: m.sample(2, label=0, guidance=ClassifierFree(negative={"label": 9})), "Labels must be"),
        (lambda m: m.sample(2, label=0, guidance=ClassifierFree(negative={"text": "ugly"})), "text"),
        (lambda m: m.sample(2, label=0, guidance=PerturbedAttention(layers="nowhere")), "No self-attention.*bridge"),
        (lambda m: m.sample(2, label=0, guidance="classifier_fre"), "Did you mean 'classifier_free'"),
        (lambda m: m.sample(2, label=0, guidance=Inpaint(np.zeros(SHAPE), np.zeros((4, 4)))), "mask"),
        (lambda m: m.invert(images(2, SHAPE), sampler="ddpm", label=0), "no inverse"),
        (lambda m: model_of(sampler=Sampler(guidance=Autoguidance(m))), "own `sampler`"),
        (lambda m: m.sample(2, label=0, guidance=Autoguidance(kdiff.DiffusionModel(tiny_network()))), "no weights yet"),
        (lambda m: model_of(labelled(0.0)).sample(2, label=0, guidance=2.0), "dropout"),
    ],
)
def test_bad_input(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.mark.once
@pytest.mark.parametrize("make", [lambda: Autoguidance(3), lambda: ClassifierGuidance(lambda x: x)])
def test_no_models(make):
    with pytest.raises(TypeError, match="must be a"):
        make()


def test_a_vjp_is_the_transposed_derivative():
    x = ops.convert_to_tensor(np.array([[1.0, 2.0], [3.0, -1.0]], "float32"))
    y, pull, rest = backend.vjp(lambda x: (x**2, 3.0 * x), x)
    np.testing.assert_allclose(numpy(y), numpy(x) ** 2)
    np.testing.assert_allclose(numpy(rest), 3 * numpy(x))
    np.testing.assert_allclose(numpy(pull(ops.ones((2, 2)))), 2 * numpy(x))
