"""DiffusionModel: what is trained, what is sampled, what is saved."""

import errno
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import blocks, networks, predictions, random, schedules, times
from kdiff.backend import BACKEND
from tests.toys import compiled_model, draw_weights, exact_denoiser, images, mostly_once, numpy, tiny_network

LABELS = np.arange(32) % 10


def network_weights(model):
    return [numpy(weight).copy() for weight in model.network.trainable_weights]


def averages(model):
    return [numpy(average).copy() for average in model.ema_weights.values]


def fit(model, x, y=None, **options):
    return model.fit(x, y, **{"epochs": 1, "batch_size": 16, "verbose": 0, "shuffle": False, **options}).history


# The loss


def expected_loss(model, x, prediction, kind, weighted):
    """The loss of the first training step, by hand: from the network, in float64, with the model's own t and noise."""
    step = random.fold_in(random.key_of(model.seed), 0, random.TRAINING)
    _, of_times, of_noise = (random.fold_in(step, number) for number in range(3))  # the first is the codec's
    t = numpy(model.times(model.schedule, len(x), of_times))
    noise = numpy(random.normal(of_noise, x.shape)).astype("float64")
    m = model.schedule.at(t)
    alpha, sigma = (numpy(v).astype("float64")[:, None, None, None] for v in (m.alpha, m.sigma))
    x_t = alpha * x + sigma * noise
    a, b = {"data": (1, 0), "noise": (0, 1), "velocity": (-sigma, alpha), "flow": (-1, 1)}[prediction]
    output = numpy(model.network({"image": x_t.astype("float32"), "time": 1000 * t}))
    error = np.abs(output - (a * x + b * noise))
    loss = {"mse": error**2, "mae": error, "huber": np.where(error < 1, error**2 / 2, error - 0.5)}[kind]
    gain = sigma / np.abs(b * alpha - a * sigma)
    weight = np.minimum((alpha / sigma) ** 2, 5) * gain**2 if weighted else 1.0
    return np.mean(weight * loss)


@pytest.mark.parametrize("prediction", mostly_once(["velocity", "data", "noise", "flow"]))
@pytest.mark.parametrize(("kind", "weighted"), [("mse", False), ("mse", True), ("mae", False), ("huber", True)])
def test_the_loss_is_the_formula(prediction, kind, weighted):
    # Width equals batch size: a weight with the wrong axes would broadcast silently.
    x = images(8)
    model = kdiff.DiffusionModel(
        tiny_network(), prediction=prediction, weighting="min_snr" if weighted else None, schedule="linear_beta"
    )
    model.compile(loss=kind)
    model.build(x.shape)
    expected = expected_loss(model, x, prediction, kind, weighted)
    loss = model.compute_loss(y_pred=model(ops.convert_to_tensor(x), training=True))
    assert float(numpy(loss)) == pytest.approx(expected, rel=2e-3)
    if (prediction, kind, weighted) == ("velocity", "mse", True):  # once through `fit`, from the first step again
        model.step.assign(0)
        assert fit(model, x, batch_size=8)["loss"][0] == pytest.approx(expected, rel=2e-3)


def test_sample_weights_and_metrics():
    x = images(16)
    weights = np.r_[np.ones(8), np.zeros(8)].astype("float32")
    results = []
    for sample_weight in (weights, 2 * weights):
        model = compiled_model(optimizer=keras.optimizers.SGD(0.0), metrics=["mae"])
        history = fit(model, x, sample_weight=sample_weight)
        results.append((history["loss"][0], history["mae"][0]))
    assert results[1][0] == pytest.approx(2 * results[0][0], rel=1e-5)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)  # `metrics` are not weighted


