"""Guidance by another network: a weaker model, a classifier, or the same network with perturbed attention."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend, circular_padding, deprecated, identity_attention
from kdiff.base import check_integer
from kdiff.conversion import transfer
from kdiff.denoisers import Denoiser, Estimate
from kdiff.guidance.base import Guidance, Here, Run, check_scale, over
from kdiff.schedules import Marginal
from kdiff.times import TimeLabel

__all__ = ["Autoguidance", "ClassifierGuidance", "PerturbedAttention", "Seamless"]


class Autoguidance(Guidance):
    """Autoguidance, by a weaker version of the model itself (Karras et al. 2024, arXiv:2406.02507, eq. 3):

        x_hat = x_weak + scale (x_model - x_weak).

    Args:
        weak: a `DiffusionModel`, smaller or trained for fewer steps, or any denoiser x_hat = weak(x, m) on the schedule
            of the run. A model is called with those of the conditions that it takes, at the same log-SNR.
        scale: one number, or one per sample; 1 is off.
        ema: whether the weak model uses its averaged (EMA) weights.
    """

    arrays = ("scale",)

    @deprecated.arguments(averages="ema")
    def __init__(self, weak: Any, scale: Any = 2.0, ema: bool = True):
        if not callable(weak):
            raise TypeError(f"Autoguidance: `weak` must be a DiffusionModel or a denoiser; received: {weak!r}")
        check_scale("Autoguidance", scale)
        self.weak, self.scale, self.ema = weak, scale, ema

    @property
    def active(self) -> bool:
        """Whether any scale differs from 1."""
        return bool(np.any(np.asarray(self.scale) != 1.0))

    @property
    def models(self) -> tuple:
        """The weak model, if it is a Keras model."""
        return (self.weak,) if isinstance(self.weak, keras.Model) else ()

    def rows(self, run: Run):
        """The scale of each sample."""
        if self.models and not getattr(self.weak, "shapes", None):
            raise ValueError("Autoguidance: the weak model has no weights yet; train it, load it, or call `build`")
        return {"scale": run.rows(self, "scale", self.scale, ())}

    def guide(self, denoise: Denoiser, x, m: Marginal, here: Here) -> Estimate:
        estimate = denoise(x, m)
        x_weak = self._weak(denoise.conditions, here)(x, m)
        more = over(here.rows["scale"], x) - 1.0
        return estimate.guided(estimate.x_hat + more * (estimate.x_hat - x_weak))

    def _weak(self, conditions: Mapping[str, Any], here: Here) -> Callable:
        """x_weak = weak(x, m)."""
        if not self.models:
            return self.weak
        taken = {name: value for name, value in conditions.items() if name in self.weak.shapes}
        weak = partial(self.weak.denoise, ema=self.ema, **taken)
        return transfer(weak, self.weak.schedule, here.step(self).schedule)


class ClassifierGuidance(Guidance):
    """Classifier guidance (Dhariwal and Nichol 2021, arXiv:2105.05233, eq. 10 and algorithm 1):

        x_hat <- x_hat + scale (sigma^2 / alpha) grad log p(y | x_t),    the gradient with respect to x_t.

    A classifier of clean images is applied to x_hat, log p(y | x_hat(x_t)), and the gradient is backpropagated through
    the network (Bansal et al. 2023, "Universal guidance", arXiv:2302.07121, section 3.1): it needs no training on
    noisy images, at twice the cost.

    Args:
        classifier: a Keras model that returns one logit per class: `classifier(x_hat)`, of clean encoded data, which
            with the codec `Pixels` are images in [-1, 1], and with others their latents or wavelet coefficients; or, if
            `noisy`, `classifier({"image": x_t, "time": label})`.
        scale: the factor on the gradient; 1 samples from p(x) p(y | x). One number, or one per sample.
        labels: the classes y, one for all samples or one per sample; None: the condition "label".
        noisy: whether the classifier was trained on noisy images.
        time_label: the `TimeLabel`, or its name, of a noisy classifier.
    """

    arrays = ("scale", "labels")

    def __init__(
        self, classifier: keras.Model, scale: Any = 1.0, labels: Any = None, noisy: bool = False, time_label="scaled"
    ):
        if not isinstance(classifier, keras.layers.Layer):
            raise TypeError(f"ClassifierGuidance: `classifier` must be a Keras model; received: {classifier!r}")
        check_scale("ClassifierGuidance", scale)
        self.classifier, self.scale, self.labels, self.noisy = classifier, scale, labels, noisy
        self.time_label = TimeLabel.get(time_label)

    @property
    def models(self) -> tuple:
        """The classifier."""
        return (self.classifier,)

    def rows(self, run: Run):
        """The scale and the label of each sample."""
        rows = {"scale": run.rows(self, "scale", self.scale, ())}
        if self.labels is None:
            return rows
        labels = run.rows(self, "labels", self.labels, ())
        if np.any(labels != np.floor(labels)) or labels.min() < 0:
            raise ValueError(f"ClassifierGuidance: `labels` must be integers of at least 0; received: {self.labels!r}")
        return {**rows, "labels": labels.astype("int32")}

    def guide(self, denoise: Denoiser, x, m: Marginal, here: Here) -> Estimate:
        labels = here.rows.get("labels", denoise.conditions.get("label"))
        if labels is None:
            raise ValueError("ClassifierGuidance: the model has no condition 'label'; give `labels`")
        if self.noisy:
            estimate = denoise(x, m)
            time = ops.broadcast_to(self.time_label(here.step(self).schedule, m), ops.shape(x)[:1])
            gradient = self._gradient(lambda x: {"image": x, "time": time}, x, labels)
        else:
            estimate, pull = denoise.vjp(x, m)
            gradient = pull(self._gradient(lambda x: x, estimate.x_hat, labels))
        m = m.like(x)
        return estimate.guided(estimate.x_hat + over(here.rows["scale"], x) * m.sigma**2 / m.alpha * gradient)

    def _gradient(self, inputs, x, labels):
        """The gradient of log p(labels | x) with respect to x."""

        def log_probability(x):
            logits = ops.cast(self.classifier(inputs(x), training=False), "float32")
            chosen = labels[:, None] == ops.arange(logits.shape[-1], dtype=labels.dtype)  # none for the null class
            return ops.sum(ops.where(chosen, ops.log_softmax(logits, axis=-1), 0.0), axis=-1), None

        value, pull, _ = backend.vjp(log_probability, x)
        return pull(ops.ones_like(value))


class Seamless(Guidance):
    """Seamless samples by circular padding, for tileable textures and 360-degree panoramas.

    In every call of the denoiser by this guidance, the convolutions of kdiff's networks use circular padding instead of
    zeros, however they were trained. If it is last in the list, it applies to all guidance before it. Attention is
    unchanged, and added position embeddings still have edges.

    Args:
        axes: the axes of an example that are periodic, 0 the height, 1 the width; None: all.

    Raises:
        ValueError: when it runs, if the network has no convolution of kdiff.
    """

    def __init__(self, axes: Sequence[int] | None = None):
        if axes is not None:
            for axis in axes:
                check_integer("Seamless", "axes", axis, 0)
        self.axes = None if axes is None else tuple(axes)

    def guide(self, denoise: Denoiser, x, m: Marginal, here: Here) -> Estimate:
        with circular_padding.switched_on(self.axes):
            estimate = denoise(x, m)
        return estimate.guided(estimate.x_hat)


class PerturbedAttention(Guidance):
    """Perturbed-attention guidance, PAG (Ahn et al. 2024, arXiv:2403.17377, eqs. 9 and 10):

        x_hat <- x_hat + scale (x_hat - x_perturbed),

    where x_perturbed is the estimate of the same network with the attention maps of some layers replaced by the
    identity, so that each position attends only to itself. It needs neither a condition nor extra training. Before
    `ClassifierFree` in the list, it guides both of its estimates; after it, the result.

    Args:
        scale: one number, or one per sample; 0 is off.
        layers: a regular expression that is searched in the path of each `MultiHeadAttention` (`Layer.path`), such as
            "bridge" for the middle of a `UNet`, or "block_(4|5)/" for a `DiT`.

    Raises:
        ValueError: when it runs, if no self-attention layer matches; the message lists the available paths.
    """

    arrays = ("scale",)

    def __init__(self, scale: Any = 3.0, layers: str = "bridge"):
        check_scale("PerturbedAttention", scale)
        self.scale, self.layers = scale, layers

    @property
    def active(self) -> bool:
        """Whether any scale differs from 0."""
        return bool(np.any(np.asarray(self.scale) != 0.0))

    def rows(self, run: Run):
        """The scale of each sample."""
        return {"scale": run.rows(self, "scale", self.scale, ())}

    def guide(self, denoise: Denoiser, x, m: Marginal, here: Here) -> Estimate:
        estimate = denoise(x, m)
        with identity_attention.switched_on(self.layers):
            perturbed = denoise(x, m).x_hat
        return estimate.guided(estimate.x_hat + over(here.rows["scale"], x) * (estimate.x_hat - perturbed))
