"""What a condition gives: tokens with a mask, a map beside x_t, several inputs in one vector; on every network."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import DiffusionModel, backend, blocks, networks, random, schedules
from kdiff.blocks import Concat, Encoded, Joint, MLPEmbedding, SinusoidalEmbedding, TextEncoder
from kdiff.blocks.noising import AUGMENTING, LEVELS
from kdiff.blocks.resizing import FORMS, resized
from kdiff.networks import MLP, DiT, Hybrid, Level, NCSNpp, SimpleUNet, UNet, UViT
from kdiff.text import Bytes
from tests.helpers_gradients import perturb, run, value_and_gradients
from tests.toys import mostly_once, numpy

pytestmark = pytest.mark.eager


@keras.saving.register_keras_serializable("tests")
class Words(blocks.Condition):
    """Vectors of words, (batch, tokens, dim); those that are all 9 are padding."""

    def __init__(self, width, masked=True, inverted=False, **kwargs):
        super().__init__(**kwargs)
        self.width, self.masked, self.inverted = width, masked, inverted

    def build(self, x_shape):
        self.dense = blocks.Dense(self.width, dtype=self.dtype_policy)
        self.dense.build(x_shape)

    def encode(self, x, embed, training):
        mask = ops.any(ops.not_equal(x, 9), axis=-1)
        return Encoded(tokens=self.dense(x), mask=(~mask if self.inverted else mask) if self.masked else None)

    def compute_output_spec(self, x, embed=None, context=None, training=None):
        tokens = keras.KerasTensor((*x.shape[:-1], self.width), self.compute_dtype)
        return Encoded(tokens=tokens, mask=keras.KerasTensor(x.shape[:-1], "bool") if self.masked else None)


def vector(width):
    return {"label": blocks.LabelEmbedding(3, width)}


def transformer(**options):
    return blocks.TransformerBlock(2, zero=False, **options)


# name: (network of the layer of a text, shape of the image)
NETWORKS = {
    "unet": (
        lambda text: UNet.transformer(8, 1, 1, heads=2, conditions={"text": text, **vector(32)}),
        (4, 8, 2),
    ),
    "unet_spatial": (
        lambda text: UNet(
            [Level(8, 1, mixer=blocks.SpatialTransformer(1, 2, zero=False))],
            conditions={"text": text, "more": Words(5, masked=False)},
        ),
        (4, 4, 2),
    ),
    "dit_local": (
        lambda text: DiT(
            16,
            3,
            1,
            [
                transformer(adaptive=True, pattern=blocks.Window(2, 1)),
                transformer(pattern=blocks.Neighborhood(3), rotary="rotary"),
                transformer(pattern="linear", qk_norm="rms_norm"),
            ],
            conditions={"text": text},
        ),
        (4, 4, 2),
    ),
    "dit_remat": (lambda text: DiT(16, 2, 2, conditions={"text": text}, remat=True), (4, 4, 2)),
    "uvit": (lambda text: UViT(16, 3, 2, block=transformer(), conditions={"text": text, **vector(16)}), (4, 4, 2)),
    "uvit_linear": (
        lambda text: UViT(16, 1, 2, block=transformer(pattern="linear"), conditions={"text": text}),
        (4, 4, 2),
    ),
    "hybrid": (
        lambda text: Hybrid.composed((8, 8), (1, 1), head_width=4, conditions={"text": text}),
        (4, 4, 2),
    ),
    "mlp": (lambda text: MLP(16, 1, transformer(adaptive=True), conditions={"text": text}), (2,)),
}
WIDTH = {"uvit": 16, "uvit_linear": 16}


def inputs_of(network, shape, words, batch=2):
    rng = np.random.default_rng(0)
    inputs = {
        "image": rng.standard_normal((batch, *shape)).astype("float32"),
        "time": np.linspace(1, 999, batch).astype("float32"),
        "text": words,
        "more": rng.standard_normal((batch, 2, 3)).astype("float32"),
        "label": np.arange(batch, dtype="int32"),
    }
    return {name: inputs[name] for name in ("image", "time", *network.conditions)}


def padded(words, length, counts, with_what):
    """Row n keeps `counts[n]` words; the rest is padding, whose own vectors are `with_what`."""
    made = np.full((len(words), length, words.shape[-1]), with_what, "float32")
    for row, word, count in zip(made, words, counts, strict=True):
        row[:count] = word[:count]
    return made


def built(name, **options):
    make, shape = NETWORKS[name]
    network = make(Words(WIDTH.get(name, 5), **options))
    words = np.random.default_rng(1).standard_normal((2, 4, 3)).astype("float32")
    inputs = inputs_of(network, shape, padded(words, 4, (4, 2), 9.0))
    network.build({key: (None, *value.shape[1:]) for key, value in inputs.items()})
    perturb(network)
    return network, inputs, words


def alone(network, inputs, row, words):
    """The output for one example whose text has no padding at all; another length, and so another network for UViT."""
    one = {name: value[row : row + 1] for name, value in inputs.items()} | {"text": words}
    if isinstance(network, UViT):
        shorter = network.clone()
        shorter.build({name: value.shape for name, value in one.items()})
        lost = inputs["text"].shape[1] - words.shape[1]
        others = {"label": 1} if "label" in inputs else {}
        first, kept = 1, words.shape[1] + sum(others.values())
        for mine, theirs in zip(shorter.weights, network.weights, strict=True):
            value = numpy(theirs)
            if mine.shape != theirs.shape:  # positions of time, text, label, patches
                value = np.concatenate([value[: first + words.shape[1]], value[first + words.shape[1] + lost :]])
            mine.assign(value)
        assert kept >= 1
        network = shorter
    return run(network, one)


@pytest.mark.parametrize("name", mostly_once(NETWORKS, ("unet_spatial", "dit_local", "uvit_linear", "mlp")))
def test_padding_changes_nothing(name):
    """Neither how much there is nor what is in it: the text alone gives the same."""
    network, inputs, words = built(name)
    y = run(network, inputs)
    np.testing.assert_allclose(y[1:], alone(network, inputs, 1, words[1:, :2]), atol=1e-6, rtol=1e-5)
    for fault in ({"masked": False}, {"inverted": True}) if name in ("uvit_linear", "mlp") else ():
        other, *_ = built(name, **fault)
        assert np.abs(run(other, inputs)[1] - y[1]).max() > 1e-4


@pytest.mark.parametrize("name", mostly_once(["uvit_linear", "uvit", "dit_local"]))
def test_gradients_are_finite_even_of_an_empty_text(name):
    network, inputs, words = built(name)
    inputs["text"] = padded(words, 4, (4, 0), 9.0)
    y, gradients = value_and_gradients(network, inputs)
    assert np.isfinite(y).all()
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all(), path
        if not path.endswith("key/bias"):
            assert np.abs(gradient).max() > 1e-8, path


@pytest.mark.parametrize("name", mostly_once(["unet", "uvit"]))
def test_masked_networks_save_and_compute_lower(name, tmp_path):
    network, inputs, _ = built(name)
    y = run(network, inputs)
    network.save(tmp_path / "network.keras")
    np.testing.assert_allclose(run(keras.saving.load_model(tmp_path / "network.keras"), inputs), y, atol=1e-5)
    lower = network.clone(dtype="mixed_bfloat16")
    lower.build({key: value.shape for key, value in inputs.items()})
    lower.set_weights(network.get_weights())
    assert np.abs(run(lower, inputs) - y).max() < 0.1 * max(1, np.abs(y).max())
    sizes = {key: value.shape[1:] for key, value in inputs.items() if key not in ("image", "time")}
    assert networks.flops(network, inputs["image"].shape[1:], **sizes) > 0


@pytest.mark.once
def test_remat_with_a_mask_has_the_same_gradients():
    network, inputs, _ = built("dit_remat")

    def losses(remat):
        model = network.clone(remat=remat)
        model.build({key: value.shape for key, value in inputs.items()})
        model.set_weights(network.get_weights())
        model.compile(keras.optimizers.SGD(1e-2), "mse", jit_compile=keras.backend.backend() == "jax")
        target = np.ones_like(inputs["image"])
        return model.fit(inputs, target, epochs=3, batch_size=2, shuffle=False, verbose=0).history["loss"]

    np.testing.assert_allclose(losses(True), losses(False), rtol=1e-5)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_masked_text_does_not_know_how_it_is_padded(pooled, tmp_path):
    """The weights of a longer encoder are those of a shorter one with more positions."""

    def encoder(length):
        layer = TextEncoder(Bytes(length), 8, 1, 2, transformer(), pooled, masked=True)
        layer.build((None, length))
        return layer

    short, long = encoder(4), encoder(7)
    perturb(long)
    for mine, theirs in zip(short.weights, long.weights, strict=True):
        mine.assign(numpy(theirs)[: mine.shape[0]])
    texts = ["abcd", "ab", ""]
    small, large = short(Bytes(4)(texts)), long(Bytes(7)(texts))
    if pooled:
        np.testing.assert_allclose(numpy(ops.stop_gradient(large)), numpy(ops.stop_gradient(small)), atol=1e-6)
        return
    mask = numpy(small.mask)
    np.testing.assert_array_equal(mask.sum(1), [4, 2, 0])
    assert numpy(large.mask).sum() == 6
    small, large = (numpy(ops.stop_gradient(one.tokens)) for one in (small, large))
    # Numbers to 3, equal on PyTorch and TensorFlow. JAX compiles a sum of seven, three of them 0, otherwise than one of
    # four, without the flags of conftest.py too: they differ by up to 2e-6.
    size = np.abs(small[mask]).max() if keras.backend.backend() == "jax" else 1.0
    np.testing.assert_allclose(large[:, :4][mask], small[mask], atol=1e-6 * size, rtol=0)
    assert np.isfinite(large).all()


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of PyTorch's calls alone")
def test_a_mask_keeps_to_the_fast_path():
    layer = blocks.CrossAttention(2)
    x, context = ops.ones((1, 2, 8)), blocks.Tokens(ops.ones((1, 3, 5)), ops.convert_to_tensor(np.ones((1, 3), bool)))
    layer(x, context=context)
    assert backend.needs_no_preparation(layer, (x,), {"context": context, "training": False})


# --- maps


def low(**options):
    return Concat(**{"noise": schedules.Cosine(), "level": 0.3, "seed": 3, **options})


MAPS = {
    "unet": (lambda conditions: UNet.residual(8, 2, 1, conditions=conditions), (8, 8, 2)),
    "simple": (lambda conditions: SimpleUNet((8,), 8, 8, conditions=conditions), (4, 4, 2)),
    "ncsnpp": (
        lambda conditions: NCSNpp(
            [Level(8, 1), Level(8, 1)],
            conditions=conditions,
            progressive_input=networks.InputSkip(),
            progressive_output=networks.OutputSkip(),
        ),
        (4, 4, 2),
    ),
    "dit": (lambda conditions: DiT(16, 1, 2, conditions=conditions), (4, 4, 2)),
    "uvit": (lambda conditions: UViT(16, 1, 2, block=transformer(), conditions=conditions), (4, 4, 2)),
    "hybrid": (lambda conditions: Hybrid.composed((8, 8), (1, 1), head_width=4, conditions=conditions), (4, 4, 2)),
}


def with_maps(name, **conditions):
    make, shape = MAPS[name]
    network = make(conditions)
    rng = np.random.default_rng(0)
    inputs = {"image": rng.standard_normal((2, *shape)).astype("float32"), "time": np.array([1.0, 500.0], "float32")}
    inputs |= {key: rng.standard_normal((2, 2, 2, 3)).astype("float32") for key in conditions}
    network.build({key: (None, *value.shape[1:]) for key, value in inputs.items()})
    perturb(network)
    return network, inputs


@pytest.mark.parametrize("name", mostly_once(MAPS, ("unet", "ncsnpp", "uvit")))
def test_a_map_is_joined_to_the_channels(name):
    network, inputs = with_maps(name, low=low(), depth=Concat("area"))
    y = run(network, inputs)
    assert y.shape == inputs["image"].shape
    for key in ("low", "depth"):
        assert np.abs(run(network, {**inputs, key: -inputs[key]}) - y).max() > 1e-4
    shape, more = inputs["image"].shape[1:], {key: inputs[key].shape[1:] for key in ("low", "depth")}
    plain = MAPS[name][0]({})
    assert networks.flops(network, shape, **more) > networks.flops(plain, shape)


@pytest.mark.once
def test_a_noised_map_is_learned_and_saved(tmp_path):
    network, inputs = with_maps("dit", low=low())
    y, gradients = value_and_gradients(network, inputs)
    level = {"low_level": np.full(2, 0.3, "float32")}
    np.testing.assert_allclose(run(network, {**inputs, **level}), y, atol=1e-5)
    noise = {"low_noise": np.zeros((2, *inputs["image"].shape[1:3], 3), "float32")}
    assert np.abs(run(network, {**inputs, **noise}) - y).max() > 1e-4
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 1e-9 or path.endswith("key/bias"), path
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    np.testing.assert_allclose(run(loaded, inputs), y, rtol=1e-5, atol=1e-5)


def test_the_channels_are_those_of_image_then_maps():
    """The network of more channels, given all as one image, is the same."""
    network, inputs = with_maps("unet", depth=Concat("nearest"))
    whole = UNet.residual(8, 2, 1, out_channels=2)
    enlarged = inputs["depth"].repeat(4, axis=1).repeat(4, axis=2)
    joined = {"image": np.concatenate([inputs["image"], enlarged], -1), "time": inputs["time"]}
    whole.build({key: value.shape for key, value in joined.items()})
    whole.set_weights(network.get_weights())
    np.testing.assert_allclose(run(whole, joined), run(network, inputs), atol=1e-6)


@pytest.mark.parametrize("highest", [1.0, 0.5])
def test_the_noise_beside_is_a_formula(highest):
    """In training a level an example, by the counters alone, and so the same on every backend; else the level given."""
    layer = low(max_level=highest, dropout=0.4, embedding=SinusoidalEmbedding(6, scale=1000.0))
    rng = np.random.default_rng(1)
    x, image = (rng.standard_normal(shape).astype("float32") for shape in ((40, 2, 2, 1), (40, 4, 4, 3)))
    blocks.base.build_layer(layer, x.shape, (None, 6), image=image.shape)
    for call in range(2):
        key = np.array([3, call], "int32")
        level = highest * numpy(random.uniform(random.fold_in(key, 0, LEVELS), (40,)))
        assert np.ptp(level) > 0.8 * highest
        assert level.max() < highest
        dropped = numpy(random.uniform(random.fold_in(key, 0, blocks.conditions.DROPPING), (40,))) < 0.4
        kept = numpy(resized(np.where(dropped[:, None, None, None], 0, x), (4, 4)))
        noise = random.normal(random.fold_in(key, 0, AUGMENTING), (40, 4, 4, 1))
        y = layer({"image": x}, image=image, training=True)
        expected = layer.noise(ops.convert_to_tensor(kept), noise, ops.convert_to_tensor(level))
        np.testing.assert_allclose(numpy(y.map), numpy(expected), atol=1e-5)
        np.testing.assert_allclose(numpy(y.vector), numpy(layer.level_embedding(level)), atol=1e-5)
    y = layer({"image": x, "level": np.full(40, 0.7, "float32")}, image=image, training=False)
    expected = numpy(layer.level_embedding(np.full(40, 0.7, "float32")))
    np.testing.assert_allclose(numpy(y.vector), expected, atol=1e-5)
    again = layer({"image": x, "level": np.full(40, 0.7, "float32")}, image=image)
    np.testing.assert_array_equal(numpy(again.map), numpy(y.map))
    assert not np.allclose(numpy(layer({"image": x}, image=image).vector), expected)


@pytest.mark.parametrize("policy", mostly_once(["mixed_bfloat16", "float32"]))
def test_super_resolution_in_a_model(policy):
    network = UNet.residual(8, 1, 1, conditions={"low": low(dropout=0.2, dtype=policy)}, dtype=policy)
    model = DiffusionModel(network)
    model.compile("adam")
    rng = np.random.default_rng(0)
    data = {"image": rng.uniform(-1, 1, (4, 4, 4, 1)).astype("float32")}
    data["low"] = data["image"].reshape(4, 2, 2, 2, 2, 1).mean((2, 4))
    assert np.isfinite(model.fit(data, batch_size=2, verbose=0).history["loss"]).all()
    perturb(network)
    options = {"low": data["low"][:2], "steps": 2}
    y = model.sample(2, **options)
    assert y.shape == (2, 4, 4, 1)
    np.testing.assert_allclose(model.sample(2, **options, low_level=0.3), y, atol=1e-2 if policy != "float32" else 1e-5)
    assert np.abs(model.sample(2, **options, low_level=[0.0, 1.0]) - y).max() > 1e-3
    assert np.abs(model.sample(2, **options, guidance=3.0) - y).max() > 1e-4
    assert np.isfinite(model.sample(2, low=None, steps=1)).all()
    with pytest.raises(ValueError, match=r"a level must be a number in \[0, 1\]; received: "):
        model.sample(2, **options, low_level=5.0)
    with pytest.raises(ValueError, match=r"the conditions \['low', 'low_level', 'low_noise'\]; received: \['high'\]"):
        model.sample(2, **options, high=1)
    with pytest.raises(ValueError, match=r"must be floating-point, such as x / 127.5 - 1"):
        model.fit({**data, "low": (data["low"] * 100 + 100).astype("uint8")}, verbose=0)


# --- resizing


@pytest.mark.once
@pytest.mark.parametrize(("form", "filter"), [("bilinear", "BILINEAR"), ("bicubic", "BICUBIC"), ("nearest", "NEAREST")])
@pytest.mark.parametrize("size", [(3, 11), (13, 4), (6, 7), (12, 14)])
def test_resizing_is_pillows(form, filter, size):
    image = pytest.importorskip("PIL.Image")
    x = np.random.default_rng(0).standard_normal((6, 7)).astype("float32")
    expected = np.asarray(image.fromarray(x).resize(size[::-1], getattr(image.Resampling, filter)))
    np.testing.assert_allclose(numpy(resized(x[None, ..., None], size, form))[0, ..., 0], expected, atol=1e-5)


def test_resizing_by_formula():
    x = np.random.default_rng(0).standard_normal((2, 6, 8, 3)).astype("float32")
    blockwise = x.reshape(2, 3, 2, 2, 4, 3).mean((2, 4))
    np.testing.assert_allclose(numpy(resized(x, (3, 2), "area")), blockwise, atol=1e-6)
    aligned = numpy(resized(x, (11, 15), "aligned"))
    np.testing.assert_allclose(aligned[:, ::2, ::2], x, atol=1e-5)
    np.testing.assert_allclose(aligned[:, 1::2, ::2], (x[:, 1:] + x[:, :-1]) / 2, atol=1e-5)
    for form in FORMS:
        np.testing.assert_allclose(numpy(resized(np.ones((1, 5, 3)), (8,), form)), np.ones((1, 8, 3)), atol=1e-6)
        assert numpy(resized(x, (6, 8), form)).dtype == np.float32
    sharp, smooth = (numpy(resized(x, (3, 4), "bilinear", antialias)) for antialias in (False, True))
    np.testing.assert_allclose(sharp, blockwise_of_two(x), atol=1e-6)
    assert np.abs(sharp - smooth).max() > 0.01


def blockwise_of_two(x):
    """Half the size, bilinear without a filter: the mean of four neighbours."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


