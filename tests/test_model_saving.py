"""What a file of a model says beside its weights: what is trained, and what is not."""

import keras
import numpy as np
import pytest

from kdiff.networks import UNet
from tests.toys import compiled_model, images, numpy

SHAPE = (8, 8, 1)


def trained(model):
    """The numbers of the weights that are trained."""
    ids = {id(variable) for variable in model.trainable_variables}
    return [i for i, weight in enumerate(model.network.weights) if id(weight) in ids]


@pytest.mark.parametrize("part", ["some", pytest.param("all", marks=pytest.mark.once)])
def test_a_frozen_layer_is_frozen_in_the_loaded_model(part, tmp_path):
    """With the optimizer's state, whose variables are those of what is trained; weights frozen alone too."""
    model = compiled_model(UNet.residual(8, 1, 1), keras.optimizers.Adam(1e-2))
    model.build((None, *SHAPE))
    layers = [layer for layer in model.network._flatten_layers(include_self=False) if layer._trainable_variables]
    if part == "all":
        model.network.trainable = False
    else:
        layers[0].trainable = layers[3].trainable = False
        layers[5]._trainable_variables[0].trainable = False
        model.compile(keras.optimizers.Adam(1e-2))
        model.fit(images(4, SHAPE), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert trained(loaded) == trained(model)
    assert len(loaded.trainable_variables) < len(loaded.network.weights)
    if part == "some":
        for one, other in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
            np.testing.assert_array_equal(numpy(one), numpy(other))
        for one in (model, loaded):
            one.train_on_batch(images(4, SHAPE))
        for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.once
def test_state_by_names(tmp_path):
    """As checkpoints of Orbax hold it: weights, averages of two profiles, counters and optimizer; no others' names."""
    model = compiled_model(UNet.residual(8, 1, 1), keras.optimizers.Adam(1e-2), ema=[0.9, 0.5])
    model.fit(images(4, SHAPE), verbose=0)
    state = model.get_state_tree(value_format="numpy_array")
    variables = [*model.variables, *model.optimizer.variables]
    before = [numpy(one).copy() for one in variables]
    model.fit(images(4, SHAPE, seed=1), epochs=2, verbose=0)
    model.set_state_tree(state)
    for one, wanted in zip(variables, before, strict=True):
        np.testing.assert_array_equal(numpy(one), wanted)
    other = compiled_model(UNet.residual(8, 1, 1), keras.optimizers.Adam(1e-2), ema=[0.9, 0.5])
    other.build((None, *SHAPE))
    with pytest.raises(ValueError, match="trainable_variables are found by their names, which are not those of this"):
        other.set_state_tree(state)
