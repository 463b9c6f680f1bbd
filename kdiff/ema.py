"""Moving averages (EMA) of the weights, which give better samples than the weights themselves:

    average += step_n (weight - average)        in update n = 0, 1, ...

The step sizes are given by a profile. For the exponential moving average, `Exponential`, or a number such as
`ema=0.999`,

    step_n = 1 - min(decay, (1 + n) / (10 + n)),

with a small decay at first, so that the initial weights are quickly forgotten. For the power-function EMA, `Power`,
whose length grows with training,

    step_n = 1 - (1 - 1 / (n + 1))^(gamma + 1).

`kdiff.posthoc` reconstructs power-function averages of any length after training from a few that were kept.
"""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import Value, check_number

__all__ = ["EMA", "LONGEST", "Exponential", "Power", "Profile", "profiles_of"]

LONGEST = 1.0 / math.sqrt(12.0)  # the length of a plain mean, gamma = 0


class Profile(Value):
    """The base class of profiles: the weighting of past weights in an average. A new one defines `step`."""

    def step(self, updates):
        """The step size of update number `updates`, a float32 scalar in [0, 1].

        Args:
            updates: the number of previous updates, a float32 scalar tensor.
        """
        raise NotImplementedError


class Exponential(Profile):
    """step_n = 1 - min(decay, (1 + n) / (10 + n)).

    Args:
        decay: in [0, 1); the average extends over about 1 / (1 - decay) updates.
    """

    formerly = ("kdiff.averages>Exponential",)

    def __init__(self, decay: float = 0.999):
        check_number("Exponential", "decay", decay, 0.0, 1.0 - 1e-9)
        self.decay = decay

    def step(self, updates):
        return 1.0 - ops.minimum(self.decay, (1.0 + updates) / (10.0 + updates))


class Power(Profile):
    """The power-function EMA of Karras et al. 2024 (EDM2, arXiv:2312.02696, section 3): after t updates it is

        integral over u from 0 to t of p(u; t) weight(u),    p(u; t) = (gamma + 1) u^gamma / t^(gamma + 1),

    where weight(u) is the weight after update number ceil(u), so that step_n = 1 - (1 - 1 / t)^(gamma + 1), t = n + 1.
    It extends over the same fraction of the training at any time, and does not include the initial weights.

    Args:
        length: sigma_rel, the standard deviation of p relative to t, from 0.001 to 1 / sqrt(12). gamma is the largest
            root of length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), for example 16.97 for 0.05 and 6.94 for 0.1.
            For 1 / sqrt(12) = 0.2887 it is 0, and the average is the arithmetic mean.

    Attributes:
        gamma: the exponent.
    """

    formerly = ("kdiff.averages>Power",)

    def __init__(self, length: float = 0.05):
        check_number("Power", "length", length, 1e-3, LONGEST + 1e-4)
        self.length = length
        inverse = 1.0 / min(length, LONGEST) ** 2
        self.gamma = float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())

    def step(self, updates):
        # 1 minus a decay would keep two digits after a million updates. In the first update the logarithm is -inf.
        return -ops.expm1((self.gamma + 1.0) * ops.log1p(-1.0 / (updates + 1.0)))

    def density(self, u, t: float) -> np.ndarray:
        """p(u; t), float64, with the shape of `u`; 0 outside [0, t]."""
        u = np.asarray(u, "float64")
        inside = (u >= 0.0) & (u <= t)
        return np.where(inside, (self.gamma + 1.0) / t * (np.where(inside, u, 0.0) / t) ** self.gamma, 0.0)

    def product(self, t: float, other: "Power", other_t: float) -> float:
        """The integral of p(u; t) q(u; other_t) du, where q is the profile of `other` (EDM2, appendix C):

        (a + 1) (b + 1) / (a + b + 1) (s / l)^c / l,    s <= l the two times, a and b the gammas, c that of l.
        """
        a, b = self.gamma, other.gamma
        shorter, longer, exponent = (t, other_t, b) if t < other_t else (other_t, t, a)
        return (a + 1.0) * (b + 1.0) / (a + b + 1.0) * (shorter / longer) ** exponent / longer


def profiles_of(ema: Any) -> tuple[Profile, ...]:
    """The profiles for the argument `ema` of `DiffusionModel`: a number, a `Profile`, or several of them; or None.

    Raises:
        ValueError: for a number out of range, an unknown name, an empty list, or a repeated profile.
        TypeError: for anything else.
    """
    if ema is None:
        return ()
    several = ema if isinstance(ema, (list, tuple)) else (ema,)
    profiles = tuple(map(_profile_of, several))
    if not profiles or len(set(profiles)) < len(profiles):
        raise ValueError(f"`ema` must be a decay, a `Profile`, or several different ones; received: {ema!r}")
    return profiles


def _profile_of(one: Any) -> Profile:
    if not isinstance(one, (int, float, np.number)):
        return Profile.get(one)
    check_number("DiffusionModel", "ema", one, 0.0, 1.0 - 1e-9)
    return Exponential(float(one))


