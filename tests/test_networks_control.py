"""ControlNets: at first nothing changes, then they alone learn, and the pictures steer."""

import keras
import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import blocks, control, lora
from kdiff.guidance import ClassifierFree, Control
from kdiff.networks import Controlled, ControlNet, Hint, UNet
from tests.toys import draw_weights, mostly_once, numpy

pytestmark = pytest.mark.eager

RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, (4, 8, 8, 2)).astype("float32")
EDGES = RNG.uniform(-1, 1, (4, 8, 8, 3)).astype("float32")
LABEL = np.int32([0, 1, 2, 0])
TEXT = RNG.integers(1, 20, (4, 5)).astype("int32") * np.int32([1, 1, 1, 0, 0])  # the rest is hidden by a mask
DATA = {"image": X, "label": LABEL, "text": TEXT}
ASKED = {"label": 1, "text": TEXT[0], "steps": 2}


def conditions():
    text = blocks.TextEncoder(kdiff.text.Bytes(5), 8, depth=1, masked=True, dropout=0.1)
    return {"label": blocks.LabelEmbedding(3, dropout=0.1), "text": text, "beside": blocks.Concat()}


def model_of(ema=0.9, dtype=None):
    """A U-Net with a vector, tokens with a mask and a map, of which a control has the first alone."""
    network = UNet.transformer(4, levels=2, depth=1, heads=2, conditions=conditions(), dtype=dtype)
    model = kdiff.DiffusionModel(network, ema=ema)
    model.build({"image": X.shape, "label": (4,), "text": (4, 5), "beside": X.shape})
    draw_weights(network)
    model.reset_ema()
    return model


def with_control(model, draw=True, **names):
    names = names or {"edges": {}}
    made = {name: ControlNet.of(model.network, Hint((4,)), **options) for name, options in names.items()}
    control.add(model, **made)
    for i, one in enumerate(made.values()):
        if draw:
            draw_weights(one, seed=i + 5)
    model.reset_ema()
    return model


def sample(model, **options):
    return model.sample(2, **{**ASKED, "beside": X[0], **options})


def data(**more):
    return {**DATA, "beside": X, **more}


@pytest.mark.once
def test_a_new_control_changes_nothing():
    """To the last bit, whatever the picture; and has the weights of the U-Net."""
    model = model_of()
    before = sample(model)
    with_control(model, draw=False)
    np.testing.assert_array_equal(sample(model), before)
    np.testing.assert_array_equal(sample(model, edges=EDGES[0]), before)
    unet, copy = model.network.network, model.network.controls["edges"]
    assert list(copy.conditions) == ["label"]
    np.testing.assert_array_equal(numpy(copy.stem.kernel), numpy(unet.stem.kernel)[:, :, :2])
    for ours, theirs in (*zip(copy.down, unet.down, strict=True), (copy.bridge, unet.bridge)):
        for weight, other in zip(ours.weights, theirs.weights, strict=True):
            np.testing.assert_array_equal(numpy(weight), numpy(other))


@pytest.mark.parametrize("scale", mostly_once(["each", "one"]))
def test_the_maps_are_those_of_the_equations(scale):
    """Layer by layer, with the scale of each map and sample."""
    model = with_control(model_of())
    unet, one = model.network.network, model.network.controls["edges"]
    inputs = {"image": X, "time": np.float32([1, 300, 500, 900]), "label": LABEL, "text": TEXT, "beside": X}
    inputs = {name: ops.convert_to_tensor(value) for name, value in inputs.items()}
    _, encoded = unet.encoded(inputs)
    embed = one.embedding(inputs["time"]) + one.conditions["label"](inputs["label"])
    text = encoded["text"]
    context = blocks.Tokens(text.tokens, text.mask)
    kept = [one.stem(inputs["image"]) + one.hint(EDGES)]
    for unit in one.down:
        kept.append(unit(kept[-1], embed=embed, context=context))
    kept.append(one.bridge(kept[-1], embed=embed, context=context))
    shape = (4, len(kept)) if scale == "each" else (4,)
    numbers = RNG.uniform(-1, 2, shape).astype("float32")
    rows = np.broadcast_to(numbers.reshape(4, -1), (4, len(kept)))
    maps = [
        rows[:, i].reshape(4, 1, 1, 1) * numpy(ops.stop_gradient(layer(y)))
        for i, (layer, y) in enumerate(zip(one.outlets, kept, strict=True))
    ]
    *skips, middle = [ops.convert_to_tensor(y.astype("float32")) for y in maps]
    wanted = numpy(ops.stop_gradient(unet(inputs, training=False, skips=skips, middle=middle)))
    given = {**inputs, "edges": EDGES, "edges_scale": numbers}
    found = numpy(ops.stop_gradient(model.network(given, training=False)))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(found - numpy(ops.stop_gradient(unet(inputs, training=False)))).max() > 1e-2


