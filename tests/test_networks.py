import re

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import blocks
from kdiff.networks import MLP, Hybrid, Level, NCSNpp, SimpleUNet, UNet
from tests.helpers_gradients import perturb, run, value_and_gradients
from tests.toys import mostly_once

SMALL = {"width": 8, "levels": 2, "depth": 1}
VARIANTS = {
    "basic": lambda: UNet.basic(**SMALL),
    "residual": lambda: UNet.residual(
        **SMALL, dropout=0.1, scale_shift=False, conditions={"label": blocks.LabelEmbedding(3, dropout=0.5)}, seed=4
    ),
    "attention": lambda: UNet.attention(
        8, 2, 1, multipliers=(1, 1), at=(0, 1), head_width=4, out_channels=3, downsample=blocks.Downsample("average")
    ),
    "transformer": lambda: UNet.transformer(
        **SMALL,
        heads=2,
        ratio=2,
        adaptive=True,
        upsample=blocks.Upsample("bilinear"),
        conditions={
            "label": keras.layers.Embedding(3, 32),
            "words": blocks.LearnedEmbedding(7, width=5),
            "clip": keras.layers.Dense(5),
        },
    ),
    "levels": lambda: UNet(
        [Level(8, 1), Level(6, 1, "conv_block", "self_attention")],
        middle=Level(10, 1, mixer=blocks.FeedForward()),
        embedding=blocks.MLPEmbedding(blocks.FourierEmbedding(8, scale=0.01), 12),
        normalization="layer_norm",
        activation="relu",
        out_channels=1,
    ),
}


def arrays(network, size=(4, 8), batch=2):
    rng = np.random.default_rng(0)
    conditions = {
        "label": np.arange(batch, dtype="int32") % 3,
        "words": np.arange(4 * batch, dtype="int32").reshape(batch, 4) % 7,
        "clip": rng.standard_normal((batch, 3, 9)).astype("float32"),
    }
    return {
        "image": rng.standard_normal((batch, *size, 2)).astype("float32"),
        "time": np.linspace(1, 999, batch).astype("float32"),
        **{name: conditions[name] for name in network.conditions},
    }


@pytest.fixture(scope="module", params=mostly_once(VARIANTS, ("transformer", "levels")))
def perturbed(request):
    """A network with every weight perturbed, inputs, its output and the gradients of its weights."""
    network = VARIANTS[request.param]()
    inputs = arrays(network)
    network.build({name: (None, *value.shape[1:]) for name, value in inputs.items()})
    assert np.all(ops.convert_to_numpy(network.head.kernel) == 0)
    perturb(network)
    return network, inputs, *value_and_gradients(network, inputs)


def test_shape(perturbed):
    network, _, y, _ = perturbed
    assert y.shape == (2, 4, 8, network.out_channels or 2)
    assert np.isfinite(y).all()


def test_a_gradient_reaches_every_weight(perturbed):
    for path, gradient in perturbed[3].items():
        if not path.endswith("key/bias"):
            assert np.abs(gradient).max() > 1e-7, path


def test_save_and_load(tmp_path):
    network = VARIANTS["residual"]()
    inputs = arrays(network)
    network.build({name: value.shape for name, value in inputs.items()})
    perturb(network)
    y = run(network, inputs)
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    assert repr(loaded) == repr(network)
    np.testing.assert_allclose(run(loaded, inputs), y, rtol=1e-5, atol=1e-5)


@keras.saving.register_keras_serializable("tests")
class Holder(keras.Model):
    """A model that holds a network, as a diffusion model does."""

    def __init__(self, network, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.network = network

    def build(self, input_shape):
        if not self.network.built:
            self.network.build(input_shape)

    def call(self, inputs, training=None):
        return self.network(inputs, training=training)

    def get_config(self):
        return {**super().get_config(), "network": keras.saving.serialize_keras_object(self.network)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("network")), **config)


@pytest.mark.once
def test_save_and_load_in_a_model(perturbed, tmp_path):
    network, inputs, y, _ = perturbed
    holder = Holder(network)
    holder.build({name: (None, *value.shape[1:]) for name, value in inputs.items()})
    holder.save(tmp_path / "holder.keras")
    loaded = keras.saving.load_model(tmp_path / "holder.keras")
    np.testing.assert_allclose(run(loaded, inputs), y, rtol=1e-5, atol=1e-5)