@pytest.mark.once
def test_uint8_images_are_scaled():
    x = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1)).astype("uint8")
    losses = [fit(compiled_model(), data)["loss"] for data in (x, (x / 127.5 - 1).astype("float32"))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Training


def test_training_learns_and_shows_metrics(capsys):
    x = 0.5 * np.ones((64, 8, 8, 1), "float32")
    model = compiled_model(prediction="data", metrics=["mae"])
    history = fit(model, x, epochs=8, validation_data=x[:16], verbose=2)
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert history["val_loss"][-1] < history["val_loss"][0]
    assert "val_mae" in capsys.readouterr().out


class Batches(keras.utils.PyDataset):
    def __init__(self, make, x, y):
        super().__init__()
        self.make, self.x, self.y = make, x, y

    def __len__(self):
        return 2

    def __getitem__(self, index):
        rows = slice(16 * index, 16 * index + 16)
        return self.make(self.x[rows], self.y[rows])


def sources(conditional):
    """The same two batches of 16 in every form that `fit` takes."""
    x, y = images(32), LABELS.astype("int32")
    batch = (lambda a, b: {"image": a, "label": b}) if conditional else (lambda a, b: a)
    pair = (lambda a, b: (a, b)) if conditional else (lambda a, b: (a,))
    yield "arrays", lambda: (x, y if conditional else None)
    yield "generator", lambda: ((batch(x[i : i + 16], y[i : i + 16]) for i in (0, 16)), None)
    yield "pydataset of tuples", lambda: (Batches(pair, x, y), None)
    if conditional:
        yield "dictionary", lambda: ({"image": x, "label": y}, None)
        yield "pydataset", lambda: (Batches(batch, x, y), None)


@pytest.mark.eager
@pytest.mark.parametrize("conditional", [False, True])
def test_every_form_of_data_trains_alike(conditional):
    losses = {}
    for name, make in sources(conditional):
        x, y = make()
        model = compiled_model(tiny_network(classes=10 if conditional else None))
        losses[name] = fit(model, x, y)["loss"][0]
    for loss in losses.values():
        assert loss == pytest.approx(losses["arrays"], rel=1e-5)


@pytest.mark.data
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("form", ["images", "pairs"])
def test_tf_data(conditional, form):
    import tensorflow as tf

    x, y = images(32), LABELS.astype("int32")
    forms = {"pairs": (x, y), "images": {"image": x, "label": y}} if conditional else {"pairs": (x,), "images": x}
    data = forms[form]
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(16)
    network = tiny_network(classes=10 if conditional else None)
    model = compiled_model(network)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Keras has nothing to complain about
        history = model.fit(dataset, validation_data=dataset, verbose=0).history
    twin = compiled_model(tiny_network(classes=10 if conditional else None))
    arrays = fit(twin, x, y if conditional else None)
    assert history["loss"][0] == pytest.approx(arrays["loss"][0], rel=1e-5)
    assert model.evaluate(dataset, verbose=0) == pytest.approx(history["val_loss"][-1], rel=1e-5)


@pytest.mark.eager
@pytest.mark.data
def test_tf_data_with_sample_weights():
    import tensorflow as tf

    x, y, w = images(32), LABELS.astype("int32"), np.linspace(0, 2, 32).astype("float32")
    dataset = tf.data.Dataset.from_tensor_slices((x, y, w)).batch(16)
    loss = fit(compiled_model(tiny_network(classes=10)), dataset, batch_size=None)["loss"]
    arrays = fit(compiled_model(tiny_network(classes=10)), x, y, sample_weight=w)["loss"]
    assert loss == pytest.approx(arrays, rel=1e-5)


@pytest.mark.eager
@pytest.mark.data
@pytest.mark.parametrize("workers", [0, 1])
def test_torch_data_loader(workers):
    torch = pytest.importorskip("torch")

    class Labelled(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            return {"image": images(32)[index], "label": np.int32(LABELS[index])}

    loader = torch.utils.data.DataLoader(Labelled(), batch_size=16, num_workers=workers)
    loss = fit(compiled_model(tiny_network(classes=10)), loader, batch_size=None, shuffle=True)["loss"]
    arrays = fit(compiled_model(tiny_network(classes=10)), images(32), LABELS.astype("int32"))["loss"]
    assert loss == pytest.approx(arrays, rel=1e-5)


@pytest.mark.eager
def test_train_on_batch_takes_pairs_and_dictionaries():
    x, y = images(16), LABELS[:16].astype("int32")
    losses = []
    for data in ((x, y), ({"image": x, "label": y},)):
        model = compiled_model(tiny_network(classes=10))
        losses.append((float(model.train_on_batch(*data)), float(model.test_on_batch(*data))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    with pytest.raises(ValueError, match="NaN"):
        model.train_on_batch(x * np.nan, y)


def test_clipping_and_accumulation():
    x = images(64)
    for options in ({"global_clipnorm": 1e-4}, {"clipnorm": 1e-4}, {"gradient_accumulation_steps": 2}):
        model = compiled_model(optimizer=keras.optimizers.SGD(1.0, **options))
        model.build(x.shape)
        before = network_weights(model)
        assert np.isfinite(fit(model, x)["loss"]).all()
        moved = max(np.abs(a - b).max() for a, b in zip(before, network_weights(model), strict=True))
        assert moved > 0
        assert moved <= 4.1e-4 or "gradient_accumulation_steps" in options  # four steps of at most 1e-4


def test_accumulation_updates_the_averages_once_an_update():
    model = compiled_model(optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), ema=0.5)
    x = images(48)
    fit(model, x)  # three steps of 16: one update
    assert int(numpy(model.ema_weights.updates)) == 1
    fit(model, x)  # six steps in all: three updates
    assert int(numpy(model.ema_weights.updates)) == 3


@pytest.mark.skipif(BACKEND == "torch", reason="Keras 3.15 raises on PyTorch")
def test_steps_per_execution():
    x = images(64)
    losses = []
    for steps in (1, 2):
        model = kdiff.DiffusionModel(tiny_network())
        model.compile(keras.optimizers.Adam(1e-2), steps_per_execution=steps)
        losses.append(fit(model, x, epochs=2)["loss"])
        assert int(numpy(model.ema_weights.updates)) == int(numpy(model.step)) == 8
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.skipif(BACKEND == "torch", reason="compiling takes minutes: see test_jit_on_torch")
@pytest.mark.parametrize("jit", [True, False])
def test_jit_compile(jit):
    loss = fit(compiled_model(jit=jit), images(32))["loss"]
    assert loss == pytest.approx(fit(compiled_model(), images(32))["loss"], rel=1e-4)


@pytest.mark.thorough
@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's compiler only")
def test_jit_on_torch():
    loss = fit(compiled_model(jit=True), images(16))["loss"]
    assert loss == pytest.approx(fit(compiled_model(), images(16))["loss"], rel=1e-4)


JITTED = {
    "basic": lambda: networks.UNet.basic(8, 2, 1),
    "residual": lambda: networks.UNet.residual(8, 2, 1, dropout=0.1),
    "attention": lambda: networks.UNet.attention(8, 2, 1),
    "transformer": lambda: networks.UNet.transformer(8, 2, 1, conditions={"label": blocks.LabelEmbedding(3)}),
    "simple": lambda: networks.SimpleUNet((8,), 8, 8),
    "dit": lambda: networks.DiT(16, 1, 2),
    "uvit": lambda: networks.UViT(16, 1, 2),
    "hybrid": lambda: networks.Hybrid.composed((8, 8), (1, 1), head_width=8, pattern=blocks.Neighborhood(3)),
    "ncsnpp": lambda: networks.published.ncsnpp_cifar10(8, 2, depth=1),
    "mlp": lambda: networks.MLP(8, 1),
}


@pytest.mark.thorough
@pytest.mark.skipif(BACKEND != "torch", reason="the others compile every network in their own tests")
@pytest.mark.parametrize("name", JITTED)
def test_every_network_is_compiled_on_torch(name):
    """With a last batch of another size, as data has it; the losses are those of plain PyTorch.

    Minutes each, of which `-k mlp`, or another name, runs one. An MLP of three blocks of 64 took 128 CPU seconds to
    start, as one graph, and its steps then 14 ms in place of 34.
    """
    import torch

    # It makes eight programs of one function, such as a model's step; then, with a mere warning, it compiles no more.
    torch.compiler.reset()
    x, losses = images(6, (2,) if name == "mlp" else (8, 8, 1)), []
    for jit in (True, False):
        keras.utils.set_random_seed(0)  # of the weights
        network = JITTED[name]()
        y = np.arange(6) % 3 if network.conditions else None
        model = compiled_model(network, jit=jit, codec="identity")
        losses.append(model.fit(x, y, batch_size=4, epochs=1, verbose=0, shuffle=False).history["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.fixture(scope="module")
def full_precision():
    return fit(compiled_model(), images(32), epochs=2, validation_data=images(16))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy, full_precision, tmp_path):
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled_model(tiny_network())
        history = fit(model, images(32), epochs=2, validation_data=images(16))
    finally:
        keras.config.set_dtype_policy("float32")
    for name in ("loss", "val_loss"):
        assert history[name] == pytest.approx(full_precision[name], rel=0.03)  # 8 bits of mantissa
    samples = model.sample(4, steps=3)
    assert samples.dtype == np.float32
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "model.keras").sample(4, steps=3), samples, atol=1e-5)


@pytest.mark.once
def test_sampler_of_its_own(tmp_path):
    model = compiled_model(tiny_network(), sampler=kdiff.Sampler("heun", steps=3))
    fit(model, images(32))
    samples = model.sample(2)
    np.testing.assert_array_equal(samples, model.sample(2, sampler="heun", steps=3))
    np.testing.assert_array_equal(list(model.sample_steps(2))[-1].x, samples)
    assert np.abs(samples - model.sample(2, steps=4)).max() > 1e-3
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.sampler == model.sampler
    np.testing.assert_allclose(loaded.sample(2), samples, atol=1e-5)


@pytest.mark.once
def test_vectors_of_any_size():
    """Not only images: two coordinates, not bounded."""
    x, t = keras.Input((2,), name="image"), keras.Input((), name="time")
    hidden = keras.layers.Dense(16, "silu")(ops.concatenate([x, t[:, None] / 1000], axis=-1))
    network = draw_weights(keras.Model({"image": x, "time": t}, keras.layers.Dense(2)(hidden)))
    model = compiled_model(network, codec="identity", schedule="rectified", prediction="flow", weighting="min_snr")
    data = 5 * np.random.default_rng(0).standard_normal((32, 2)).astype("float32")
    assert np.isfinite(fit(model, data)["loss"]).all()
    assert model.sample(3, steps=4).shape == (3, 2)


class Plain(keras.Model):
    """A network as anyone would write it, without `build`, `get_config` or a list of its conditions."""

    def __init__(self, **options):
        super().__init__(**options)
        self.first = keras.layers.Conv2D(4, 3, padding="same")
        self.table = keras.layers.Embedding(10, 4)
        self.last = keras.layers.Conv2D(1, 3, padding="same")

    def call(self, inputs, training=None):
        embedding = self.table(inputs["label"]) + inputs["time"][:, None] / 1000.0
        return self.last(ops.silu(self.first(inputs["image"]) + embedding[:, None, None, :]))


def test_a_network_without_a_build(tmp_path):
    model = compiled_model(Plain())
    fit(model, images(16), LABELS[:16].astype("int32"))
    assert len(model.ema_weights.values) == len(model.network.weights) == 5
    samples = model.sample(2, label=[1, 2], steps=2)
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras", custom_objects={"Plain": Plain})
    np.testing.assert_array_equal(twin.sample(2, label=[1, 2], steps=2), samples)


# Averages


def test_averages_are_the_formula():
    model = compiled_model(optimizer=keras.optimizers.SGD(0.1), ema=0.7)
    model.build((None, 8, 8, 1))
    expected = network_weights(model)
    for n in range(12):
        fit(model, images(16))
        decay = min(0.7, (1 + n) / (10 + n))
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, network_weights(model), strict=True)]
    for average, value in zip(averages(model), expected, strict=True):
        np.testing.assert_allclose(average, value, rtol=1e-4, atol=1e-6)


