"""Averaged weights, with which a diffusion model draws better samples than with the weights that it is training.

    average += (1 - decay_n) (weight - average),    decay_n = min(decay, (1 + n) / (10 + n)) in update n

The decay begins small, so that the first weights are soon forgotten.
"""

import keras
from keras import ops

from kdiff import backend

__all__ = ["Averages"]


class Averages(keras.layers.Layer):
    """Exponential averages of a network's floating-point weights, in float32.

    Args:
        decay: in [0, 1); the averages reach back about 1 / (1 - decay) updates.
    """

    def __init__(self, decay: float):
        super().__init__(dtype="float32", autocast=False)
        self.decay = decay

    def follow(self, network: keras.layers.Layer) -> None:
        """Makes an average of each weight of `network`, which must be built, with the weight's value."""
        self.updates = self._counter("updates")
        self.last_iteration = self._counter("last_iteration")
        weights = self.of(network)
        self.values = [self._average_of(weight) for weight in weights]
        self.followed = [id(weight) for weight in weights]
        self.built = True

    def fits(self, network: keras.layers.Layer) -> bool:
        """Whether the network has the weights that it had when the averages were made."""
        return self._are_followed(self.of(network))

    def _are_followed(self, weights: list) -> bool:
        return self.followed == [id(weight) for weight in weights]

    def _counter(self, name: str):
        return self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name=name)

    def _average_of(self, weight):
        # Through NumPy: on JAX the two must not share a buffer, which a training step gives away.
        value = ops.convert_to_numpy(weight).astype("float32")
        return self.add_weight(
            shape=value.shape,
            dtype="float32",
            initializer=lambda shape, dtype: ops.convert_to_tensor(value, dtype),
            trainable=False,
            name=f"average_of_{weight.name}",
        )

    @staticmethod
    def of(network: keras.layers.Layer) -> list:
        """The weights that are averaged: not those with `averaged = False`, such as of frozen encoders, which stay."""
        return [weight for weight in network.weights if "float" in weight.dtype and getattr(weight, "averaged", True)]

    def pairs(self, network: keras.layers.Layer) -> list[tuple]:
        """(weight, average) of each weight that is averaged.

        Raises:
            ValueError: if the network has other weights than when the averages were made.
        """
        weights = self.of(network)
        if not self._are_followed(weights):
            raise ValueError(
                f"the network has changed since its averages were made: it has {len(weights)} weights that are not "
                f"all those of the {len(self.values)} averages. Call `model.reset_averages()`, which makes averages of "
                "its weights as they are now; then `model.compile`, if an optimizer knew the others."
            )
        return list(zip(weights, self.values, strict=True))

    @property
    def moved(self) -> bool:
        """Whether there was an update; not to be asked in a graph."""
        return int(ops.convert_to_numpy(self.updates)) > 0

    def update(self, network: keras.layers.Layer, iteration=None) -> None:
        """Moves the averages, if the optimizer, which counts to `iteration`, has made an update since the last call.

        Under gradient accumulation, or when a loss scale overflows, it does not at every step. None moves them anyway.
        """
        iteration = self.last_iteration.value + 1 if iteration is None else ops.cast(iteration, "int32")
        updated = ops.cast(iteration != self.last_iteration.value, "int32")
        count = ops.cast(self.updates.value, "float32")
        decay = ops.minimum(self.decay, (1.0 + count) / (10.0 + count))
        weights, averages = zip(*self.pairs(network), strict=True)
        backend.move_towards(averages, weights, ops.cast(updated, "float32") * (1.0 - decay))
        self.last_iteration.assign(iteration)
        self.updates.assign(self.updates.value + updated)

    def reset(self, network: keras.layers.Layer) -> None:
        """Sets the averages to the weights as they are now."""
        for weight, average in self.pairs(network):
            average.assign(ops.convert_to_numpy(weight).astype("float32"))

    def scope(self, network: keras.layers.Layer) -> keras.StatelessScope:
        """A scope in which `network` computes with the averages."""
        averaged = {id(w): a.value for w, a in self.pairs(network)}
        # Every variable must be named, those that are not averaged with their own value.
        values = [(v, ops.cast(averaged.get(id(v), v.value), v.dtype)) for v in network.variables]
        return keras.StatelessScope(values)