def test_mixed_precision(perturbed):
    network, inputs, y, _ = perturbed
    lower = network.clone(dtype="mixed_bfloat16")
    lower.build({name: value.shape for name, value in inputs.items()})
    lower.set_weights(network.get_weights())
    output = run(lower, inputs)
    assert np.abs(output - y).max() < 0.1 * max(1, np.abs(y).max())
    assert {layer.compute_dtype for chain in lower.down for layer in chain.layers} == {"bfloat16"}
    assert keras.backend.standardize_dtype(lower.compute_output_spec(_symbols(inputs)).dtype) == "float32"


def _symbols(inputs):
    return {name: keras.KerasTensor(value.shape, value.dtype) for name, value in inputs.items()}


def test_any_size_that_fits_once_built():
    network = VARIANTS["attention"]()
    network.build({"image": (None, 4, 8, 2), "time": (None,)})
    assert run(network, arrays(network, (8, 12), 1)).shape[:3] == (1, 8, 12)


def test_in_a_functional_model():
    network = UNet.basic(**SMALL)
    inputs = {"image": keras.Input((None, None, 3)), "time": keras.Input(())}
    model = keras.Model(inputs, keras.layers.Rescaling(2.0)(network(inputs)))
    assert model.output_shape == (None, None, None, 3)


def test_fit():
    network = UNet.residual(**SMALL, dropout=0.1, conditions={"label": blocks.LabelEmbedding(3, dropout=0.5)})
    inputs = arrays(network)
    network.compile("sgd", "mse", jit_compile=keras.backend.backend() == "jax")
    losses = network.fit(inputs, np.ones_like(inputs["image"]), epochs=2, verbose=0).history["loss"]
    assert losses[0] == pytest.approx(1, abs=1e-6)  # the last convolution is zero at first
    assert losses[1] < losses[0]


def test_copies_have_weights_and_random_numbers_of_their_own():
    network = UNet.residual(8, 2, 2, dropout=0.5)
    copies = [layer for chain in (*network.down, network.bridge, *network.up) for layer in chain.layers]
    seeds = [layer.seed for layer in copies if isinstance(layer, blocks.ResidualBlock)]
    assert len(seeds) == len(set(seeds)) == 2 * 2 + 2 + 2 * 3
    assert seeds == [
        layer.seed
        for chain in (lambda n: (*n.down, n.bridge, *n.up))(UNet.from_config(network.get_config()))
        for layer in chain.layers
        if isinstance(layer, blocks.ResidualBlock)
    ]
    assert len({id(layer) for layer in copies}) == len(copies)
    assert not network.levels[0].block.built


class Scaled(blocks.Block):
    """The smallest block of a user's own: a 1x1 convolution, times one plus a number from the embedding."""

    def __init__(self, width=None, **kwargs):
        super().__init__(**kwargs)
        self.width = width

    def build(self, x_shape, embed_shape):
        self.dense = keras.layers.Dense(self.width or x_shape[-1])
        self.scale = keras.layers.Dense(1)
        self.dense.build(x_shape)
        self.scale.build(embed_shape)

    def call(self, x, embed=None, context=None, training=None):
        return self.dense(x) * (1 + self.scale(embed)[:, None, None])