@pytest.mark.parametrize("dtype", mostly_once(["float32", "mixed_bfloat16"]))
def test_only_the_control_learns_and_is_averaged(dtype, tmp_path):
    model = with_control(model_of(dtype=dtype), draw=False)
    unet, one = model.network.network, model.network.controls["edges"]
    before, at_first = [numpy(weight).copy() for weight in unet.weights], sample(model)
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(data(edges=EDGES), epochs=3, batch_size=4, verbose=0)
    for weight, value in zip(unet.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), value, err_msg=weight.path)
    np.testing.assert_array_equal(sample(model), at_first)
    assert {id(w) for w in model.trainable_variables} == {id(w) for w in one.trainable_variables}
    averages = [average for _, average in model.ema_weights.pairs(model.network)]
    assert len(averages) == len([weight for weight in one.weights if "float" in weight.dtype])
    assert all(np.abs(numpy(layer.kernel)).max() > 0 for layer in (*one.outlets, one.hint.last))
    steered = sample(model, edges=EDGES[0])
    assert np.abs(steered - at_first).max() > 1e-3
    np.testing.assert_array_equal(sample(model, edges=EDGES[0], edges_scale=0.0), at_first)

    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(sample(again, edges=EDGES[0]), steered)
    assert len(again.trainable_variables) == len(model.trainable_variables)
    assert len(again.ema_weights.values) == len(averages)
    assert again.fit(data(edges=EDGES), epochs=1, verbose=0).history["loss"][0] > 0


@pytest.mark.once
def test_several_controls():
    """What they give is added, and each has its own scale; another may come later, and the first stays."""
    model = with_control(model_of(), edges={}, depth={"remat": True})
    both = sample(model, edges=EDGES[0], depth=EDGES[1])
    alone = sample(model, edges=EDGES[0])
    np.testing.assert_allclose(sample(model, edges=EDGES[0], depth=EDGES[1], depth_scale=0.0), alone, atol=1e-5)
    assert np.abs(both - alone).max() > 1e-3
    with_control(model, draw=False, lines={})
    assert list(model.network.controls) == ["edges", "depth", "lines"]
    np.testing.assert_allclose(sample(model, edges=EDGES[0], lines=EDGES[2]), alone, atol=1e-6)


def test_removed_controls_leave_the_model_as_it_was(tmp_path):
    """Also after save and load: the U-Net is trained and averaged again; other controls stay."""
    model = model_of()
    free = [weight.path for weight in model.trainable_variables]
    before, averages = sample(model), len(model.ema_weights.values)
    with_control(model, edges={}, depth={})
    steered = sample(model, edges=EDGES[0])
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    control.remove(model, "depth")
    assert list(model.network.controls) == ["edges"]
    assert "depth" not in model.shapes
    np.testing.assert_allclose(sample(model, edges=EDGES[0]), steered, atol=1e-6)
    with pytest.raises(ValueError, match=r"no controls of the names \['depth'\], only \['edges'\]"):
        control.remove(model, "edges", "depth")
    lora.enable(model, 2)
    with pytest.raises(ValueError, match="the U-Net has LoRA"):
        control.remove(model)
    lora.remove(model)
    control.remove(model)
    assert isinstance(model.network, UNet)
    np.testing.assert_allclose(sample(model), before, atol=1e-6)
    assert [weight.path.split("/")[-1] for weight in model.trainable_variables] == [p.split("/")[-1] for p in free]
    assert len(model.ema_weights.values) == averages
    old = numpy(model.network.stem.kernel).copy()
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(data(), batch_size=4, verbose=0)
    assert not np.array_equal(numpy(model.network.stem.kernel), old)


@pytest.mark.once
def test_the_averages_that_there_were_are_the_frozen_weights():
    model = model_of()
    for average in model.ema_weights.values:
        average.assign(0.5 * numpy(average))
    model.ema_weights.updates.assign(1)
    before = sample(model)
    with_control(model, draw=False)
    np.testing.assert_allclose(sample(model, edges=EDGES[0]), before, atol=1e-6)
    assert not model.ema_weights.moved


