"""References on disk: features of real examples, computed once for all runs."""

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from keras import ops

from kdiff.evaluation.base import batches_of, features_of
from kdiff.evaluation.extractors import Extractor
from kdiff.evaluation.reference import Reference
from kdiff.writing import replacing

__all__ = ["cached_reference", "fingerprint"]

_MODULUS = 2**256


def fingerprint(examples: Any) -> str:
    """A hash of the examples in any order: the sum of the SHA-256 of each, modulo 2^256, and their number.

    Args:
        examples: an array, or an iterable of batches.
    """
    total = count = 0
    for batch in batches_of(examples):
        for one in np.asarray(ops.convert_to_numpy(batch)):
            made = hashlib.sha256(f"{one.dtype.str}{one.shape}".encode())
            made.update(np.ascontiguousarray(one).tobytes())
            total, count = (total + int.from_bytes(made.digest())) % _MODULUS, count + 1
    return f"{total:064x}-{count}"


def cached_reference(features: Extractor, examples: Any, folder: str | os.PathLike) -> Reference:
    """The features of real examples, read from a file in `folder` if they were computed before.

        reference = evaluation.cached_reference(features, train_images, "~/.cache/features")
        fd = evaluation.FrechetDistance(features, reference)

    The name of the file is a hash of the examples, in any order, of the network with its weights, and of the image
    preprocessing. A change of any of these gives another file; old files are not removed.

    Args:
        features: an extractor whose network is a Keras model, and whose `prepare` is an `Images`, or None.
        examples: an array, or an iterable of batches that can be iterated repeatedly, such as a dataset: it is read for
            the hash, and again if there is no file.
        folder: of the files; created if it does not exist.

    Raises:
        TypeError: if `features` is not an `Extractor`, or `examples` can be read only once.
        ValueError: if the extractor has no hash, or the file is damaged.
    """
    if not isinstance(features, Extractor):
        raise TypeError(f"cached_reference: `features` must be an Extractor; received: {features!r}")
    if hasattr(examples, "__next__"):
        raise TypeError(f"cached_reference: an iterator can be read only once; pass its source; received: {examples!r}")
    signature = hashlib.sha256(f"{features.signature()} {fingerprint(examples)}".encode()).hexdigest()
    path = Path(folder).expanduser() / f"{signature[:40]}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                return Reference(file["features"])
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path}: not a complete file of features; remove it to compute it anew: {error}"
            ) from error
    made = Reference(features_of(features, examples))
    with replacing(path) as new:
        np.savez(new, features=made.features, description=features.description)
    return made
