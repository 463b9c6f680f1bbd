"""What holds for every network: shapes, gradients, files, precisions, remat, counts; and the published sizes."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import DiffusionModel, blocks, networks
from kdiff.networks import MLP, DiT, Hybrid, Level, MMDiT, PriorTransformer, UNet, UViT
from tests.helpers_gradients import perturb, run, value_and_gradients
from tests.toys import mostly_once


def label():
    return {"label": blocks.LabelEmbedding(3, dropout=0.5)}


NETWORKS = {
    "unet": (lambda: UNet.residual(8, 2, 1, dropout=0.2, conditions=label()), (8, 8, 2)),
    "dit": (
        lambda: DiT(16, 2, 2, blocks.TransformerBlock(2, adaptive=True, gated=True, dropout=0.2), conditions=label()),
        (8, 4, 2),
    ),
    "dit_local": (
        lambda: DiT(
            16,
            3,
            1,
            [
                blocks.TransformerBlock(2, adaptive=True, pattern=blocks.Window(2, 1)),
                blocks.TransformerBlock(2, adaptive=True, pattern=blocks.Neighborhood(3), qk_norm="rms_norm"),
            ],
            out_channels=4,
        ),
        (4, 4, 2),
    ),
    "dit_rotary": (
        lambda: DiT(
            16,
            1,
            2,
            networks.adaptive_block(2, rotary="rotary", glu=True, activation="silu", drop_path=0.2),
            positions=None,
            conditions={"text": keras.layers.Dense(5)},
        ),
        (4, 4, 2),
    ),
    "dit_separate": (
        lambda: DiT(16, 3, 2, networks.adaptive_block(2), conditions=label(), separate=True),
        (4, 4, 2),
    ),
    "dit_sequence": (
        lambda: DiT(16, 1, 2, networks.adaptive_block(2), positions="learned_embedding"),
        (8, 2),
    ),
    "mmdit": (
        lambda: MMDiT(
            16,
            2,
            2,
            networks.adaptive_block(2, qk_norm="rms_norm", dropout=0.2),
            dual=(0,),
            positions=blocks.PositionTable(3),
            conditions={**label(), "text": keras.layers.Dense(5)},
        ),
        (4, 6, 2),
    ),
    "uvit": (
        lambda: UViT(
            16, 3, 2, conditions={**label(), "text": keras.layers.Dense(16)}, block=blocks.TransformerBlock(2)
        ),
        (4, 4, 2),
    ),
    "hybrid": (
        lambda: Hybrid.composed(
            (8, 16, 16), (1, 1, 2), pattern=blocks.Neighborhood(3), head_width=8, conditions=label()
        ),
        (12, 12, 2),
    ),
    "hybrid_windows": (
        lambda: Hybrid.composed((8, 8), (1, 1), 0, blocks.Window(4), head_width=4, dropout=0.2),
        (8, 8, 2),
    ),
    "mlp": (lambda: MLP(16, 2, conditions=label()), (2,)),
    "prior": (
        lambda: PriorTransformer(16, 2, conditions={**label(), "text": keras.layers.Identity()}),
        (2,),
    ),
}


def shapes(network, shape):
    conditions = {"label": (), "text": (3, 7)}
    return {"image": shape, "time": (), **{name: conditions[name] for name in network.conditions}}


def arrays(network, shape, batch=2):
    rng = np.random.default_rng(0)
    made = {
        name: rng.standard_normal((batch, *size)).astype("float32") for name, size in shapes(network, shape).items()
    }
    made["time"] = np.linspace(1, 999, batch).astype("float32")
    return made | ({"label": np.arange(batch, dtype="int32") % 3} if "label" in made else {})


def made(name):
    """A network with every weight perturbed, and inputs."""
    make, shape = NETWORKS[name]
    network = make()
    inputs = arrays(network, shape)
    network.build({key: (None, *value.shape[1:]) for key, value in inputs.items()})
    return network, inputs


@pytest.fixture(
    scope="module",
    params=mostly_once(NETWORKS, ("dit_local", "dit_rotary", "mmdit", "uvit", "hybrid", "mlp", "prior")),
)
def perturbed(request):
    network, inputs = made(request.param)
    zero = run(network, inputs)
    perturb(network)
    return network, inputs, zero, *value_and_gradients(network, inputs)


def test_shape(perturbed):
    network, inputs, zero, y, _ = perturbed
    assert y.shape == (*inputs["image"].shape[:-1], network.out_channels or 2)
    assert network.compute_output_spec({k: keras.KerasTensor(v.shape) for k, v in inputs.items()}).shape == y.shape
    assert np.all(zero == 0)
    assert np.isfinite(y).all()
    assert np.ptp(y) > 0


def test_a_gradient_reaches_every_weight(perturbed):
    for path, gradient in perturbed[4].items():
        unseen = "text_attention/query" in path  # of the last block of an MMDiT, which gives no text
        if not unseen and not path.endswith("key/bias"):  # a constant in every logit
            assert np.abs(gradient).max() > 1e-7, path


def test_every_input_is_seen(perturbed):
    network, inputs, _, y, _ = perturbed
    for name, value in inputs.items():
        other = (value + 1) % 3 if name == "label" else value * 0.5
        assert np.abs(run(network, {**inputs, name: other}) - y).max() > 1e-5, name


def test_save_and_load(perturbed, tmp_path):
    network, inputs, _, y, _ = perturbed
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    assert repr(loaded) == repr(network)
    np.testing.assert_allclose(run(loaded, inputs), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", mostly_once(["mixed_float16", "mixed_bfloat16"]))
def test_mixed_precision(perturbed, policy):
    network, inputs, _, y, _ = perturbed
    lower = network.clone(dtype=policy)
    lower.build({name: value.shape for name, value in inputs.items()})
    lower.set_weights(network.get_weights())
    output = run(lower, inputs)
    symbols = {name: keras.KerasTensor(value.shape, value.dtype) for name, value in inputs.items()}
    assert keras.Operation.compute_output_spec(lower, symbols).dtype == "float32"
    assert np.abs(output - y).max() < 0.1 * max(1, np.abs(y).max())


def trained(name, remat, steps=3):
    """The losses of some steps."""
    make, shape = TRAINED[name]
    keras.utils.set_random_seed(1)
    network = make().clone(remat=remat)
    inputs = arrays(network, shape, 4)
    network.build({key: (None, *value.shape[1:]) for key, value in inputs.items()})
    perturb(network)
    network.compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=keras.backend.backend() == "jax")
    target = np.ones((*inputs["image"].shape[:-1], network.out_channels or 2), "float32")
    return network.fit(inputs, target, batch_size=2, epochs=steps, shuffle=False, verbose=0).history["loss"]


TRAINED = {  # no larger than it takes: remat is of each of the layers
    "unet": (lambda: UNet.residual(8, 1, 1, dropout=0.2, conditions=label()), (8, 8, 2)),
    "dit": (lambda: NETWORKS["dit"][0]().clone(depth=1), (8, 4, 2)),
    "uvit": NETWORKS["uvit"],
    "mlp": NETWORKS["mlp"],
}


@pytest.mark.parametrize("name", mostly_once(TRAINED, ("unet", "dit")))
def test_remat_changes_nothing_but_memory(name):
    """Not the random numbers of dropout either, whose second pass must drop the same."""
    np.testing.assert_allclose(trained(name, True), trained(name, False), rtol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize(("width", "heads"), [(96, 1), (384, 6), (1152, 18), (200, 2)])
def test_any_width_has_heads(width, heads):
    assert DiT(width, 1).block.heads == UViT(width, 1).block.heads == heads
    assert networks.parameters(DiT(width, 1), (8, 8, 2)) > 18 * width**2


RANKS = {
    "unet": lambda: UNet.attention(8, 2, 1),
    "simple": lambda: networks.SimpleUNet((8,), 8, 8),
    "convnext": lambda: UNet.composed(blocks.ConvNeXtBlock(kernel_size=3, ratio=2), None, 8, 2, 1),
    "dit": lambda: DiT(12, 1, 2, blocks.TransformerBlock(pattern=blocks.Window(2, 1), adaptive=True)),
    "uvit": lambda: UViT(12, 1, 2),
    "hybrid": lambda: Hybrid.composed((12, 12), (1, 1), 0, blocks.Neighborhood(3), head_width=6),
}


@pytest.mark.parametrize("name", RANKS)
def test_series_and_volumes(name):
    """The same classes take them, with all kinds of layers."""
    for sizes in ((8,), (4, 4, 4)):
        network = RANKS[name]()
        x, time = np.random.default_rng(0).normal(size=(2, *sizes, 2)).astype("float32"), np.ones(2, "float32")
        network.build({"image": x.shape, "time": (2,)})
        perturb(network)
        y = run(network, {"image": x, "time": time})
        assert y.shape == x.shape
        assert 1e-3 < np.abs(y).max() < 1e3


def test_series_whose_lengths_vary():
    """From batch to batch, in training and in sampling."""
    model = DiffusionModel(UNet.residual(8, 1, 1), codec="standard", ema=None)
    model.build((None, None, 3))
    model.compile("sgd")
    losses = [model.train_on_batch(np.random.default_rng(0).normal(size=(2, n, 3)).astype("float32")) for n in (8, 12)]
    assert np.isfinite(losses).all()
    assert model.sample(2, size=(16,), steps=1).shape == (2, 16, 3)


@pytest.mark.once
def test_trains_in_a_diffusion_model():
    network = TRAINED["dit"][0]()
    model = DiffusionModel(network, schedule="cosine", prediction="velocity")
    model.compile("adam")
    inputs = {"image": np.zeros((4, 8, 4, 2), "float32"), "label": np.arange(4) % 3}
    assert np.isfinite(model.fit(inputs, batch_size=2, epochs=1, verbose=0).history["loss"]).all()
    assert model.sample(2, label=[0, 1], steps=2).shape == (2, 8, 4, 2)


class Twice(blocks.Block):
    """A user's block, for tokens and maps: a dense layer, steered, as a residual."""

    def __init__(self, width=None, **kwargs):
        super().__init__(**kwargs)
        self.width = width

    def build(self, x_shape, embed_shape=None):
        self.dense = keras.layers.Dense(x_shape[-1] if self.width is None else self.width)
        self.dense.build(x_shape)
        if embed_shape is not None:
            self.scale = keras.layers.Dense(1)
            self.scale.build(embed_shape)

    def call(self, x, embed=None, context=None, training=None):
        y = self.dense(x)
        scale = 1 if embed is None else ops.reshape(self.scale(embed), (-1, *[1] * (len(x.shape) - 1)))
        return (x if self.width is None else 0) + y * scale


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda: UNet([Level(8, 1, Twice()), Level(8, 1, "residual_block", Twice())]), (8, 8, 2)),
        (lambda: DiT(16, 2, block=[Twice(), blocks.TransformerBlock(2)]), (8, 8, 2)),
        (lambda: UViT(16, 3, block=Twice()), (8, 8, 2)),
        (lambda: Hybrid([Level(8, 1, Twice()), Level(16, 1, Twice(), blocks.SelfAttention())]), (8, 8, 2)),
        (lambda: MLP(16, 2, Twice()), (2,)),
    ],
)
def test_blocks_of_ones_own(network, shape, tmp_path):
    network = network()
    inputs = arrays(network, shape)
    network.build({name: value.shape for name, value in inputs.items()})
    perturb(network)
    y = run(network, inputs)
    network.save(tmp_path / "network.keras")
    np.testing.assert_allclose(
        run(keras.saving.load_model(tmp_path / "network.keras"), inputs), y, rtol=1e-5, atol=1e-5
    )


