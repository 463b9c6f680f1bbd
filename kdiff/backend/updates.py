"""The update of Adam as one operation a weight, on TensorFlow."""

import math
from typing import Any

import keras

from kdiff.backend.running import BACKEND

__all__ = ["fuse_updates"]

# What is used of Keras 3.15's optimizers besides their public methods.
_PRIVATE = ("_apply_weight_decay", "_get_variable_index", "_momentums", "_use_weight_decay", "_velocities")


def fuse_updates(optimizer: Any) -> None:
    """Has Keras' Adam and AdamW on TensorFlow update each weight by one operation, with the same formula:

        m <- m + (1 - b1) (g - m),    v <- v + (1 - b2) (g^2 - v),
        w <- w - rate sqrt(1 - b2^n) / (1 - b1^n) m / (sqrt(v) + e).

    Keras makes forty operations of it for each weight, half of the graph of a training step, which is traced, optimised
    and held in memory. Sparse gradients, other precisions and several devices are updated by Keras' own, and so is all
    with a version of Keras that lacks what is used of its private members.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of loss scaling
    fits = type(optimizer) in (keras.optimizers.Adam, keras.optimizers.AdamW)
    if BACKEND != "tensorflow" or not fits or optimizer.amsgrad or "update_step" in vars(optimizer):
        return
    if not all(hasattr(optimizer, name) for name in _PRIVATE):
        return
    import tensorflow as tf

    plain, whole, decay = optimizer.update_step, optimizer.apply, optimizer._apply_weight_decay
    shared: list[dict[str, Any]] = []  # the scalars of the update that is being made

    def apply(grads, trainable_variables=None):
        names = {"beta1": optimizer.beta_1, "beta2": optimizer.beta_2, "epsilon": optimizer.epsilon}
        scalars = {name: tf.constant(value, tf.float32) for name, value in names.items()}
        n = tf.cast(optimizer.iterations + 1, tf.float32)
        scalars |= {f"beta{i}_power": tf.pow(scalars[f"beta{i}"], n) for i in (1, 2)}
        shared.append({**scalars, "lr": tf.cast(optimizer.learning_rate, tf.float32)})
        try:
            whole(grads, trainable_variables)
        finally:
            shared.pop()

    def update_step(gradient, variable, learning_rate):
        simple = variable.dtype == tf.float32 and not isinstance(gradient, tf.IndexedSlices)
        if not (shared and simple) or tf.distribute.has_strategy():
            return plain(gradient, variable, learning_rate)
        index = optimizer._get_variable_index(variable)
        m, v = (group[index].value.handle for group in (optimizer._momentums, optimizer._velocities))
        gradient = tf.cast(gradient, tf.float32)
        return tf.raw_ops.ResourceApplyAdam(var=variable.handle, m=m, v=v, grad=gradient, **shared[-1])

    def apply_weight_decay(variables):
        if optimizer.weight_decay is None or tf.distribute.has_strategy():
            return decay(variables)
        rate, share = tf.cast(optimizer.learning_rate, tf.float32), tf.constant(optimizer.weight_decay, tf.float32)
        for variable in (one.value if isinstance(one, keras.Variable) else one for one in variables):
            if optimizer._use_weight_decay(variable):
                rates = (tf.cast(one, variable.dtype) for one in (share, rate))
                variable.assign_sub(math.prod(rates, start=variable), read_value=False)
        return None

    replaced = {"apply": apply, "update_step": update_step, "_apply_weight_decay": apply_weight_decay}
    for name, function in replaced.items():
        object.__setattr__(optimizer, name, function)