class Lazy(keras.layers.Layer):
    """A layer that knows nothing of kdiff and has no `build`."""

    def __init__(self, width=None, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.dense = keras.layers.Dense(width)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return {**super().get_config(), "width": self.width}


@pytest.mark.parametrize("block", [Scaled(), "scaled", Lazy(1)])
def test_blocks_of_ones_own(block, tmp_path):
    network = UNet([Level(4, 1, block, keras.layers.SpatialDropout2D(0.1)), Level(6, 1, block)])
    inputs = arrays(network)
    network.build({name: value.shape for name, value in inputs.items()})
    perturb(network)
    y = run(network, inputs)
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras", custom_objects={"Lazy": Lazy})
    np.testing.assert_allclose(run(loaded, inputs), y, rtol=1e-5, atol=1e-5)


def test_conditions_are_seen():
    network = VARIANTS["transformer"]()
    inputs = arrays(network)
    network.build({name: value.shape for name, value in inputs.items()})
    perturb(network)
    y = run(network, inputs)
    changes = {"label": np.array([2, 2], "int32"), "words": inputs["words"][:, ::-1][:, :3], "clip": inputs["clip"] + 1}
    for name, value in {**changes, "time": inputs["time"] / 2}.items():
        assert np.abs(run(network, {**inputs, name: np.ascontiguousarray(value)}) - y).max() > 1e-4, name


@pytest.mark.once
def test_errors_of_the_input():
    network = UNet.basic(8, 3, 1, conditions={"label": blocks.LabelEmbedding(3)}, name="net")
    good = arrays(network, (8, 8))

    def image(*shape):
        return {**good, "image": np.zeros(shape, "float32")}

    cases = [
        ({k: v for k, v in good.items() if k != "label"}, "net: the input 'label' is missing"),
        ({k: v for k, v in good.items() if k != "time"}, "the input 'time' is missing"),
        ({**good, "lable": good["label"]}, r"'lable' is unknown; `conditions` are: \['label'\]"),
        ({**good, "label": good["label"][:1]}, "'label' must have the batch size of the image, 2"),
        (image(2, 8), r"\(batch, height, width, channels\).*received: \(2, 8\)"),
        (image(2, 8, 10, 1), "3 levels need a width divisible by 4; received: 10. The nearest that fit: 8 or 12"),
        (image(2, 2, 8, 1), "a height divisible by 4; received: 2. The nearest that fit: 4"),
    ]
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            network(inputs)
    assert network.compute_output_spec(_symbols(good)).shape == (2, 8, 8, 2)
    assert tuple(network.conditions) == ("label",)


@pytest.mark.once
def test_errors_of_arguments():
    cases = [
        (lambda: UNet([]), "`levels` must be at least one `Level`"),
        (lambda: UNet(3), r"list of `Level`s; received: 3.*UNet.residual\(width=64, levels=3\)"),
        (lambda: NCSNpp(3), "NCSNpp: `levels` must be a list of `Level`s; received: 3"),
        (lambda: Hybrid(3), "Hybrid: `levels` must be a list of `Level`s; received: 3"),
        (lambda: NCSNpp(3.0), "NCSNpp: `levels` must be at least one `Level`; received: 3.0"),
        (lambda: SimpleUNet(64), r"SimpleUNet: `widths` must be one width per level.*received: 64"),
        (lambda: UNet([Level(8, mixer=keras.layers.MultiHeadAttention(2, 4))]), r"SelfAttention\(heads=2\)"),
        (lambda: UNet.basic(levels=0), "`levels`.*received: 0"),
        (lambda: UNet.basic(multipliers=(1, 2)), "`multipliers` must be 3 numbers"),
        (lambda: UNet.attention(at=(3,)), r"`at` must be within -3 \.\.\. 2; received: 3"),
        (lambda: Level(0), "Level: `width`"),
        (lambda: Level(8, -1), "Level: `depth`"),
        (lambda: Hybrid([Level(8, 0)]), "Hybrid: each of `levels` must have a `depth` of at least 1"),
        (lambda: UNet([Level(8, block="layer_norm")]), "must have an argument `width`"),
        (lambda: UNet.basic(out_channels=0), "`out_channels`"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()
    with pytest.raises(TypeError, match=r"\['block'\] are fixed for this kind.*UNet.composed"):
        UNet.residual(8, block=blocks.ConvBlock())


@pytest.mark.once
def test_errors_of_condition_layers():
    for network in (lambda **options: UNet.basic(8, 1, 1, **options), lambda **options: MLP(8, 1, **options)):
        for wrong in (["label"], {"label": 10}, "label"):
            with pytest.raises(TypeError, match=f"`conditions` must map names to layers.*{re.escape(repr(wrong))}"):
                network(conditions=wrong)
    narrow = UNet.basic(**SMALL, conditions={"label": blocks.LabelEmbedding(3, width=5)})
    with pytest.raises(ValueError, match=r"condition 'label' must return \(batch, 32\)"):
        narrow(arrays(narrow))
    layers = {"words": blocks.LearnedEmbedding(7, width=5), "clip": keras.layers.Dense(6)}
    uneven = UNet.basic(**SMALL, conditions=layers)
    with pytest.raises(ValueError, match="must have one width"):
        uneven(arrays(uneven))


@pytest.mark.once
def test_levels_compare_by_value():
    level = Level(8, 1, mixer="self_attention")
    assert Level.from_config(level.get_config()) == level
    assert level != Level(8, 2, mixer="self_attention")
