"""Training an autoencoder with Keras' own `fit`: all losses in one sum, each with its own gradients."""

import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend, random
from kdiff.autoencoding.terms import Term
from kdiff.base import Configurable, check_choice, check_integer, check_number
from kdiff.checks import check_examples
from kdiff.codecs import Pixels
from kdiff.codecs.base import to_unit
from kdiff.model.feeding import BatchCheck
from kdiff.model.training import OwnLoss

__all__ = ["ERRORS", "AutoencoderTrainer", "balanced"]

ERRORS = {"l1": ops.abs, "l2": ops.square}


class AutoencoderTrainer(OwnLoss, Configurable, keras.Model):
    """A Keras model that trains an autoencoder:

        loss = mean |x - y|^p + sum_k weight_k term_k(x, y) + kl KL / N           of the autoencoder
             - w mean D'(y) + mean relu(1 - D(x)) / 2 + mean relu(1 + D(y')) / 2    of both networks

    y is the decoded image, KL the divergence of its latents from N(0, 1), summed, and N the number of values in an
    image, so that `kl` has its usual meaning for sums over an image. With a codebook the KL term is replaced by
    |sg(z) - code|^2 + commitment |z - sg(code)|^2. D is a discriminator; D' has the same weights and y' the values of
    y, both without gradients: each network receives the gradient of its own loss, while Keras' optimizer, accumulation,
    clipping and saving are unchanged. Rombach et al. (2022), appendix G; Esser et al., "Taming Transformers" (2021),
    section 3.1; hinge losses of Lim & Ye (2017).

        trainer = AutoencoderTrainer(AutoencoderKL((32, 64, 64)), terms=[Laplacian(), MSSSIM()])
        trainer.compile("adam")
        trainer.fit(images, epochs=20)
        codec = codecs.Latent.fitted(trainer.autoencoder, images)

    Args:
        autoencoder: one of `kdiff.networks`; it is built if needed, and made trainable.
        reconstruction: "l1" or "l2", the absolute or the squared error of the pixels.
        terms: further `Term`s, such as `Laplacian()` or `Features(network)`.
        kl: the weight of the KL term.
        commitment: the weight of the distance of latents to their codes.
        discriminator: a Keras model of images, such as `PatchDiscriminator()`; None for none.
        adversarial: w, the weight of the adversarial term.
        start: the step from which the discriminator is trained and used.
        balance: whether the gradient of the adversarial term at y is scaled to that of the other terms (Esser et al.,
            equation 6, at the image instead of the last kernel of the decoder; Défossez et al., "High Fidelity Neural
            Audio Compression", 2022, section 3.4).
        seed: for the random numbers.
        name: the name of the model.
    """

    def __init__(
        self,
        autoencoder: keras.Model,
        *,
        reconstruction: str = "l1",
        terms: Sequence[Term] = (),
        kl: float = 1e-6,
        commitment: float = 0.25,
        discriminator: keras.Model | None = None,
        adversarial: float = 0.5,
        start: int = 0,
        balance: bool = True,
        seed: int = 0,
        name: str | None = None,
    ):
        super().__init__(name=name, dtype="float32", autocast=False)
        owner = type(self).__name__
        check_choice(owner, "reconstruction", reconstruction, tuple(ERRORS))
        for argument, value in {"kl": kl, "commitment": commitment, "adversarial": adversarial}.items():
            check_number(owner, argument, value, 0.0)
        check_integer(owner, "start", start, 0)
        unknown = [term for term in terms if not isinstance(term, Term)]
        if unknown or not hasattr(autoencoder, "encode"):
            raise TypeError(f"{owner}: an autoencoder and `Term`s are expected; received: {unknown or autoencoder!r}")
        random.key_of(seed)
        self.autoencoder, self.discriminator = autoencoder, discriminator
        self.reconstruction, self.terms = reconstruction, list(terms)
        self.kl, self.commitment, self.adversarial = kl, commitment, adversarial
        self.start, self.balance, self.seed = start, balance, seed
        if not autoencoder.built:
            autoencoder.build(None)
        autoencoder.trainable = True
        if discriminator is not None and not discriminator.built:
            discriminator.build((None, None, None, autoencoder.channels))
        for term in self.terms:
            term.built = True
        self.step = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="step")
        self._means = [keras.metrics.Mean(name=part) for part in self.parts]
        self.built = True

    @property
    def parts(self) -> list[str]:
        """The names of the reported parts of the loss."""
        regular = "codebook" if hasattr(self.autoencoder, "nearest") else "kl"
        names = [self.reconstruction, regular, *_names(self.terms)]
        return names if self.discriminator is None else [*names, "judgement", "discriminator"]

    def compile(self, optimizer="adam", discriminator_optimizer=None, **options) -> None:
        """Keras' `compile`, without losses.

        Args:
            optimizer: of the autoencoder, and of the discriminator if it has no separate one.
            discriminator_optimizer: of the discriminator, with its own learning rate.
            options: as in `keras.Model.compile`.
        """
        optimizer, other = keras.optimizers.get(optimizer), discriminator_optimizer
        if other is not None:
            if self.discriminator is None:
                raise ValueError("compile: there is no discriminator for the `discriminator_optimizer`")
            other = keras.optimizers.get(other)
        self._optimizers = {"optimizer": optimizer, "discriminator_optimizer": other}
        if other is not None:
            paths = "|".join(re.escape(variable.path) for variable in self.discriminator.trainable_variables)
            table = keras.optimizers.OptimizerMap(optimizer, {paths: other})
            optimizer = keras.optimizers.MultiOptimizer(table)
        super().compile(optimizer, **options)

    @backend.uninterrupted
    def call(self, images, training: bool | None = None) -> dict[str, Any]:
        """The parts of the loss by name, and "loss", their sum."""
        x = to_unit(images)
        y, regular, weight = self._decoded(x, bool(training))
        parts, total = {}, 0.0
        judged = None
        if self.discriminator is not None:
            begun = ops.cast(self.step.value >= self.start, "float32")
            y, judged = _two(balanced(y, self.adversarial * begun)) if self.balance else (y, y)
        parts[self.reconstruction] = ops.mean(ERRORS[self.reconstruction](x - y))
        parts[self.parts[1]] = regular
        total = parts[self.reconstruction] + weight * regular
        for name, term in zip(_names(self.terms), self.terms, strict=True):
            parts[name] = ops.mean(term(x, y))
            total = total + term.weight * parts[name]
        if judged is not None:
            parts["judgement"], parts["discriminator"] = self._judged(x, y, judged, training)
            scale = 1.0 if self.balance else self.adversarial
            total = total + begun * (scale * parts["judgement"] + parts["discriminator"])
        if training and backend.has_numbers(self.step.value):
            self.step.assign_add(1)
        return {"loss": total, **parts}

    def _decoded(self, x, training):
        """(y, regular, weight): the decoded images, and the regulariser of the latents with its weight."""
        mean, log_variance = self.autoencoder.encode(x, training=training)
        if hasattr(self.autoencoder, "nearest"):
            codes, index = self.autoencoder.nearest(mean)
            code = self.autoencoder.codebook.lookup(index)
            own = ops.mean(ops.square(ops.stop_gradient(mean) - code))
            near = ops.mean(ops.square(mean - ops.stop_gradient(code)))
            return self.autoencoder.decode(codes, training, quantize=False), own + self.commitment * near, 1.0
        if log_variance is None:
            return self.autoencoder.decode(mean, training=training), ops.zeros(()), 0.0
        divergence = 0.5 * ops.sum(ops.square(mean) + ops.exp(log_variance) - 1.0 - log_variance, axis=(1, 2, 3))
        numbers = float(np.prod(x.shape[1:])) if None not in x.shape[1:] else ops.cast(ops.size(x[0]), "float32")
        latents = mean
        if training:
            key = random.fold_in(random.key_of(self.seed), self.step.value, random.TRAINING)
            key = random.on_device(key, ops.shape(mean)[0])
            latents = mean + ops.exp(0.5 * log_variance) * random.normal(key, ops.shape(mean))
        return self.autoencoder.decode(latents, training=training), ops.mean(divergence) / numbers, self.kl

    def _judged(self, x, y, judged, training):
        """(-mean D'(y), the discriminator's loss)."""
        constants = [(v, ops.stop_gradient(v.value)) for v in self.discriminator.variables]
        with keras.StatelessScope(constants):
            judgement = -ops.mean(self.discriminator(judged, training=training))
        real = self.discriminator(x, training=training)
        made = self.discriminator(ops.stop_gradient(y), training=training)
        return judgement, 0.5 * (ops.mean(ops.relu(1.0 - real)) + ops.mean(ops.relu(1.0 + made)))

    instead = "it reconstructs images: `reconstruct(images)`"

    def _taking(self) -> keras.Model:
        return self.autoencoder

    def _new_check(self, shapes: dict[str, tuple]) -> BatchCheck:
        shape = shapes.get("image", (None,) * 4)
        return BatchCheck(Pixels(), (*[None] * (len(shape) - 2), self.autoencoder.channels), self.autoencoder, False)

    def _batch(self, inputs: dict[str, Any]) -> Any:
        return inputs["image"]

    def reconstruct(self, images, batch_size: int = 16) -> np.ndarray:
        """Reconstructs images from the means of their latents, clipped to [-1, 1]; float32."""
        images = np.asarray(images)
        check_examples(images, 1.0)
        if images.ndim < 3 or images.shape[-1] != self.autoencoder.channels:
            raise ValueError(
                f"reconstruct: images must be a batch, (count, ..., {self.autoencoder.channels}); received the shape "
                f"{images.shape}"
            )
        backend.synchronise(self)
        run = backend.without_gradients(lambda part: self.autoencoder(to_unit(part), training=False))
        parts = [run(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
        return np.clip(np.concatenate([ops.convert_to_numpy(part) for part in parts]), -1.0, 1.0)


def balanced(x, weight):
    """x twice, (2, ...), for two losses; the gradient of the second is scaled to `weight` times that of the first.

    dx = g_0 + weight min(|g_0| / |g_1|, 1e4) g_1
    """

    @ops.custom_gradient
    def function(x, weight):
        def gradient(*arguments, upstream=None):
            upstream = arguments[0] if upstream is None else upstream
            own, other = upstream[0], upstream[1]
            ratio = ops.norm(ops.reshape(own, (-1,))) / (ops.norm(ops.reshape(other, (-1,))) + 1e-12)
            return own + weight * ops.minimum(ratio, 1e4) * other, ops.zeros_like(weight)

        return ops.stack([x, x]), gradient

    return function(x, ops.convert_to_tensor(weight, "float32"))


def _two(pair):
    return pair[0], pair[1]


def _names(terms: Sequence[Term]) -> list[str]:
    """A name for each term, numbered if a class occurs twice."""
    names = [type(term).__name__.lower() for term in terms]
    return [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
