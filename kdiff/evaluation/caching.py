"""References on disk: features of real examples are made once for all runs."""

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
    """A hash of the examples, whatever their order: the sum of the SHA-256 of each, modulo 2^256, and their number.

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
    """The features of real examples, from a file of `folder` if they were made before.

        reference = evaluation.cached_reference(features, train_images, "~/.cache/features")
        fd = evaluation.FrechetDistance(features, reference)

    The file's name is a hash of the examples, in any order, of the network with its weights, and of what is done to
    images before. Whatever of these changes, there is another file; nobody removes old ones.

    Args:
        features: whose network is a Keras model, and whose `prepare` is an `Images`, or None.
        examples: an array, or what gives batches each time that it is iterated over, such as a dataset: it is read
            for the hash, and once more if there is no file.
        folder: of the files; made if it is not there.

    Raises:
        TypeError: if `features` is no `Extractor`, or `examples` can be read only once.
        ValueError: if what makes the features has no hash, or the file is damaged.
    """
    if not isinstance(features, Extractor):
        raise TypeError(f"cached_reference: `features` must be an Extractor; received: {features!r}")
    if hasattr(examples, "__next__"):
        raise TypeError(f"cached_reference: an iterator is read only once; give what it comes from: {examples!r}")
    signature = hashlib.sha256(f"{features.signature()} {fingerprint(examples)}".encode()).hexdigest()
    path = Path(folder).expanduser() / f"{signature[:40]}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                return Reference(file["features"])
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a whole file of features; to make it anew, remove it: {error}") from error
    made = Reference(features_of(features, examples))
    with replacing(path) as new:
        np.savez(new, features=made.features, description=features.description)
    return made