def test_averages_are_used_for_validation_and_sampling_alone():
    model = compiled_model(optimizer=keras.optimizers.SGD(0.0))
    model.build((None, 8, 8, 1))
    x = images(16)
    plain, validated = model.sample(2, steps=3), model.evaluate(x, verbose=0)
    np.testing.assert_allclose(model.sample(2, steps=3, ema=False), plain, atol=1e-6)
    trained = fit(compiled_model(), x)["loss"]
    for average in model.ema_weights.values:
        average.assign(numpy(average) * 1.5)
    assert fit(model, x)["loss"] == pytest.approx(trained, rel=1e-5)
    for average in model.ema_weights.values:
        average.assign(numpy(average) * 1.5)
    assert np.abs(model.sample(2, steps=3) - plain).max() > 1e-3
    np.testing.assert_allclose(model.sample(2, steps=3, ema=False), plain, atol=1e-6)
    assert model.evaluate(x, verbose=0) != pytest.approx(validated, rel=1e-3)
    model.reset_ema()
    np.testing.assert_allclose(model.sample(2, steps=3), plain, atol=1e-5)


@pytest.mark.once
def test_without_averages():
    model = compiled_model(ema=None)
    fit(model, images(16))
    assert model.ema_weights is None
    np.testing.assert_array_equal(model.sample(2, steps=2), model.sample(2, steps=2, ema=False))


