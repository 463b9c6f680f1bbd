"""Counter-based random numbers: one seed gives the same numbers on every backend.

A counter-based generator is a function, not a state: `words = threefry(key, counter)`. The key names a stream, the
counter a place in it, so that any number can be had at any time, in any order, inside a compiled loop, without a
carry. kdiff draws all its noise this way:

    key = fold_in(key_of(seed), step, TRAINING)     one stream a step
    noise = normal(key, shape, first=n)          counters (sample number, place in the sample)

Sample number n therefore gets the same noise whether it is drawn in a batch of 1 or of 1,000, and a run that is
resumed at step k goes on with the numbers that it would have had.

The generator is Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy
as 1, 2, 3"): 64 bits in, 64 bits out, by additions, rotations and exclusive ors of 32-bit words. The words are kept in
int32, whose additions wrap around in the same way on TensorFlow, JAX and PyTorch.
"""

import math
from collections.abc import Sequence

import numpy as np
from keras import ops

from kdiff import backend, deprecated
from kdiff.base import check_integer

__all__ = [
    "EVALUATION",
    "INITIAL",
    "PARITY",
    "REPLICAS",
    "ROTATIONS",
    "STEPS",
    "TRAINING",
    "Keys",
    "fold_in",
    "key_of",
    "normal",
    "slerp",
    "threefry",
    "uniform",
]

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA

# What a seed's numbers are used for: no two uses share a stream. A step that draws noise again takes STEPS + 1, ...
TRAINING, EVALUATION, INITIAL, STEPS = range(4)
REPLICAS = -1  # a stream a device, of those that train on parts of one batch


def threefry(key, counter):
    """The Threefry-2x32-20 block function.

    Args:
        key: a pair of int32 tensors or numbers, (k0, k1).
        counter: a pair of int32 tensors or numbers, (c0, c1). All four broadcast together.

    Returns:
        A pair of int32 tensors: 64 random bits for every counter.
    """
    return _rounds(*[backend.tensor(word, "int32") for word in (*key, *counter)])


@backend.fused
def _rounds(k0, k1, x0, x1):
    keys = (k0, k1, ops.bitwise_xor(ops.bitwise_xor(k0, k1), PARITY))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for distance in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = ops.bitwise_xor(_rotate(x1, distance), x0)
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + (group + 1)
    return x0, x1


def _rotate(word, distance: int):
    return ops.bitwise_or(ops.left_shift(word, distance), _shift_right(word, 32 - distance))


def _shift_right(word, distance: int):
    """Logical shift: int32 shifts copy the sign bit, so it is masked away."""
    return ops.bitwise_and(ops.right_shift(word, distance), (1 << (32 - distance)) - 1)


def key_of(seed: int | Sequence[int]) -> np.ndarray:
    """The key of a seed: its 64 bits as two int32 words, with shape `(2,)`; of several seeds `(seeds, 2)`.

    Raises:
        ValueError: if a seed is not a whole number in [0, 2^64).
    """
    if isinstance(seed, (list, tuple, np.ndarray)) and np.ndim(seed):
        return np.stack([key_of(one) for one in seed])
    check_integer("key_of", "seed", seed, minimum=0)
    if seed >= 2**64:
        raise ValueError(f"`seed` must be below 2^64; received: {seed}")
    words = (seed >> 32, seed & 0xFFFFFFFF)
    return np.array([word - 2**32 * (word >= 2**31) for word in words], "int32")


def fold_in(key, number, stream: int = 0):
    """Keys of streams below `key`.

    Args:
        key: int32, shape `(2,)`, or `(keys, 2)` with a single `number`.
        number: whole numbers, of any shape: which streams.
        stream: which family of streams, one of those below or a number of your own.

    Returns:
        An int32 tensor of shape `(*number.shape, 2)`, or `(keys, 2)`.
    """
    number = ops.cast(number, "int32")
    return ops.stack(threefry((key[..., 0], key[..., 1]), (number, ops.zeros_like(number) + stream)), axis=-1)


class Keys:
    """Fresh keys, one after the other: `next(keys)` number n is `fold_in(key, n)`.

    An iterator and not a generator: PyTorch's compiler would run an endless one to its end.

    Args:
        key: int32, shape `(2,)`.
    """

    def __init__(self, key):
        self.key, self.drawn = key, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.drawn += 1
        return fold_in(self.key, self.drawn - 1)


def uniform(key, shape, first=0):
    """Uniform float32 numbers in [0, 1), multiples of 2^-24.

    Args:
        key: int32, shape `(2,)`: the stream; or `(samples, 2)`, a stream for each, of which it is sample `first`.
        shape: shape of the result, `(samples, ...)`. On TensorFlow its numbers may be tensors.
        first: the number of the first sample, so that batches continue one another.
    """
    return _draw(key, shape, first, lambda u0, u1: (u0, u1))


def normal(key, shape, first=0):
    """Standard normal float32 numbers, by the method of Box and Muller (1958): z = sqrt(-2 ln u0) (cos, sin)(2 pi u1).

    With 24 bits, u0 >= 2^-24 and |z| <= 5.77. Arguments as of `uniform`.
    """
    return _draw(key, shape, first, _box_muller)


@backend.fused
def _box_muller(u0, u1):
    radius = ops.sqrt(-2.0 * ops.log(u0 + 2.0**-24))
    angle = (2.0 * np.pi) * u1
    return radius * ops.cos(angle), radius * ops.sin(angle)


def _draw(key, shape, first, transform):
    """Two numbers a counter: the first of each pair fill the first half of a sample, the second the other half."""
    samples, size = shape[0], math.prod(shape[1:])
    numbers = ops.arange(samples, dtype="int32")[:, None] if len(key.shape) == 1 else 0
    places = ops.arange((size + 1) // 2, dtype="int32")[None, :]
    words = threefry((key[..., 0:1], key[..., 1:2]), (numbers + first, places))
    pair = transform(*(ops.cast(_shift_right(word, 8), "float32") * 2.0**-24 for word in words))
    return ops.reshape(ops.concatenate(pair, axis=-1)[:, :size], (samples, *shape[1:]))


def slerp(a, b, fractions):
    """Points on the arc from noise `a` to noise `b`, which keep the length that noise has (Shoemake 1985):

        (sin((1 - f) angle) a + sin(f angle) b) / sin(angle),    cos(angle) = <a, b> / (|a| |b|)

    Where the two are parallel it is the straight line.

    Args:
        a: of any shape.
        b: of the same shape.
        fractions: f, with shape `(count,)`; 0 is `a` and 1 is `b`.

    Returns:
        A float32 array with shape `(count, ...)`.
    """
    a, b, f = (np.asarray(ops.convert_to_numpy(value), "float64") for value in (a, b, fractions))
    if a.shape != b.shape:
        raise ValueError(f"slerp: `a` and `b` must have one shape; received: {a.shape} and {b.shape}")
    cosine = np.clip(np.sum(a * b) / np.maximum(np.linalg.norm(a) * np.linalg.norm(b), 1e-30), -1.0, 1.0)
    f, angle = f.reshape(-1, *[1] * a.ndim), np.arccos(cosine)
    if np.sin(angle) < 1e-6:
        return ((1 - f) * a + f * b).astype("float32")
    return ((np.sin((1 - f) * angle) * a + np.sin(f * angle) * b) / np.sin(angle)).astype("float32")


__getattr__ = deprecated.names(__name__, fold="fold_in")
