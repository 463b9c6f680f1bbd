"""How fast the answer of a network changes along a curve, as objectives of continuous time ask.

    tangent(curve, zero, below, above)  =  d curve(e) / de at e = 0

where `curve` is a function of one number an example, e, `(batch,)`: it moves the noisy example and its noise level
together, and answers what the network does there. No gradient flows through the result.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

from kdiff import backend, deprecated
from kdiff.base import Value, check_number

__all__ = ["FiniteDifference", "ForwardMode", "Tangent"]


class Tangent(Value):
    """The base of both. A new one defines `__call__`.

    Attributes:
        precise: whether the network must compute in float32.
    """

    precise = False

    def __call__(self, curve: Callable[[Any], Any], zero, below=None, above=None):
        """d curve(e) / de at e = 0, with the shape of the curve's values.

        Args:
            curve: of e, float32, `(batch,)`, to float32, `(batch, ...)`.
            zero: zeros, `(batch,)`.
            below, above: how far e may go down and up, `(batch,)`, not below 0, and not both 0; None for any distance.
        """
        raise NotImplementedError


class FiniteDifference(Tangent):
    """The central difference (curve(h) - curve(-h)) / 2h, with less of h on a side where `below` or `above` is less.

    It asks the network twice, by its fast operations, whatever they are. It is wrong by 1e-7 / h of the size of the
    answer, float32's rounding, so the network must compute in float32; and by h^2 / 6 of the third derivative, which is
    large where time is embedded by fast waves. A label of 1000 t, at the frequency 1, turns by 1 in the default h: tell
    the network less, as by `time_label=Scaled(10.0)`, which its exact derivative needs as well (Lu and Song 2024,
    arXiv:2410.11081, section 4.1).

    Args:
        h: the distance.
    """

    formerly = ("kdiff.tangents>Difference",)

    precise = True

    def __init__(self, h: float = 0.001):
        check_number("FiniteDifference", "h", h, 1e-5, 1.0)
        self.h = h

    def __call__(self, curve: Callable[[Any], Any], zero, below=None, above=None):
        down, up = (zero + self.h if limit is None else ops.minimum(zero + self.h, limit) for limit in (below, above))

        def difference():
            high, low = curve(up), curve(-down)
            span = ops.reshape(up + down, (-1, *[1] * (len(high.shape) - 1)))
            return (high - low) / span

        return ops.stop_gradient(backend.without_gradients(difference)())


class ForwardMode(Tangent):
    """The derivative itself, by forward-mode differentiation.

    The operations of kdiff's layers are then computed by plain formulas (`backend.forward_mode`), for their fast forms
    have no such derivative; neither has flash attention, nor an operation of a layer of one's own with a gradient of
    its own. It costs what two calls of the network do, or a little more, and goes with any precision.
    """

    formerly = ("kdiff.tangents>Forward",)

    def __call__(self, curve: Callable[[Any], Any], zero, below=None, above=None):
        return ops.stop_gradient(backend.without_gradients(lambda: backend.jvp(curve, zero, ops.ones_like(zero)))())


__getattr__ = deprecated.names(__name__, Difference="FiniteDifference", Forward="ForwardMode")