# The papers' tables. DiT's counts, and its authors', hold the fixed positions, which are no weight here.
PUBLISHED = [
    ("DiT-S/2", lambda: DiT.s(2), (32, 32, 4), 33.0, 6.06),
    ("DiT-B/2", lambda: DiT.b(2), (32, 32, 4), 130.5, 23.01),
    ("DiT-L/2", lambda: DiT.l(2), (32, 32, 4), 458.1, 80.71),
    ("DiT-XL/2", lambda: DiT.xl(2), (32, 32, 4), 675.1, 118.64),
    ("DiT-XL/4", lambda: DiT.xl(4), (32, 32, 4), None, 29.05),
    ("DiT-XL/8", lambda: DiT.xl(8), (32, 32, 4), None, 7.39),
]


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "make", "shape", "millions", "billions"), PUBLISHED, ids=[row[0] for row in PUBLISHED]
)
def test_published_sizes_of_dit(name, make, shape, millions, billions):
    network = make()
    if millions:
        positions = (shape[0] // network.patch) * (shape[1] // network.patch) * network.width
        assert round((networks.parameters(network, shape) + positions) / 1e6, 1) == millions
    assert networks.flops(network, shape) / 1e9 == pytest.approx(billions, rel=0.002)
    assert not network.built


# Bao et al. (2022), table 1.
@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "shape", "millions"),
    [
        (lambda: UViT.s(2), (32, 32, 3), 44),
        (lambda: UViT.m(4, conditions={"label": blocks.LabelEmbedding(1000, 768, dropout=0.1)}), (64, 64, 3), 131),
        (lambda: UViT.l(2, conditions={"label": blocks.LabelEmbedding(1000, 1024, dropout=0.1)}), (32, 32, 4), 287),
        (lambda: UViT.h(2, conditions={"label": blocks.LabelEmbedding(1000, 1152, dropout=0.1)}), (32, 32, 4), 501),
    ],
    ids=["S", "M", "L", "H"],
)
def test_published_sizes_of_u_vit(make, shape, millions):
    assert round(networks.parameters(make(), shape) / 1e6) == millions