class EMA(keras.layers.Layer):
    """Averages of the floating-point weights of a network, in float32.

    Args:
        profiles: one profile per average of each weight. The network uses those of the first in `scope`.

    Attributes:
        values: the averages with the first profile, one per weight.
        kept: a list with the averages of each profile; `values` is its first entry.
        used: whether the model computes with them; not before the first update.
    """

    def __init__(self, *profiles: Profile):
        super().__init__(dtype="float32", autocast=False)
        self.profiles = profiles
        self.used = False

    def follow(self, network: keras.layers.Layer) -> None:
        """Creates the averages of the weights of `network`, which must be built, with their current values."""
        self.updates = self._counter("updates")
        self.last_iteration = self._counter("last_iteration")
        weights = self.of(network)
        self.kept = [[self._average_of(weight, i) for weight in weights] for i in range(len(self.profiles))]
        self.values = self.kept[0]
        self.followed = [id(weight) for weight in weights]
        for averages in self.kept:
            backend.lie_alike(averages, weights)
        self.built = True

    def load_own_variables(self, store) -> None:
        """As in Keras. The model computes with loaded averages at once, also inside a graph, if there was an update."""
        super().load_own_variables(store)
        self.used = self.moved

    def fits(self, network: keras.layers.Layer) -> bool:
        """Whether the network has the same weights as when the averages were created."""
        return self._are_followed(self.of(network))

    def _are_followed(self, weights: list) -> bool:
        return self.followed == [id(weight) for weight in weights]

    def _counter(self, name: str):
        return self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name=name)

    def _average_of(self, weight, profile: int):
        # Through NumPy: on JAX the two must not share a buffer, which a training step donates.
        value = ops.convert_to_numpy(weight).astype("float32")
        path = weight.path.replace("/", "_")  # names are unique, as Keras' `get_state_tree` needs them
        average = self.add_weight(
            shape=value.shape,
            dtype="float32",
            initializer=lambda shape, dtype: ops.convert_to_tensor(value, dtype),
            trainable=False,
            name=f"average_{profile}_of_{path}",
        )
        backend.laid_out_as(average, weight)
        return average

    @staticmethod
    def of(network: keras.layers.Layer) -> list:
        """The averaged weights: all except those with `averaged = False`, such as those of frozen encoders."""
        return [weight for weight in network.weights if "float" in weight.dtype and getattr(weight, "averaged", True)]

    def pairs(self, network: keras.layers.Layer, which: int = 0) -> list[tuple]:
        """(weight, average) for each averaged weight, with the profile of this index.

        Raises:
            ValueError: if the network has other weights than when the averages were created.
        """
        weights = self.of(network)
        if not self._are_followed(weights):
            raise ValueError(
                f"the network has changed since its averages were made: its {len(weights)} weights are not those of "
                f"the {len(self.values)} averages. Call `model.reset_ema()`, which creates averages of its current "
                "weights; then `model.compile`, if an optimizer has the old ones."
            )
        return list(zip(weights, self.kept[which], strict=True))

    @property
    def moved(self) -> bool:
        """Whether there was an update; not for use in a graph."""
        return int(ops.convert_to_numpy(self.updates)) > 0

    def update(self, network: keras.layers.Layer, iteration=None) -> None:
        """Updates the averages, if the optimizer, at `iteration`, has made an update since the last call.

        With gradient accumulation or loss scaling it does not make one in every step. None: updates them in any case.
        """
        iteration = self.last_iteration.value + 1 if iteration is None else ops.cast(iteration, "int32")
        updated = ops.cast(iteration != self.last_iteration.value, "int32")
        count = ops.cast(self.updates.value, "float32")
        for which, profile in enumerate(self.profiles):
            weights, averages = zip(*self.pairs(network, which), strict=True)
            backend.move_towards(averages, weights, ops.cast(updated, "float32") * profile.step(count))
        self.last_iteration.assign(iteration)
        self.updates.assign(self.updates.value + updated)

    def reset(self, network: keras.layers.Layer) -> None:
        """Resets the averages to the current weights, as if they were new."""
        for which in range(len(self.profiles)):
            for weight, average in self.pairs(network, which):
                average.assign(ops.convert_to_numpy(weight).astype("float32"))
        self.updates.assign(0)

    def apply(self, network: keras.layers.Layer) -> None:
        """Makes each average its weight, if there was an update, as before other weights are averaged."""
        if self.moved:
            for weight, average in self.pairs(network):
                weight.assign(ops.convert_to_numpy(average))

    def exchange(self, network: keras.layers.Layer) -> None:
        """Swaps each weight with its average."""
        for weight, average in self.pairs(network):
            value = ops.convert_to_numpy(weight).astype("float32")
            weight.assign(ops.convert_to_numpy(average))
            average.assign(value)

    def scope(self, network: keras.layers.Layer) -> keras.StatelessScope:
        """A scope in which `network` uses the averages."""
        averaged = {id(w): a.value for w, a in self.pairs(network)}
        # Every variable must be listed, those that are not averaged with their own value.
        values = [(v, ops.cast(averaged.get(id(v), v.value), v.dtype)) for v in network.variables]
        return keras.StatelessScope(values)