def test_fitting_again_and_evaluating_leaves_weights_alone():
    model = compiled_model()
    x = images(32)
    fit(model, x, validation_data=x)
    before = network_weights(model), averages(model)
    first, second = model.evaluate(x, verbose=0), model.evaluate(x, verbose=0)
    assert first == second
    for old, new in zip(before, (network_weights(model), averages(model)), strict=True):
        for a, b in zip(old, new, strict=True):
            np.testing.assert_array_equal(a, b)
    fit(model, x)
    assert np.isfinite(model.evaluate(x, verbose=0))


# Sampling


class Exact(keras.layers.Layer):
    """A network that knows the data: E[x | x_t] for a Gaussian, as the prediction "data"."""

    def call(self, inputs):
        m = schedules.Cosine().at(inputs["time"] / 1000.0).like(inputs["image"])
        return exact_denoiser(0.2, 0.25)(inputs["image"], m)


@pytest.mark.once
@pytest.mark.parametrize(
    "sampler", [kdiff.Sampler("ddim", steps=250), kdiff.Sampler("ddpm", "linspace", 250)], ids=repr
)
def test_samples_of_a_perfect_network_have_the_datas_moments(sampler):
    model = kdiff.DiffusionModel(Exact(), prediction="data", ema=None)
    model.build((None, 4, 4, 1))
    x = model.sample(200, sampler=sampler, batch_size=100)
    assert x.shape == (200, 4, 4, 1)
    assert x.mean() == pytest.approx(0.2, abs=0.03)
    assert x.std() == pytest.approx(0.25, rel=0.06)


@pytest.fixture(scope="module")
def conditional():
    model = compiled_model(tiny_network(classes=10))
    fit(model, images(16), LABELS[:16].astype("int32"))
    return model