@pytest.mark.once
def test_counts_agree_with_the_weights(perturbed):
    network, inputs, *_ = perturbed
    sizes = {name: value.shape[1:] for name, value in inputs.items() if name != "time"}
    shape = sizes.pop("image")
    assert networks.parameters(network, shape, **sizes) == sum(
        np.prod(weight.shape, dtype=int) for weight in network.weights
    )
    assert networks.flops(network, shape, **sizes) > 0


@pytest.mark.once
def test_flops_by_hand():
    """Every layer that the count knows, one at a time, against the number of multiplications in its formula."""
    x = keras.Input((6, 4, 3), name="image")
    cases = [
        (keras.layers.Dense(5), 6 * 4 * 3 * 5),
        (keras.layers.Conv2D(5, 3, padding="same"), 6 * 4 * 9 * 3 * 5),
        (keras.layers.Conv2D(6, 3, strides=2, padding="same", groups=3), 3 * 2 * 9 * 1 * 6),
        (keras.layers.DepthwiseConv2D(3, padding="same"), 6 * 4 * 9 * 3),
        (blocks.DepthwiseConv2D(3, depth_multiplier=2, padding="same"), 6 * 4 * 9 * 3 * 2),
        (keras.layers.Conv2DTranspose(5, 4, 2, padding="same"), 6 * 4 * 16 * 3 * 5),
        (keras.layers.EinsumDense("bhwc,cnd->bhwnd", (6, 4, 2, 5)), 6 * 4 * 3 * 2 * 5),
        (keras.layers.Activation("silu"), 0),
        (blocks.MultiHeadAttention(1), 4 * 24 * 9 + 2 * 24 * 24 * 3),
    ]
    for layer, count in cases:
        time = keras.Input((), name="time")
        network = keras.Model({"image": x, "time": time}, layer(x))
        assert networks.flops(network, (6, 4, 3)) == count, layer
    tokens = keras.layers.Reshape((24, 3))(x)
    attention = keras.layers.MultiHeadAttention(2, 5)(tokens, tokens)
    network = keras.Model({"image": x, "time": keras.Input((), name="time")}, attention)
    assert networks.flops(network, (6, 4, 3)) == 4 * 24 * 3 * 2 * 5 + 24 * 24 * 2 * (5 + 5)