@pytest.mark.once
def test_a_part_of_the_run():
    """Outside of it the scale is 0: with steps at t = 1 and 0.5, the first or the second alone."""
    model = with_control(model_of())
    sampler = kdiff.Sampler("ddim", "trailing", 2)
    times = sampler.times(model.schedule)
    np.testing.assert_allclose(times, [1, 0.5, 0])

    def run(*guidance, **options):
        return sample(
            model, sampler=sampler, **{"steps": None, "edges": EDGES[0], "guidance": list(guidance), **options}
        )

    plain, all_of_it = run(edges_scale=0.0), run()
    np.testing.assert_array_equal(run(Control("edges")), all_of_it)
    churned = {"sampler": kdiff.solvers.Euler(s_churn=0.5), "edges": EDGES[0]}  # begins above t = 1
    np.testing.assert_array_equal(sample(model, **churned, guidance=[Control("edges")]), sample(model, **churned))
    np.testing.assert_array_equal(run(Control("edges", 0.0)), plain)
    first = run(x=run(stop=0.5), start=0.5, edges_scale=0.0)
    second = run(x=run(stop=0.5, edges_scale=0.0), start=0.5)
    np.testing.assert_allclose(run(Control("edges", end=0.5)), first, atol=1e-5)
    np.testing.assert_allclose(run(Control("edges", begin=0.5)), second, atol=1e-5)
    assert np.abs(first - second).max() > 1e-2
    # One a sample, beside a scale among the inputs and under another guidance, which asks twice.
    free = ClassifierFree(2.0, drop=["label", "text"])
    mixed = run(Control("edges", [0.5, 0.0]), free, edges_scale=0.6)
    np.testing.assert_allclose(mixed[0], run(free, edges_scale=0.3)[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], run(free, edges_scale=0.0)[1], atol=1e-5)


@pytest.mark.once
def test_a_hint_of_a_larger_picture():
    """uint8 or floating point; the widths halve it, as convolutions with zeros on all sides do."""
    hint = Hint((3, 4, 5), 6)
    whole = RNG.integers(0, 256, (2, 16, 8, 3)).astype("uint8")
    hint.build(whole.shape)
    assert not numpy(hint(whole)).any()
    draw_weights(hint, scale=0.5)
    y = numpy(ops.stop_gradient(hint(whole)))
    assert y.shape == (2, 4, 2, 6) == hint.compute_output_shape(whole.shape)
    again = numpy(ops.stop_gradient(hint(whole / np.float32(127.5) - 1)))
    np.testing.assert_allclose(again, y, atol=1e-5 * np.abs(y).max())


@pytest.mark.once
def test_errors():
    model = model_of()
    one = ControlNet.of(model.network, Hint((4,)))
    deep = UNet.transformer(4, levels=2, depth=2)
    with pytest.raises(ValueError, match=r"has no weights yet"):
        control.add(kdiff.DiffusionModel(deep), edges=one)
    with pytest.raises(ValueError, match=r"ControlNet.of: `network` must be a built UNet"):
        ControlNet.of(deep)
    with pytest.raises(ValueError, match=r"conditions cannot be named \['image'\]"):
        control.add(model, image=one)
    with pytest.raises(ValueError, match=r"'label' is already an input"):
        control.add(model, label=one)
    with pytest.raises(ValueError, match=r"must have the levels of the U-Net.*\(4, 1\).*received: .*\(4, 2\)"):
        Controlled(model.network, {"edges": ControlNet(deep.levels)})
    with pytest.raises(TypeError, match=r"`controls` must be a non-empty mapping"):
        Controlled(model.network, {"edges": deep})
    with pytest.raises(TypeError, match=r"`network` must be a UNet"):
        Controlled(kdiff.networks.DiT(64, 1), {"edges": one})
    with_control(model)
    with pytest.raises(ValueError, match=r"controls of these names: \['edges'\]"):
        control.add(model, edges=one)
    with pytest.raises(ValueError, match=r"must be 1 times the size of x_t, \(8, 8\); received: \(16, 16\)"):
        sample(model, edges=np.zeros((16, 16, 3), "float32"))
    with pytest.raises(ValueError, match=r"in \[-1, 1\], where black is -1; received 0 to 255"):
        sample(model, edges=np.float32([[[0, 1, 255]]]))
    with pytest.raises(ValueError, match=r"`edges_scale` must be one number, or 5, one per map"):
        sample(model, edges=EDGES[0], edges_scale=np.ones((2, 3), "float32"))
    with pytest.raises(ValueError, match=r"\['edges_scale'\] must be given in all sets of conditions"):
        sample(model, edges=EDGES[0], guidance=ClassifierFree(2.0, negative={"edges_scale": 0.0, "text": TEXT[1]}))
    model.compile("adam")
    with pytest.raises(ValueError, match=r"training needs at least one of the pictures \['edges'\]"):
        model.fit(data(), verbose=0)
    for options in ({"begin": 1.5}, {"end": [0.2, -1]}, {"scale": "x"}):
        with pytest.raises(ValueError, match=f"Control: `{next(iter(options))}`"):
            Control("edges", **options)