def test_samples_do_not_depend_on_batches_or_on_earlier_runs(conditional):
    label = np.arange(7)
    for sampler in ("ddim", "ddpm"):
        whole = conditional.sample(7, sampler=sampler, steps=4, label=label)
        conditional.sample(3, sampler=sampler, steps=6, label=1)
        batched = conditional.sample(7, sampler=sampler, steps=4, label=label, batch_size=3)
        np.testing.assert_allclose(batched, whole, atol=1e-5)
        assert whole.dtype == np.float32
        assert np.abs(whole).max() <= 1
    assert np.abs(conditional.sample(7, sampler="ddpm", steps=4, label=label, seed=1) - whole).mean() > 0.1


@pytest.mark.once
def test_conditions_reach_the_network(conditional):
    one, same, other = (conditional.sample(2, steps=4, label=label) for label in (1, [1, 1], 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch compiles nothing here")
@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver_pp"])
def test_a_step_is_compiled_once(sampler):
    """Seeds, conditions, guidance scales and numbers of steps are arguments of the compiled step."""
    conditions = {"label": kdiff.blocks.LabelEmbedding(10, dropout=0.1)}
    model = kdiff.DiffusionModel(kdiff.networks.UNet.residual(4, levels=1, depth=1, conditions=conditions))
    model.build({"image": (None, 4, 4, 1), "label": (None,)})
    call, traced = model.network.call, []
    model.network.call = lambda inputs, **options: traced.append(inputs) or call(inputs, **options)
    first = model.sample(2, sampler=sampler, steps=4, guidance=2.0, label=1)
    assert len(traced) == 1
    for changed in (
        {"seed": 1},
        {"label": [2, 3]},
        {"guidance": 3.0},
        {"guidance": kdiff.guidance.ClassifierFree([2, 4])},
    ):
        assert (
            model.sample(2, **{"sampler": sampler, "steps": 4, "guidance": 2.0, "label": 1, **changed}).shape
            == first.shape
        )
    assert len(traced) == 1
    model.sample(2, sampler=sampler, steps=7, guidance=2.0, label=1)
    assert len(traced) <= 2


@pytest.mark.once
def test_steps_can_be_watched(conditional, capsys):
    steps = list(conditional.sample_steps(3, steps=4, label=1, sampler="ddpm"))
    assert [step.index for step in steps] == [1, 2, 3, 4]
    result = conditional.sample(3, steps=4, label=1, sampler="ddpm", verbose=True)
    np.testing.assert_allclose(steps[-1].x, result, atol=1e-6)
    assert "4/4" in capsys.readouterr().out


def test_sampling_in_the_middle_of_an_epoch_changes_nothing():
    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(self.model.sample(2, steps=2))

    seen, x = [], images(64)
    watched, plain = compiled_model(), compiled_model()
    losses = fit(watched, x, callbacks=[Watch()])["loss"], fit(plain, x)["loss"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(seen) == 4
    assert np.abs(seen[0] - seen[-1]).max() > 1e-4  # not the weights that were compiled in
    np.testing.assert_allclose(seen[-1], plain.sample(2, steps=2), atol=1e-5)


@pytest.mark.once
def test_denoise():
    model = kdiff.DiffusionModel(tiny_network(), prediction="data")
    model.build((None, 8, 8, 1))
    x_t = images(4)
    output = model.network({"image": x_t, "time": np.full(4, 300, "float32")})
    x_hat = model.denoise(ops.convert_to_tensor(x_t), model.schedule.at(0.3))
    np.testing.assert_allclose(numpy(x_hat), numpy(output), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match=r"`m` must be a marginal.*received: 0\.3"):
        model.denoise(x_t, 0.3)


@pytest.mark.once
def test_time_labels():
    """The network sees what the label says: here it answers with it."""

    class Echo(keras.layers.Layer):
        def call(self, inputs):
            return 0.0 * inputs["image"] + inputs["time"][:, None, None, None]

    for label, expected in [("scaled", 500.0), ("index", 499.0), (times.LogSNR(1.0), None)]:
        model = kdiff.DiffusionModel(Echo(), schedules.LinearBeta(), "data", time_label=label, ema=None)
        model.build((None, 2, 2, 1))
        m = model.schedule.at(0.5)
        seen = numpy(model.denoise(ops.zeros((2, 2, 2, 1)), m))
        np.testing.assert_allclose(seen, float(numpy(m.log_snr)) if expected is None else expected, rtol=1e-5)


# Saving


def assert_same_weights(a, b):
    assert len(a.weights) == len(b.weights)
    for left, right in zip(a.weights, b.weights, strict=True):
        np.testing.assert_array_equal(numpy(left), numpy(right))


def test_save_and_load(tmp_path):
    model = kdiff.DiffusionModel(
        tiny_network(classes=10, dropout=0.2),
        schedules.CosineBeta(200),
        predictions.Noise(),
        times=times.Discrete(),
        weighting="min_snr",
        time_label="index",
        ema=0.9,
        seed=5,
    )
    model.compile(keras.optimizers.Adam(1e-3), "huber", metrics=["mae"])
    x, y = images(32), LABELS.astype("int32")
    fit(model, x, y)
    draw_weights(model.network, seed=1)
    model.save(tmp_path / "model.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        twin = keras.saving.load_model(tmp_path / "model.keras")
    for name in ("schedule", "prediction", "times", "weighting", "time_label", "codec", "ema", "seed"):
        assert getattr(twin, name) == getattr(model, name)
    assert_same_weights(model, twin)
    np.testing.assert_array_equal(twin.sample(2, steps=3, label=1), model.sample(2, steps=3, label=1))
    # Goes on training as the original does: optimizer, averages, random numbers, dropout.
    original, copied = fit(model, x, y), fit(twin, x, y)
    for name, values in original.items():
        assert copied[name] == pytest.approx(values, rel=1e-5)


@pytest.mark.eager
def test_weights_alone(tmp_path):
    model = compiled_model()
    fit(model, images(16))
    model.save_weights(tmp_path / "model.weights.h5")
    twin = compiled_model()
    twin.build((None, 8, 8, 1))
    twin.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(twin.sample(2, steps=3), model.sample(2, steps=3))


@pytest.mark.eager
def test_an_untrained_model_saves(tmp_path):
    model = kdiff.DiffusionModel(tiny_network())
    model.save(tmp_path / "a.keras")
    twin = keras.saving.load_model(tmp_path / "a.keras")
    twin.build((None, 8, 8, 1))
    assert twin.sample(1, steps=1).shape == (1, 8, 8, 1)


@pytest.mark.once
@pytest.mark.parametrize("name", ["a.keras", "a.weights.h5", "folder"])
def test_a_full_disk_leaves_the_saved_model(tmp_path, monkeypatch, name):
    model, options = compiled_model(), {"zipped": False} if name == "folder" else {}
    save = model.save_weights if "weights" in name else model.save
    model.build((None, 8, 8, 1))
    save(tmp_path / name, **options)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model.network, "save_own_variables", full)  # by when half of it is written
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / name, **options)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.undo()
    save(tmp_path / name, **options)
    assert files.keys() == {path for path in tmp_path.rglob("*") if path.is_file()}


# Bad input


def bad_data():
    x = images(16)
    with_nan = x.copy()
    with_nan[9, 0, 0, 0] = np.nan
    yield "rank", x[..., 0], "shape"
    yield "size", x[:, :4], r"\(batch, 8, 8, 1\); received: \(None, 4, 8, 1\)"
    yield "channels", np.repeat(x, 3, axis=-1), "shape"
    yield "range", 127.5 * (x + 1), r"in \[-1.0, 1.0\]; received .* to 25"
    yield "whole numbers", (1000 * x).astype("int32"), r"0..255"
    yield "not a number", with_nan, "NaN"
    yield "infinity", np.where(np.isnan(with_nan), np.inf, x), "infinity"


@pytest.mark.eager
@pytest.mark.parametrize(("bad", "message"), [case[1:] for case in bad_data()], ids=[case[0] for case in bad_data()])
@pytest.mark.parametrize("where", ["x", "validation_data"])
def test_bad_images(bad, message, where):
    model = compiled_model()
    model.build((None, 8, 8, 1))
    before = network_weights(model)
    with pytest.raises(ValueError, match=message):
        fit(model, **{"x": images(16), where: bad})
    with pytest.raises(ValueError, match=message):
        model.evaluate(bad, verbose=0)
    for a, b in zip(before, network_weights(model), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.eager
@pytest.mark.parametrize("form", ["generator", "pydataset", pytest.param("tf.data", marks=pytest.mark.data)])
def test_a_bad_batch_among_good_ones(form):
    """The error comes before the batch is trained on."""
    good, bad = images(16), images(16)
    bad[9, 0, 0, 0] = np.nan
    data = (batch for batch in (good, bad))
    if form == "pydataset":
        data = Batches(lambda x, y: x, np.concatenate([good, bad]), np.zeros(32))
    if form == "tf.data":
        import tensorflow as tf

        data = tf.data.Dataset.from_tensor_slices(np.concatenate([good, bad])).batch(16)
    model = compiled_model()
    with pytest.raises(ValueError, match="NaN"):
        fit(model, data, batch_size=None)
    assert all(np.isfinite(weight).all() for weight in network_weights(model))


@pytest.mark.data
@pytest.mark.once
def test_an_endless_tf_dataset_needs_a_number_of_steps():
    tf = pytest.importorskip("tensorflow")
    model, endless = compiled_model(), tf.data.Dataset.from_tensor_slices(images(16)).batch(8).repeat()
    for message, task in (
        ("`steps_per_epoch=", lambda: fit(model, endless)),
        ("`validation_steps=", lambda: fit(model, images(16), validation_data=endless)),
        ("`steps=", lambda: model.evaluate(endless)),
    ):
        with pytest.raises(ValueError, match=f"endless.*{message}"):
            task()
    fit(model, endless, steps_per_epoch=1, validation_data=endless, validation_steps=1)
    assert model.step.value == 1
    assert model.evaluate(endless, None, 8, 0, None, 1) > 0


@pytest.mark.eager
@pytest.mark.data
def test_a_tf_dataset_of_another_size():
    import tensorflow as tf

    model = compiled_model()
    model.build((None, 8, 8, 1))
    with pytest.raises(ValueError, match=r"\(batch, 8, 8, 1\); received: \(None, 4, 8, 1\)"):
        fit(model, tf.data.Dataset.from_tensor_slices(images(16, (4, 8, 1))).batch(16))


def empty():
    yield "array", lambda: images(16)[:0]
    yield "generator", lambda: (batch for batch in ())


@pytest.mark.eager
@pytest.mark.parametrize("make", [case[1] for case in empty()], ids=[case[0] for case in empty()])
def test_no_data(make):
    with pytest.raises(ValueError, match="empty"):
        fit(compiled_model(), make())


@pytest.mark.eager
@pytest.mark.data
@pytest.mark.parametrize("known", [True, False])
def test_an_empty_tf_dataset(known):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(images(16)).batch(4)
    dataset = dataset.take(0) if known else dataset.filter(lambda x: False)
    with pytest.raises(ValueError, match="empty"):
        fit(compiled_model(), dataset, batch_size=None, shuffle=True)


@pytest.mark.once
def test_bad_conditions():
    x, y = images(16), LABELS[:16].astype("int32")

    def model():
        return compiled_model(tiny_network(classes=10))

    for data, message in [
        ((x, None), r"missing: \['label'\]"),
        (({"image": x, "text": y}, None), r"missing: \['label'\]"),
        (({"image": x, "label": y, "text": y}, None), r"takes no \['text'\]"),
        ((x, y[:7]), "`label` must have 16 rows"),
        (({"label": y}, None), "must have an 'image'"),
        (({"image": x, "label": y}, y), "twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(model(), *data)
    with pytest.raises(ValueError, match=r"takes no \['label'\]"):
        fit(compiled_model(), x, y)
    with pytest.raises(TypeError, match=r"tf\.data\.Dataset"):
        fit(compiled_model(), "digits")


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"missing: \['label'\]"),
        ({"label": 1, "text": 2}, "text"),
        ({"label": [1, 2, 3]}, "must have 2 rows"),
        ({"label": 1, "steps": 0}, "steps"),
        ({"label": 1, "batch_size": 0}, "batch_size"),
        ({"label": 1, "sampler": "dimm"}, "ddim"),
        ({"label": 1, "seed": -1}, "seed"),
    ],
)
def test_bad_requests_for_samples(conditional, options, message):
    with pytest.raises(ValueError, match=message):
        conditional.sample(2, **options)
    if "batch_size" not in options:
        with pytest.raises(ValueError, match=message):
            next(conditional.sample_steps(2, **options))


@pytest.mark.once
def test_bad_models():
    with pytest.raises(ValueError, match="num_samples"):
        kdiff.DiffusionModel(tiny_network()).sample(0)
    with pytest.raises(ValueError, match="no weights yet"):
        kdiff.DiffusionModel(tiny_network()).sample(1)
    with pytest.raises(TypeError, match="network"):
        kdiff.DiffusionModel("unet")
    with pytest.raises(ValueError, match="ema"):
        kdiff.DiffusionModel(tiny_network(), ema=1.0)
    with pytest.raises(ValueError, match="Unknown NoiseSchedule"):
        kdiff.DiffusionModel(tiny_network(), "cosin")
    with pytest.raises(ValueError, match="seed"):
        kdiff.DiffusionModel(tiny_network(), seed=-3)


def label_model():
    conditions = {"label": kdiff.blocks.LabelEmbedding(3)}
    return compiled_model(kdiff.networks.UNet.basic(width=8, levels=1, depth=1, conditions=conditions))


def test_a_call_that_fails_leaves_no_shapes():
    """Labels (N, 1) fail in the network; what is given next decides what `sample` takes."""
    model = compiled_model(tiny_network((4, 4, 1), classes=3))
    x = images(2, (4, 4, 1))
    with pytest.raises(Exception, match=r"(?s).*"):  # each backend has its own
        model.fit(x, np.zeros((2, 1, 5), "int32"), verbose=0)
    model.fit(x, np.zeros(2, "int32"), verbose=0)
    assert model.sample(2, steps=2, label=[0, 1]).shape == (2, 4, 4, 1)
    with pytest.raises(ValueError, match="shape"):
        model.fit(images(2, (8, 8, 1)), np.zeros(2, "int32"), verbose=0)


@pytest.mark.eager
def test_labels_out_of_range():
    model = label_model()
    with pytest.raises(ValueError, match=r"in 0\.\.2; received 0 to 9"):
        fit(model, images(16), LABELS[:16].astype("int32"))
    model.build({"image": (None, 8, 8, 1), "label": (None,)})
    with pytest.raises(ValueError, match=r"in 0\.\.2; received 3 to 3"):
        model.sample(2, label=3)
    with pytest.raises(ValueError, match="label"):
        model.sample(2, label=[[1, 2], [1, 2]])


def test_validation_in_mixed_precision_sees_float32_averages():
    """Frequencies that the network keeps in float32 must not be rounded on the way through their average."""

    class Frequencies(keras.layers.Layer):
        def build(self, shapes):
            value = keras.initializers.Constant(0.12573022)
            self.frequency = self.add_weight(shape=(), initializer=value, trainable=False, autocast=False)

        def call(self, inputs):
            return ops.cast(inputs["image"], "float32") * 0.0 + self.frequency

    model = kdiff.DiffusionModel(Frequencies(dtype="mixed_bfloat16"))
    model.build((None, 2, 2, 1))
    output = model(ops.zeros((2, 2, 2, 1)), training=False).output
    np.testing.assert_allclose(numpy(output), 0.12573022, rtol=1e-6)


def test_a_changed_prediction_is_not_the_compiled_one():
    model = kdiff.DiffusionModel(tiny_network(), prediction="velocity")
    model.build((None, 8, 8, 1))
    before = model.sample(2, steps=2)
    model.prediction = predictions.Data()
    assert np.abs(model.sample(2, steps=2) - before).max() > 1e-3


def test_a_model_that_was_never_fitted_evaluates():
    model = compiled_model()
    assert np.isfinite(model.evaluate(images(16), verbose=0))


NETWORKS = {
    "functional": tiny_network,
    "unet": lambda: kdiff.networks.UNet.attention(8, levels=2, depth=1),
    "dit": lambda: kdiff.networks.DiT(8, depth=1),
}


@pytest.mark.skipif(BACKEND != "torch", reason="the others learn shapes from symbols")
@pytest.mark.parametrize("name", NETWORKS)
def test_training_runs_the_network_once_a_step(name):
    """Keras calls the model to learn its shapes: on PyTorch for real, unless each part works without numbers."""
    model = compiled_model(NETWORKS[name]())
    model.build((None, 8, 8, 1))
    call, seen = model.network.call, []
    model.network.call = lambda inputs, **options: seen.append(inputs["image"].device.type) or call(inputs, **options)
    fit(model, images(32))
    assert [kind for kind in seen if kind != "meta"] == 2 * ["cpu"]
    assert "meta" in seen


@pytest.mark.once
def test_a_network_of_the_noise_cannot_begin_at_an_snr_of_zero():
    """There x_hat is its error, divided by alpha: told when the model is made, and an error when it draws. A grid that
    begins lower will do, and so will a network of the velocity."""
    schedule = schedules.ZeroTerminalSNR("linear_beta")
    for prediction in ("noise", "score"):
        with pytest.warns(UserWarning, match=r"do not go together.*log-SNR of -40.*Velocity\(\).*UniformLogSNR"):
            model = kdiff.DiffusionModel(tiny_network(), schedule, prediction)
        model.build((None, 8, 8, 1))
        with pytest.raises(ValueError, match=r"(Noise|Score)\(\) and ZeroTerminalSNR\(.*do not go together"):
            model.sample(1, steps=2)
        assert np.isfinite(model.sample(1, sampler=kdiff.Sampler("ddim", "leading", 2))).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for other, prediction in ((schedule, "velocity"), ("cosine_beta", "noise")):
            kdiff.DiffusionModel(tiny_network(), other, prediction)


@pytest.mark.once
@pytest.mark.parametrize("name", ["schedule", "prediction"])
def test_another_schedule_or_prediction_by_name(name):
    """At any time; what was compiled for the old one is not used, in training either."""
    value = {"schedule": "linear_beta", "prediction": "noise"}[name]
    one, other = compiled_model(tiny_network((4, 4, 1)), ema=None), None
    x = images(8, (4, 4, 1))
    one.fit(x, verbose=0)
    one.sample(1, steps=2)
    setattr(one, name, value)
    other = compiled_model(tiny_network((4, 4, 1)), **{name: value}, ema=None)
    other.build((None, 4, 4, 1))
    other.network.set_weights(one.network.get_weights())
    assert one.evaluate(x, verbose=0) == pytest.approx(other.evaluate(x, verbose=0), rel=1e-6)
    np.testing.assert_allclose(one.sample(1, steps=2), other.sample(1, steps=2), atol=1e-6)
    assert np.isfinite(one.fit(x, verbose=0).history["loss"]).all()
    with pytest.raises(ValueError, match="Unknown"):
        setattr(one, name, "nothing")
