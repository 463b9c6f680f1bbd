"""Derivatives of the network's output along a curve, as needed by continuous-time objectives:

    tangent(curve, zero, below, above)  =  d curve(e) / de at e = 0

where `curve` is a function of one number per example, e, `(batch,)`, which moves the noisy example and its noise level
together and returns the output of the network there. No gradient flows through the result.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

from kdiff import backend, deprecated
from kdiff.base import Value, check_number

__all__ = ["FiniteDifference", "ForwardMode", "Tangent"]


class Tangent(Value):
    """The base class. A new one defines `__call__`.

    Attributes:
        precise: whether the network must compute in float32.
    """

    precise = False

    def __call__(self, curve: Callable[[Any], Any], zero, below=None, above=None):
        """d curve(e) / de at e = 0, with the shape of the values of the curve.

        Args:
            curve: a function from e, float32 `(batch,)`, to float32 `(batch, ...)`.
            zero: zeros, `(batch,)`.
            below, above: the largest |e| in either direction, `(batch,)`, at least 0 and not both 0; None for no limit.
        """
        raise NotImplementedError


class FiniteDifference(Tangent):
    """The central difference (curve(h) - curve(-h)) / 2h, with a smaller step on a side with a smaller limit.

    It calls the network twice, with any of its operations. Its error is 1e-7 / h relative to the output, from float32
    rounding, so the network must compute in float32; and h^2 / 6 times the third derivative, which is large if the time
    embedding has high frequencies. A label of 1000 t, at frequency 1, changes the phase by 1 for the default h: use a
    smaller scale, such as `time_label=Scaled(10.0)`, which the exact derivative needs as well (Lu and Song 2024,
    arXiv:2410.11081, section 4.1).

    Args:
        h: the step size.
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
    """The exact derivative, by forward-mode differentiation (a Jacobian-vector product).

    The operations of kdiff's layers are then computed by plain formulas (`backend.forward_mode`), because their fast
    forms do not support it; neither do flash attention and operations with custom gradients. It costs slightly more
    than two calls of the network, and works in any precision.
    """

    formerly = ("kdiff.tangents>Forward",)

    def __call__(self, curve: Callable[[Any], Any], zero, below=None, above=None):
        return ops.stop_gradient(backend.without_gradients(lambda: backend.jvp(curve, zero, ops.ones_like(zero)))())


__getattr__ = deprecated.names(__name__, Difference="FiniteDifference", Forward="ForwardMode")
