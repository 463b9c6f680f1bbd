"""Guidance by another network: a weaker one, a classifier, or the same one with its attention spoilt."""

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
    """Guidance by a bad version of the model itself (Karras et al. 2024, arXiv:2406.02507, eq. 3):

        x_hat = x_weak + scale (x_model - x_weak).

    Args:
        weak: a `DiffusionModel`, smaller or trained for less time, or any denoiser x_hat = weak(x, m) on the schedule
            of the run. A model is asked under those of the conditions that it takes, at the same log-SNR.
        scale: 1 is off; one number, or one a sample.
        ema: whether a weak model uses its averaged weights.
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
        """The weak model, if it is one."""
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
    """Guidance by a classifier (Dhariwal and Nichol 2021, arXiv:2105.05233, eq. 10 and algorithm 1):

        x_hat <- x_hat + scale (sigma^2 / alpha) grad log p(y | x_t),    the gradient by x_t.

    A classifier of clean images is asked about x_hat, log p(y | x_hat(x_t)), and the gradient goes through the network
    (Bansal et al. 2023, "Universal guidance", arXiv:2302.07121, section 3.1): no training on noise, for twice the work.

    Args:
        classifier: a Keras model that gives a logit for each class: of images as the model decodes them, in [-1, 1],
            `classifier(image)`; or, if `noisy`, of noisy ones, `classifier({"image": x_t, "time": label})`.
        scale: of the gradient; 1 samples from p(x) p(y | x); one number, or one a sample.
        labels: the classes y, one for all samples or one a sample; None for the condition "label".
        noisy: whether the classifier was trained on noisy images.
        time_label: a `TimeLabel` or its name: what a noisy classifier sees as time.
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
            raise ValueError(f"ClassifierGuidance: `labels` must be whole numbers from 0; received: {self.labels!r}")
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
        """The gradient of log p(labels | x) by x."""

        def log_probability(x):
            logits = ops.cast(self.classifier(inputs(x), training=False), "float32")
            chosen = labels[:, None] == ops.arange(logits.shape[-1], dtype=labels.dtype)  # none for the null class
            return ops.sum(ops.where(chosen, ops.log_softmax(logits, axis=-1), 0.0), axis=-1), None

        value, pull, _ = backend.vjp(log_probability, x)
        return pull(ops.ones_like(value))


class Seamless(Guidance):
    """Samples without a seam: what leaves a map at one edge comes back at the opposite one, so that copies side by side
    make a texture, or a panorama goes all the way round.

    In every question that this guidance passes on, the convolutions of kdiff's networks are padded by the opposite edge
    in place of zeros, whatever they were trained with. Given last, it holds for all guidance before it. Attention sees
    the whole map as it is, and positions that are added to it have an edge.

    Args:
        axes: which axes of an example close, 0 the height, 1 the width; None for all.

    Raises:
        ValueError: when it runs, if the network has no convolution of kdiff's.
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

    where x_perturbed comes from the same network with the identity in place of the attention map of some layers: each
    position attends to itself. It needs neither a condition nor training. Given before `ClassifierFree`, both of its
    questions are guided; given after, its result is.

    Args:
        scale: 0 is off; one number, or one a sample.
        layers: a regular expression, of which a part of the path of a `MultiHeadAttention` must be an instance:
            "bridge", the middle of a `UNet`, or "block_(4|5)/" of a `DiT`. `keras.layers.Layer.path` is the path.

    Raises:
        ValueError: when it runs, if no self-attention has such a path; the message lists those that there are.
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
