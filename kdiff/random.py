"""Counter-based random numbers: a seed gives the same numbers on every backend.

A counter-based generator is a pure function, `words = threefry(key, counter)`. The key selects a stream and the
counter a position in it, so any number can be computed at any time, in any order and inside a compiled loop, without
carrying a state. All noise in kdiff is drawn in this way:

    key = fold_in(key_of(seed), step, TRAINING)     one stream per step
    noise = normal(key, shape, first=n)             counters (sample index, position in the sample)

Sample n therefore gets the same noise in a batch of 1 and in a batch of 1,000, and a run that is resumed at step k
continues with the numbers that it would have drawn without the interruption.

Nor does it depend on the device: where several train on parts of one batch, each has the numbers of its rows, for the
first of which a third word of the key (`on_device`) stands.

The generator is Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy
as 1, 2, 3"): it maps 64 bits to 64 bits by additions, rotations and exclusive ors of 32-bit words. The words are stored
as int32, whose additions wrap around identically on TensorFlow, JAX and PyTorch.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from keras import ops

from kdiff import backend, deprecated
from kdiff.base import check_integer

__all__ = [
    "EVALUATION",
    "INITIAL",
    "PARITY",
    "ROTATIONS",
    "STEPS",
    "TRAINING",
    "Keys",
    "fold_in",
    "key_of",
    "normal",
    "of_whole",
    "on_device",
    "slerp",
    "threefry",
    "uniform",
]

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA

# The uses of a seed's numbers; no two uses share a stream. A step that draws noise more than once uses STEPS + 1, ...
TRAINING, EVALUATION, INITIAL, STEPS = range(4)


def threefry(key, counter):
    """The Threefry-2x32-20 block function.

    Args:
        key: a pair of int32 tensors or numbers, (k0, k1).
        counter: a pair of int32 tensors or numbers, (c0, c1). All four broadcast together.

    Returns:
        A pair of int32 tensors: 64 random bits per counter.
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
    """The key of a seed: its 64 bits as two int32 words, with shape `(2,)`, or `(seeds, 2)` for several seeds.

    Raises:
        ValueError: if a seed is not a whole number in [0, 2^64).
    """
    if isinstance(seed, (list, tuple, np.ndarray)) and np.ndim(seed):
        return np.stack([key_of(one) for one in seed])
    check_integer("key_of", "seed", seed, minimum=0)
    seed = int(seed)  # NumPy's integers have fewer bits
    if seed >= 2**64:
        raise ValueError(f"`seed` must be below 2^64; received: {seed}")
    words = (seed >> 32, seed & 0xFFFFFFFF)
    return np.array([word - 2**32 * (word >= 2**31) for word in words], "int32")


def fold_in(key, number, stream: int = 0):
    """Derives the keys of substreams from `key`.

    Args:
        key: int32, with shape `(2,)`, or `(keys, 2)` with a scalar `number`; or `(3,)`, as in `on_device`.
        number: integers of any shape: the indices of the substreams.
        stream: the family of substreams, such as `TRAINING`, or any other integer.

    Returns:
        An int32 tensor of shape `(*number.shape, 2)`, or `(keys, 2)`; 3 in place of 2 if the key has three words.
    """
    number = ops.cast(number, "int32")
    words = threefry((key[..., 0], key[..., 1]), (number, ops.zeros_like(number) + stream))
    if key.shape[-1] == 3:
        words = (*words, ops.broadcast_to(key[2], ops.shape(words[0])))
    return ops.stack(words, axis=-1)


def on_device(key, batch):
    """The key for what is drawn of `batch` rows on this device, which may be a part of those of several.

    Args:
        key: int32, shape `(2,)`.
        batch: how many rows there are here.

    Returns:
        The key itself; or, where several devices work on parts of one batch, `(3,)`, with the number of the first row:
        `uniform` and `normal` draw the numbers that these rows have in the whole batch.
    """
    first = backend.first_row(batch)
    if first is None:
        return key
    first = ops.reshape(ops.cast(first, "int32"), (1,))
    return ops.concatenate([ops.convert_to_tensor(key, "int32"), first])


