"""MMDiT: sizes as published; trained by `fit` with flow matching on text, saved, and sampled again."""

import keras
import numpy as np
import pytest

from kdiff import DiffusionModel, networks, text
from kdiff.blocks import LabelEmbedding, PositionTable, TextEncoder
from kdiff.networks import MMDiT, published

# Those of diffusers' `SD3Transformer2DModel` of the published configurations, which has the table beside them.
COUNTS = {"3-medium": 2_028_328_000, "3.5-medium": 2_243_171_520, "3.5-large": 8_056_627_520}


@pytest.mark.once
@pytest.mark.parametrize("version", ["3-medium", "3.5-medium", pytest.param("3.5-large", marks=pytest.mark.thorough)])
def test_published_sizes(version):
    network = published.stable_diffusion_3(version)
    found = networks.parameters(network, (None, None, 16), context=(333, 4096), text_embeds=(2048,))
    table = network.positions.size**2 * network.width
    assert found - table == COUNTS[version]
    assert not network.built


def test_trained_on_text(tmp_path):
    """Two texts, two pictures; the padding of the shorter one is masked."""
    keras.utils.set_random_seed(0)
    encoder = TextEncoder(text.Bytes(6), 8, 1, 1, dropout=0.1, masked=True)
    network = MMDiT(16, 2, 2, dual=(0,), positions=PositionTable(3), conditions={"text": encoder})
    model = DiffusionModel(network, schedule="rectified", prediction="flow", times="logit_normal", ema=0.9)
    model.compile(keras.optimizers.Adam(1e-2))
    images = np.stack([np.full((4, 4, 1), value, "float32") for value in (-0.7, 0.7)] * 16)
    data = {"image": images, "text": np.array(["ab", "cdefgh"] * 16)}
    history = model.fit(data, batch_size=16, epochs=8, verbose=0)
    losses = history.history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    table = network.positions.table
    assert all(weight is not table for weight in network.trainable_variables)
    one = model.sample(2, text=["ab", "cdefgh"], guidance=1.5, steps=3, sampler="euler")
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    other = again.sample(2, text=["ab", "cdefgh"], guidance=1.5, steps=3, sampler="euler")
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(one[0] - one[1]).max() > 0.05


@pytest.mark.once
@pytest.mark.parametrize("remat", [True, False])
def test_trained_in_mixed_precision(remat):
    keras.utils.set_random_seed(0)
    conditions = {"text": keras.layers.Dense(5), "label": LabelEmbedding(2)}
    network = MMDiT(16, 2, 2, conditions=conditions, remat=remat, dtype="mixed_bfloat16")
    model = DiffusionModel(network, schedule="rectified", prediction="velocity", times="logit_normal")
    model.compile(keras.optimizers.Adam(1e-3))
    data = {
        "image": np.zeros((4, 4, 4, 1), "float32"),
        "text": np.ones((4, 3, 7), "float32"),
        "label": np.arange(4) % 2,
    }
    assert np.isfinite(model.fit(data, batch_size=2, verbose=0).history["loss"]).all()


@pytest.mark.once
def test_refused():
    with pytest.raises(ValueError, match="a condition must return tokens"):
        MMDiT(16, 2, conditions={"label": LabelEmbedding(3)}).build(
            {"image": (1, 4, 4, 1), "time": (1,), "label": (1,)}
        )
    with pytest.raises(ValueError, match=r"`dual` must be indices of blocks in 0..1; received: \[2\]"):
        MMDiT(16, 2, dual=[2])
    with pytest.raises(ValueError, match="`version` must be one of"):
        published.stable_diffusion_3("4")
