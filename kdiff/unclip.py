"""DALL-E 2: a prior from text to image embeddings, and a decoder from embeddings to images.

    unclip = UnCLIP(prior, decoder, twice, clip=clip)
    images = unclip.sample(4, text="a red circle", best_of=2, decoder={"guidance": 3.0})
    others = unclip.variations(images, 3)
    between = unclip.interpolate(images[0], images[1], 8)
    edited = unclip.difference(images[0], "a blue circle", "a red circle", [0.0, 0.25, 0.5])

Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents" (2022):

    z_i ~ prior(z_i | text),    x ~ decoder(x | z_i, text)

Each part is a `DiffusionModel`, trained and evaluated on its own: the prior on embeddings, such as those of a
`Contrastive`, with `networks.PriorTransformer` and the prediction "data"; the decoder on images, with the embedding as
a condition, a `blocks.ImageEmbedding`; upsamplers are the later stages of a `Cascade`.
"""

import random as py_random
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff.base import Configurable, check_integer
from kdiff.blocks.resizing import resized
from kdiff.cascade import Cascade, stage_seed
from kdiff.checks import check_examples
from kdiff.codecs.base import to_unit
from kdiff.encoders import Prompt
from kdiff.encoders.base import Encoder
from kdiff.model import DiffusionModel
from kdiff.model.condition_inputs import condition_names, condition_nulls, optional_names
from kdiff.model.sampling import as_sampler
from kdiff.model.saving import SafeFiles
from kdiff.random import slerp
from kdiff.solvers import DDIM
from kdiff.text import is_text

__all__ = ["UnCLIP"]