def of_whole(draw: Callable, batch, key):
    """`draw(batch, key)`, of which a row depends on all others: of the whole batch, this device's rows.

    Args:
        draw: what gives one row a sample.
        batch: how many rows there are here.
        key: as in `on_device`.
    """
    if len(key.shape) != 1 or key.shape[0] != 3:
        return draw(batch, key)
    whole = draw(backend.whole_batch(batch), key[:2])
    return ops.take(whole, key[2] + ops.arange(batch, dtype="int32"), axis=0)


class Keys:
    """An iterator over fresh keys: call n of `next(keys)` returns `fold_in(key, n)`.

    It is not a generator function, because PyTorch's compiler would run an infinite generator to its end.

    Args:
        key: int32, with shape `(2,)`.
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
        key: int32, with shape `(2,)`: one stream for all samples; or `(samples, 2)`: one stream per sample, of which
            sample `first` is drawn; or `(3,)`, as in `on_device`.
        shape: the shape of the result, `(samples, ...)`. On TensorFlow its entries may be tensors.
        first: the index of the first sample, so that consecutive batches continue each other.
    """
    return _draw(key, shape, first, lambda u0, u1: (u0, u1))


def normal(key, shape, first=0):
    """Standard normal float32 numbers, by the method of Box and Muller (1958): z = sqrt(-2 ln u0) (cos, sin)(2 pi u1).

    With 24 bits, u0 >= 2^-24 and |z| <= 5.77. The arguments are those of `uniform`.
    """
    return _draw(key, shape, first, _box_muller)


@backend.fused
def _box_muller(u0, u1):
    radius = ops.sqrt(-2.0 * ops.log(u0 + 2.0**-24))
    angle = (2.0 * np.pi) * u1
    return radius * ops.cos(angle), radius * ops.sin(angle)


def _draw(key, shape, first, transform):
    """Two numbers per counter: the first of each pair fill the first half of a sample, the second the other half."""
    samples, size = shape[0], math.prod(shape[1:])
    single = len(key.shape) == 1
    numbers = ops.arange(samples, dtype="int32")[:, None] if single else 0
    first = first + key[2] if single and key.shape[0] == 3 else first
    places = ops.arange((size + 1) // 2, dtype="int32")[None, :]
    words = threefry((key[..., 0:1], key[..., 1:2]), (numbers + first, places))
    pair = transform(*(ops.cast(_shift_right(word, 8), "float32") * 2.0**-24 for word in words))
    return ops.reshape(ops.concatenate(pair, axis=-1)[:, :size], (samples, *shape[1:]))


def slerp(a, b, fractions):
    """Spherical linear interpolation from noise `a` to noise `b`, which preserves the norm of noise (Shoemake 1985):

        (sin((1 - f) angle) a + sin(f angle) b) / sin(angle),    cos(angle) = <a, b> / (|a| |b|)

    If the two are parallel, the interpolation is linear.

    Args:
        a: an array of any shape.
        b: an array of the same shape.
        fractions: f, with shape `(count,)`; 0 gives `a` and 1 gives `b`.

    Returns:
        A float32 array with shape `(count, ...)`.
    """
    a, b, f = (np.asarray(ops.convert_to_numpy(value), "float64") for value in (a, b, fractions))
    if a.shape != b.shape:
        raise ValueError(f"slerp: `a` and `b` must have the same shape; received: {a.shape} and {b.shape}")
    cosine = np.clip(np.sum(a * b) / np.maximum(np.linalg.norm(a) * np.linalg.norm(b), 1e-30), -1.0, 1.0)
    f, angle = f.reshape(-1, *[1] * a.ndim), np.arccos(cosine)
    if np.sin(angle) < 1e-6:
        return ((1 - f) * a + f * b).astype("float32")
    return ((np.sin((1 - f) * angle) * a + np.sin(f * angle) * b) / np.sin(angle)).astype("float32")


__getattr__ = deprecated.names(__name__, fold="fold_in")