@pytest.mark.once
def test_summary(capsys):
    networks.summary(UNet.basic(8, 2, 1, conditions=label()), (8, 8, 3))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[2:]][:4] == ["time", "label", "stem", "down_0"]
    assert printed[-1].startswith("total")


@pytest.mark.once
def test_unknown_kernels_are_named():
    class Odd(keras.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], shape[-1]))

        def call(self, x):
            return ops.matmul(x, self.kernel)

    image = keras.Input((4, 4, 2), name="image")
    network = keras.Model({"image": image, "time": keras.Input((), name="time")}, Odd()(image))
    with pytest.warns(UserWarning, match="Odd"):
        networks.flops(network, (4, 4, 2))


@pytest.mark.once
def test_errors():
    cases = [
        (
            lambda: DiT(16, 1, 3).build({"image": (1, 8, 8, 2), "time": (1,)}),
            "patches of 3 need a height divisible by 3",
        ),
        (lambda: UViT(16, 4), "`depth` must be odd"),
        (
            lambda: UViT(16, 3, conditions={"label": keras.layers.Embedding(3, 8)}).build(
                {"image": (1, 8, 8, 2), "time": (1,), "label": (1,)}
            ),
            "the width of the network",
        ),
        (lambda: UViT(16, 3).build({"image": (1, None, 8, 2), "time": (1,)}), "must be known"),
        (lambda: Hybrid([]), "`levels` must be at least one"),
        (lambda: Hybrid.composed((8, 8), (1,)), "must have the same length"),
        (lambda: MLP(0), "MLP: `width`"),
        (lambda: MLP().build({"image": (1, 8, 8, 2), "time": (1,)}), r"\(batch, channels\)"),
        (lambda: networks.flops(keras.Sequential([keras.layers.Dense(2)]), (2,)), "must be built"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()