# --- several inputs, one condition


def test_joint_inputs_are_concatenated(tmp_path):
    waves, last = SinusoidalEmbedding(4), MLPEmbedding(keras.layers.Identity(), 32)
    network = UNet.residual(
        8, 2, 1, conditions={"added": Joint({"text_embeds": keras.layers.Identity(), "sizes": waves}, last)}
    )
    rng = np.random.default_rng(0)
    inputs = {
        "image": rng.standard_normal((2, 4, 4, 2)).astype("float32"),
        "time": np.array([1.0, 500.0], "float32"),
        "text_embeds": rng.standard_normal((2, 5)).astype("float32"),
        "sizes": np.array([[1, 2], [30, 4]], "float32"),
    }
    assert list(network.condition_inputs) == ["text_embeds", "sizes"]
    network.build({key: value.shape for key, value in inputs.items()})
    perturb(network)
    joint = network.conditions["added"]
    both = np.concatenate([inputs["text_embeds"], numpy(waves(inputs["sizes"])).reshape(2, 8)], -1)
    given = {key: inputs[key] for key in ("text_embeds", "sizes")}
    found, expected = (numpy(ops.stop_gradient(y)) for y in (joint(given), joint.layer(both)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    y = run(network, inputs)
    for key in given:
        assert np.abs(run(network, {**inputs, key: inputs[key] + 1}) - y).max() > 1e-4
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    np.testing.assert_allclose(run(loaded, inputs), y, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="'sizes' is missing"):
        network({key: value for key, value in inputs.items() if key != "sizes"})


@pytest.mark.once
def test_a_joint_condition_in_a_model():
    parts = {"vector": blocks.OptionalCondition(dropout=0.3), "number": SinusoidalEmbedding(4)}
    conditions = {"added": Joint(parts, MLPEmbedding(keras.layers.Identity(), 8))}
    network = MLP(8, 1, embedding=MLPEmbedding(SinusoidalEmbedding(4), 8), conditions=conditions)
    model = DiffusionModel(network, codec="identity")
    model.compile("adam")
    data = {"image": np.ones((4, 3), "float32"), "vector": np.ones((4, 2), "float32"), "number": np.arange(4.0)}
    assert np.isfinite(model.fit(data, batch_size=2, verbose=0).history["loss"]).all()
    assert np.isfinite(model.sample(2, vector=None, number=3.0, steps=2)).all()
    with pytest.raises(ValueError, match=r"missing: \['number'\]"):
        model.sample(2, vector=[1, 2])


# --- additions to a U-Net's skips and middle


@pytest.mark.parametrize("name", mostly_once(["unet", "ncsnpp"]))
def test_additions_to_skips_and_middle(name):
    network, inputs = with_maps(name)
    x = ops.convert_to_tensor(inputs["image"])
    time = network.embedding(inputs["time"])
    shapes, middle = shapes_of_skips(network, x, time)
    rng = np.random.default_rng(5)
    *skips, more = [rng.standard_normal(shape).astype("float32") for shape in (*shapes, middle)]
    y = run(network, inputs)
    compiled = Added(network)
    nothing = {**inputs, "skips": [0 * one for one in skips], "middle": 0 * more}
    np.testing.assert_allclose(run(compiled, nothing), y, atol=1e-6)
    assert np.abs(run(compiled, {**nothing, "middle": more}) - y).max() > 1e-4
    for i, skip in enumerate(skips):
        one = [skip if i == j else zero for j, zero in enumerate(nothing["skips"])]
        assert np.abs(run(compiled, {**nothing, "skips": one}) - y).max() > 1e-4, i
    with pytest.raises(ValueError, match=rf"`skips` must be {len(skips)} maps; received: 1"):
        network(inputs, skips=skips[:1])


def test_an_addition_is_added_where_it_says():
    """To the outputs of the way down once it is done, as a constant of each layer would not."""
    network, inputs = with_maps("unet")
    x, time = ops.convert_to_tensor(inputs["image"]), network.embedding(inputs["time"])
    kept = [network.stem(x)]
    for unit in network.down:
        kept.append(unit(kept[-1], embed=time, training=False))
    skips = [0.5 * ops.ones_like(one) for one in kept]
    x = network.bridge(kept[-1], embed=time, training=False) + 2
    for unit in network.up:
        x = unit(ops.concatenate([x, kept.pop() + 0.5], axis=-1), embed=time, training=False)
    expected = network.head(ops.silu(network.normalization(x)))
    y = network(inputs, training=False, skips=skips, middle=2 * ops.ones((1, 1, 1, 1)))
    np.testing.assert_allclose(numpy(ops.stop_gradient(y)), numpy(ops.stop_gradient(expected)), atol=1e-5)


def shapes_of_skips(network, x, time):
    shapes = [tuple(network.stem(x).shape)]
    for unit in network.down:
        shapes.append(blocks.base.output_shape(unit, shapes[-1], time.shape))
    return shapes, shapes[-1]


class Added(keras.Model):
    """A network that is given its additions among its inputs."""

    def __init__(self, network):
        super().__init__(autocast=False)
        self.network = network
        self.built = True

    def call(self, inputs, training=None):
        skips, middle = inputs["skips"], inputs["middle"]
        inputs = {name: value for name, value in inputs.items() if name not in ("skips", "middle")}
        return self.network(inputs, training=training, skips=skips, middle=middle)


# --- errors


@pytest.mark.once
def test_errors():
    shapes = {"image": (1, 4, 4, 2), "time": (1,)}
    cases = [
        (lambda: Concat("cubic"), r"Concat: `interpolation` must be one of \['nearest', .*received: 'cubic'"),
        (lambda: Concat(level=2), "Concat: `level`.*received: 2"),
        (lambda: Concat(max_level=2), "Concat: `max_level`.*received: 2"),
        (lambda: Joint({}, keras.layers.Identity()), "`parts` must be a non-empty mapping"),
        (
            lambda: SimpleUNet((8,), 8, 8, {"text": keras.layers.Dense(5)}).build({**shapes, "text": (1, 3, 2)}),
            "some conditions give tokens, but no layer attends",
        ),
        (
            lambda: SimpleUNet((8,), 8, 8, {"map": keras.layers.Identity()}).build({**shapes, "map": (1, 2, 2, 1)}),
            r"'map' must have the sizes of the image, \(1, 4, 4, 2\); it has the shape: \(1, 2, 2, 1\)",
        ),
        (
            lambda: MLP(8, 1, conditions={"map": keras.layers.Identity()}).build(
                {"image": (1, 2), "time": (1,), "map": (1, 2, 2, 1)}
            ),
            "MLP: the map of condition 'map' must have the sizes of the image",
        ),
        (
            lambda: MLP(8, 1, conditions={"odd": keras.layers.Identity()}).build(
                {"image": (1, 2), "time": (1,), "odd": (1, 2, 2, 1, 1)}
            ),
            r"or `Encoded`; received: \(1, 2, 2, 1, 1\)",
        ),
        (
            lambda: MLP(8, 1, conditions={"low": Concat()}).build({"image": (1, 2), "time": (1,), "low": (1, 2, 2, 1)}),
            r"Concat: both the image and x_t must be.*\(1, 2, 2, 1\) and \(1, 2\)",
        ),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()
    with pytest.raises(TypeError, match="`noise` must be None or a layer"):
        Concat(noise="cosine")
