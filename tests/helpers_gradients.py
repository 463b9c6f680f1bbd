"""A layer or model as a function, and its gradients: compiled on JAX, which is slow otherwise.

On TensorFlow the gradients are of a graph, and a call alone is of operations one by one, which are faster: tests that
compare the two say that both are the same.
"""

import keras
import numpy as np
from keras import ops

FUNCTIONS = {}  # compiled on JAX, until conftest.py clears them after the module


def perturb(model, scale=0.1):
    """Adds noise to every weight: a zero at the end of a branch would hide what comes before it."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if "float" in weight.dtype and "frequencies" not in weight.path:
            weight.assign(ops.convert_to_numpy(weight) + scale * rng.standard_normal(weight.shape))


def run(model, inputs, training=False):
    """The model's output as a NumPy array."""
    inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    y = _output(model, inputs, training)
    return ops.convert_to_numpy(ops.cast(ops.stop_gradient(y), "float32")).astype("float64")


def _output(model, inputs, training):
    if keras.backend.backend() == "jax":
        import jax

        values = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
        if (model, training) not in FUNCTIONS:
            FUNCTIONS[model, training] = jax.jit(lambda *args: model.stateless_call(*args, training=training)[0])
        return FUNCTIONS[model, training](*values, inputs)
    return model(inputs, training=training)


def value_and_gradients(model, inputs):
    """The output as a NumPy array, and the gradients of a weighted sum of it."""
    inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    y, values = _GRADIENTS[keras.backend.backend()](model, inputs)
    paths = [variable.path for variable in model.trainable_variables]
    arrays = [ops.convert_to_numpy(value) for value in values]
    return ops.convert_to_numpy(y).astype("float64"), dict(zip(paths, arrays, strict=True))


def _weighted_sum(y):
    numbers = np.random.default_rng(1).standard_normal(tuple(y.shape)).astype("float32")
    return ops.sum(y * ops.convert_to_tensor(numbers))


def _jax_gradients(model, inputs):
    import jax

    def loss(trainable, others, x):
        y = model.stateless_call(trainable, others, x)[0]
        return _weighted_sum(y), y

    values = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(*values, inputs)
    return y, gradient


def _tensorflow_gradients(model, inputs):
    import tensorflow as tf

    @tf.function(autograph=False)
    def gradient(x):
        with tf.GradientTape() as tape:
            y = model(x)
            total = _weighted_sum(y)
        return y, tape.gradient(total, [v.value for v in model.trainable_variables], unconnected_gradients="zero")

    return gradient(inputs)


def _torch_gradients(model, inputs):
    y = model(inputs)
    values = [v.value for v in model.trainable_variables]
    if values:
        _weighted_sum(y).backward()
    return y.detach(), [ops.zeros_like(v).detach() if v.grad is None else v.grad for v in values]


_GRADIENTS = {"jax": _jax_gradients, "tensorflow": _tensorflow_gradients, "torch": _torch_gradients}