class UnCLIP(SafeFiles, Configurable, keras.Model):
    """A prior, a decoder and upsamplers as one object for sampling. Only its parts are trained.

    It is saved and loaded like any Keras model, `unclip.save("unclip.keras")`, with all its parts.

    Args:
        prior: a built `DiffusionModel` of embeddings, (batch, width); None if only variations of images are needed.
        decoder: a built `DiffusionModel` of images with the embedding as a condition.
        upsamplers: `DiffusionModel`s as the later stages of a `Cascade`, possibly none.
        clip: embeds images and texts by its methods `embed_image(images)` and `embed_text(texts)`, such as a
            `Contrastive` or an `encoders.Pair`; None if neither `best_of` nor images are used.
        embedding: the name of the condition of the decoder.
        name: the name of the model.

    Raises:
        ValueError: if the decoder has no such condition, or its width differs from that of the embeddings of the prior.
    """

    def __init__(
        self,
        prior: DiffusionModel | None,
        decoder: DiffusionModel,
        *upsamplers: DiffusionModel,
        clip: Any = None,
        embedding: str = "embedding",
        name: str | None = None,
    ):
        super().__init__(name=name, dtype="float32", autocast=False)
        for model in (prior, decoder):
            if not isinstance(model, DiffusionModel) and (model is not None or model is decoder):
                raise TypeError(f"UnCLIP: `prior` and `decoder` must be DiffusionModels; received: {model!r}")
        self.prior, self.decoder, self.upsamplers = prior, decoder, list(upsamplers)
        self.clip, self.embedding = clip, embedding
        self.cascade = Cascade([decoder, *upsamplers]) if upsamplers else None
        if embedding not in (condition_names(decoder.network) or ()):
            raise ValueError(
                f"UnCLIP: the decoder must have the condition {embedding!r}; it has: {condition_names(decoder.network)}"
            )
        if prior is not None and prior.built and decoder.built:
            made, wanted = prior.example or prior.shapes["image"][1:], decoder.shapes[embedding][1:]
            if tuple(made) != tuple(wanted):
                raise ValueError(f"UnCLIP: the prior returns {made}, but the decoder takes {wanted} as {embedding!r}")
        self.built = True

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, serialised, and for each frozen encoder the first equal one."""
        upsamplers = [keras.saving.serialize_keras_object(one) for one in self.upsamplers]
        ids = [id(encoder) for encoder in self._encoders()]
        return {**Configurable.get_config(self), "upsamplers": upsamplers, "same": [ids.index(one) for one in ids]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "UnCLIP":
        """The object that `get_config` described."""
        made = {name: keras.saving.deserialize_keras_object(value) for name, value in config.items()}
        same = made.pop("same")
        unclip = cls(made.pop("prior"), made.pop("decoder"), *made.pop("upsamplers"), **made)
        encoders = unclip._encoders()
        wanted = iter([encoders[first] for first in same][len(unclip._encoder_of_clip()) :])
        for prompt in unclip._prompts():
            own = [next(wanted) for _ in prompt.encoders]
            if any(a is not b for a, b in zip(own, prompt.encoders, strict=True)):
                prompt.replace_encoders(own)
        return unclip

    def _encoder_of_clip(self) -> list[Encoder]:
        return [one for one in [getattr(self.clip, "text", None)] if isinstance(one, Encoder)]

    def _prompts(self) -> list[Prompt]:
        """The text conditions of all parts with frozen encoders, and that of `clip`."""
        layers = [getattr(model.network, "conditions", None) for model in self._models]
        found = [layer for some in layers if isinstance(some, dict) for layer in some.values()]
        found.append(getattr(self.clip, "text", None))
        return [layer for layer in found if isinstance(layer, Prompt)]

    def _encoders(self) -> list[Encoder]:
        """The text encoders of all parts, of which several may be the same."""
        return [*self._encoder_of_clip(), *(encoder for prompt in self._prompts() for encoder in prompt.encoders)]

    def fit(self, *args, **options):
        """Raises a NotImplementedError, as do `evaluate` and `predict`: use those of its parts."""
        raise NotImplementedError("UnCLIP: train and evaluate each part on its own:  `prior.fit`, `decoder.fit`")

    evaluate = predict = fit

    def call(self, inputs, training=None):
        """Raises a NotImplementedError: it only samples."""
        raise NotImplementedError("UnCLIP: it has no output for an input; use `unclip.sample(8, text=...)`")

    # From text

    def sample(
        self,
        num_samples: int,
        *,
        best_of: int = 1,
        prior: Mapping[str, Any] | None = None,
        decoder: Mapping[str, Any] | None = None,
        upsampling: Mapping[str, Any] | None = None,
        seed: int | None = 0,
        batch_size: int = 64,
        verbose: bool = False,
        **conditions,
    ) -> np.ndarray:
        """Samples embeddings from the prior, and images from the decoder.

        Args:
            num_samples: the number of samples.
            best_of: the number of embeddings that the prior draws for each sample, of which the one with the largest
                inner product with the embedding of the text is kept (2 in section 2.2).
            prior, decoder: arguments of the `sample` of that model, such as {"guidance": 4.0, "steps": 25}.
            upsampling: arguments of `Cascade.sample`.
            seed: for the noise of the prior; that of the decoder is `cascade.stage_seed(seed, 1)`. Or a list, one per
                sample. None draws one.
            batch_size: the number of samples drawn at once.
            verbose: show progress bars.
            **conditions: as in `DiffusionModel.sample`, including text; each is passed to the parts that take it.

        Returns:
            A float32 array, in [-1, 1].
        """
        self._check_prior()
        self._check_names(conditions, self._models)
        seed = _seed(seed)
        options = {"seed": seed, "batch_size": batch_size, "verbose": verbose}
        z = self.embeddings(num_samples, best_of=best_of, options=prior, **options, **self._of(self.prior, conditions))
        conditions = {name: value for one in self._stages for name, value in self._of(one, conditions).items()}
        return self._images(z, conditions, decoder, upsampling, **{**options, "seed": stage_seed(seed, 1)})

    def embeddings(
        self,
        num_samples: int,
        *,
        best_of: int = 1,
        options: Mapping[str, Any] | None = None,
        seed: int | None = 0,
        batch_size: int = 64,
        verbose: bool = False,
        **conditions,
    ) -> np.ndarray:
        """Image embeddings from the prior, (num_samples, width); `options` are arguments of its `sample`."""
        self._check_prior()
        for name, value in {"num_samples": num_samples, "best_of": best_of}.items():
            check_integer("UnCLIP", name, value)
        if best_of > 1 and (self.clip is None or not is_text(conditions.get("text"))):
            raise ValueError("UnCLIP: `best_of` above 1 needs a `clip`, and a `text` of strings")
        rows = self.prior.condition_rows(conditions, num_samples)
        rows = {name: np.repeat(value, best_of, axis=0) for name, value in rows.items()}
        if best_of > 1 and np.ndim(seed):  # the first candidate of a seed equals that without `best_of`
            seed = [one if k == 0 else stage_seed(one, k + 1) for one in seed for k in range(best_of)]
        options = {**(options or {}), "seed": seed, "batch_size": batch_size, "verbose": verbose}
        z = self.prior.sample(num_samples * best_of, **options, **rows)
        if best_of == 1:
            return z
        text = np.atleast_1d(np.asarray(conditions["text"], dtype=object))
        text = np.broadcast_to(self.clip.embed_text(list(text)), (num_samples, z.shape[-1]))
        z = z.reshape(num_samples, best_of, -1)
        best = np.argmax(np.einsum("nkd,nd->nk", z, text), axis=1)
        return z[np.arange(num_samples), best]

    # From images

    def variations(
        self,
        images: Any,
        count: int = 4,
        *,
        eta: float | None = None,
        decoder: Mapping[str, Any] | None = None,
        upsampling: Mapping[str, Any] | None = None,
        seed: int | None = 0,
        batch_size: int = 64,
        **conditions,
    ) -> np.ndarray:
        """Images with the same embedding, `count` consecutive ones for each image (section 3.1).

        Args:
            images: one, or several in a batch: integers, or floats in [-1, 1].
            count: the number of variations of each.
            eta: None for new noise; in [0, 1] they start from the noise to which `invert` maps the image, and are drawn
                by `DDIM(eta)`: at 0 they reproduce the image, and vary more with larger values. Grid, steps and
                guidance are those of the `sampler` in `decoder`, or of the decoder's own.
            decoder, upsampling, seed, batch_size: as in `sample`.
            **conditions: of the decoder and the upsamplers; null if omitted.
        """
        images, z = self._given(images, batch_size)
        z, decoder = np.repeat(z, count, axis=0), dict(decoder or {})
        if eta is not None:
            noise = self._inverted(images, z[::count], decoder, conditions, batch_size)
            decoder |= {"x": np.repeat(noise, count, axis=0), "sampler": self._sampler(decoder, eta)}
        return self._images(z, conditions, decoder, upsampling, seed=seed, batch_size=batch_size)

    def interpolate(
        self,
        a: Any,
        b: Any,
        count: int = 8,
        *,
        noise: bool = True,
        decoder: Mapping[str, Any] | None = None,
        upsampling: Mapping[str, Any] | None = None,
        seed: int | None = 0,
        batch_size: int = 64,
        **conditions,
    ) -> np.ndarray:
        """Images from `a` to `b`, by spherical interpolation of their embeddings and noise (section 3.2).

        Args:
            a, b: one image each.
            count: the number of images, including both ends.
            noise: whether the noise is interpolated from that of `a` to that of `b`, by `invert`; otherwise it is
                fixed.
            decoder, upsampling, seed, batch_size, conditions: as in `variations`.
        """
        check_integer("UnCLIP", "count", count, 2)
        images, z = self._given(np.stack([self._one(a), self._one(b)]), batch_size)
        fractions, decoder = np.linspace(0, 1, count), dict(decoder or {})
        if noise:
            ends = self._inverted(images, z, decoder, conditions, batch_size)
            decoder |= {"x": slerp(*ends, fractions), "sampler": self._sampler(decoder, 0.0)}
        seeds = [_seed(seed)] * count  # the same noise for all
        return self._images(slerp(*z, fractions), conditions, decoder, upsampling, seed=seeds, batch_size=batch_size)

    def difference(
        self,
        image: Any,
        after: str,
        before: str = "",
        fractions: Sequence[float] = (0.0, 0.15, 0.3, 0.45),
        *,
        decoder: Mapping[str, Any] | None = None,
        upsampling: Mapping[str, Any] | None = None,
        seed: int | None = 0,
        batch_size: int = 64,
        **conditions,
    ) -> np.ndarray:
        """Edits an image along the difference of two texts (section 3.3, "text diffs"):

            d = (z_after - z_before) / |z_after - z_before|,    z = slerp(z_i, |z_i| d, fraction)

        starting from the noise to which `invert` maps the image.

        Args:
            image: one image.
            after: a description of the desired image.
            before: a description of the given image.
            fractions: the strengths, one image each; the paper uses up to 0.25 to 0.5.
            decoder, upsampling, seed, batch_size, conditions: as in `variations`.
        """
        images, z = self._given(self._one(image)[None], batch_size)
        texts = np.asarray(self.clip.embed_text([after, before]))
        way = texts[0] - texts[1]
        length = np.linalg.norm(way)
        if length < 1e-6:
            raise ValueError(f"UnCLIP: `after` and `before` must differ; received: {after!r} and {before!r}")
        fractions, decoder = np.asarray(fractions, "float64"), dict(decoder or {})
        noise = self._inverted(images, z, decoder, conditions, batch_size)
        decoder |= {"x": np.repeat(noise, len(fractions), axis=0), "sampler": self._sampler(decoder, 0.0)}
        z = slerp(z[0], np.linalg.norm(z[0]) / length * way, fractions)
        return self._images(z, conditions, decoder, upsampling, seed=seed, batch_size=batch_size)

    # Parts

    def _check_prior(self) -> None:
        if self.prior is None:
            raise ValueError("UnCLIP: it has no prior for texts; use `variations`")

    @property
    def _models(self) -> list[DiffusionModel]:
        return [*([] if self.prior is None else [self.prior]), *self._stages]

    @property
    def _stages(self) -> list[DiffusionModel]:
        return [self.decoder, *self.upsamplers]

    def _check_names(self, conditions, models) -> None:
        known = {name for model in models for name in _names(model)} - {self.embedding}
        if unknown := sorted(set(conditions) - known):
            raise ValueError(f"UnCLIP: no part takes {unknown}; the parts take {sorted(known)}")

    @staticmethod
    def _of(model: DiffusionModel, conditions) -> dict[str, Any]:
        """The conditions that the model takes."""
        return {name: value for name, value in conditions.items() if name in _names(model)}

    def _images(self, z, conditions, decoder, upsampling, *, seed, batch_size=64, verbose=False) -> np.ndarray:
        """The images for embeddings."""
        self._check_names(conditions, self._stages)
        options = {"seed": seed, "batch_size": batch_size, "verbose": verbose}
        given = {**self._decoded_of(conditions), self.embedding: z}
        images = self.decoder.sample(len(z), **{**options, **(decoder or {})}, **given)
        if self.cascade is None:
            return images
        given = {name: value for model in self.upsamplers for name, value in self._of(model, conditions).items()}
        return self.cascade.sample(len(z), low=images, **{**options, **(upsampling or {})}, **given)

    def _decoded_of(self, conditions) -> dict[str, Any]:
        """The conditions of the decoder; omitted ones are null if they have a null input."""
        nulls = condition_nulls(self.decoder.network)
        absent = dict.fromkeys(name for name in condition_names(self.decoder.network) if name in nulls)
        return {**absent, **self._of(self.decoder, conditions)}

    @staticmethod
    def _one(image: Any) -> np.ndarray:
        image = np.asarray(image)
        return image[0] if image.ndim == 4 and len(image) == 1 else image

    def _given(self, images: Any, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """(images at the size of the decoder, in [-1, 1]; their embeddings)."""
        if self.clip is None:
            raise ValueError("UnCLIP: embedding images needs a `clip`")
        images = np.asarray(images)
        images = images[None] if images.ndim == 3 else images
        check_examples(images, 1.0, "images")
        images = to_unit(ops.convert_to_tensor(images))
        shapes = getattr(self.clip, "shapes", None)
        seen = self._sized(images, None if shapes is None else shapes["image"][1:-1])
        return self._sized(images, self.decoder.example[:-1]), self.clip.embed_image(seen, batch_size)

    @staticmethod
    def _sized(images, size) -> np.ndarray:
        """Images resized to a known size, and clipped, as bicubic interpolation overshoots [-1, 1]."""
        known = size is not None and None not in size
        images = resized(images, tuple(size), "bicubic") if known else images
        return np.clip(ops.convert_to_numpy(images), -1.0, 1.0)

    def _inverted(self, images, z, options, conditions, batch_size) -> np.ndarray:
        """The noise that the decoder maps to the images."""
        kept = {name: options[name] for name in ("guidance", "steps", "schedule", "ema") if name in options}
        given = {**self._decoded_of(conditions), self.embedding: z}
        return self.decoder.invert(images, sampler=self._sampler(options, 0.0), batch_size=batch_size, **kept, **given)

    def _sampler(self, options, eta: float) -> Any:
        """The given sampler, or that of the decoder, with DDIM."""
        given = options.get("sampler")
        sampler = self.decoder.sampler if given is None else as_sampler(given)
        return sampler.replaced(solver=DDIM(eta), **({"steps": options["steps"]} if "steps" in options else {}))


def _seed(seed: Any) -> Any:
    """The seed, or a random one for None, from which those of all parts are derived."""
    return py_random.randrange(2**32) if seed is None else seed


def _names(model: DiffusionModel) -> tuple[str, ...]:
    return (*(condition_names(model.network) or ()), *optional_names(model.network))
