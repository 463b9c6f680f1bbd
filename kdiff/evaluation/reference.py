"""The features of real examples with which samples are compared, and cached statistics of these."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

__all__ = ["Reference", "check_features"]


class Reference:
    """Features of real examples; or, for the Frechet distance alone, their mean and covariance.

    Statistics that scores need repeatedly, such as the covariance or the distance of each row to its k-th neighbour,
    are computed once, so pass the same object to all metrics.

    Args:
        features: float (count, features); None if there are only moments.
        mean: (features,), if there are no `features`.
        covariance: (features, features), the same.
        n: the number of examples; None if unknown.
    """

    def __init__(
        self,
        features: np.ndarray | None = None,
        mean: np.ndarray | None = None,
        covariance: np.ndarray | None = None,
        n: int | None = None,
    ):
        if (features is None) == (mean is None) or (mean is None) != (covariance is None):
            raise ValueError("Reference: pass features, or a mean and a covariance")
        self._cache: dict[Any, Any] = {}
        if features is not None:
            self._features = check_features("Reference", features)
            self.n, self.width = self._features.shape
            return
        mean, covariance = np.asarray(mean, "float64"), np.asarray(covariance, "float64")
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not np.isfinite(covariance).all():
            raise ValueError(
                "Reference: a mean (features,) and a finite covariance (features, features) are expected; received the "
                f"shapes {mean.shape} and {covariance.shape}"
            )
        self._features, self.n, self.width = None, n, len(mean)
        self._cache["mean"], self._cache["covariance"] = mean, covariance

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """The moments in an `.npz` file, `mu` and `sigma`, as published for the FID.

        Raises:
            ValueError: if the file is missing or damaged, or has no such arrays.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        with _arrays(path) as file:
            if missing := {"mu", "sigma"} - set(file.files):
                raise ValueError(f"{path}: it must have {sorted(missing)}; found: {sorted(file.files)}")
            return cls(mean=file["mu"], covariance=file["sigma"])

    @property
    def features(self) -> np.ndarray:
        """(n, features).

        Raises:
            ValueError: if there are only moments.
        """
        if self._features is None:
            raise ValueError(
                "Reference: it has only a mean and a covariance, which suffice only for the Frechet distance"
            )
        return self._features

    @property
    def has_features(self) -> bool:
        """Whether there are features, not only moments."""
        return self._features is not None

    @property
    def mean(self) -> np.ndarray:
        """(features,), float64."""
        return self.cached("mean", lambda: self.features.mean(0, dtype="float64"))

    @property
    def covariance(self) -> np.ndarray:
        """(features, features), float64, divided by n - 1."""
        if self.n is not None and self.n < 2:
            raise ValueError(f"Reference: a covariance needs at least 2 examples; received {self.n}")
        return self.cached("covariance", lambda: np.atleast_2d(np.cov(self.features.astype("float64").T)))

    def rows(self, chosen: np.ndarray) -> "Reference":
        """A reference with some of its rows."""
        return Reference(self.features[chosen])

    def cached(self, key: Any, compute: Callable[[], Any]) -> Any:
        """`compute()`, or its cached result for this key."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


def _arrays(path: Path) -> Any:
    """The arrays of an `.npz` file."""
    try:
        file = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a complete `.npz` file: {error}") from error
    if not hasattr(file, "files"):
        raise ValueError(f"{path}: it has a single array; a mean and a covariance, `mu` and `sigma`, are required")
    return file


def check_features(owner: str, features: Any) -> np.ndarray:
    """Checked features (count, features); 16-bit ones become float32.

    Raises:
        ValueError: if the shape is wrong, or values are not finite numbers.
    """
    features = np.asarray(features)
    features = features.astype("float32") if features.dtype.name == "bfloat16" else features
    if features.ndim != 2 or 0 in features.shape or features.dtype.kind not in "fiu":
        raise ValueError(
            f"{owner}: features must be numbers of the shape (count, features); received {features.dtype} of the shape "
            f"{features.shape}"
        )
    if features.dtype not in ("float32", "float64"):
        features = features.astype("float32")
    if not np.isfinite(features).all():
        raise ValueError(f"{owner}: the features have NaN or infinite values")
    return features
