"""A model that knows how it is to be sampled."""

from typing import Any

import keras

from kdiff.model import DiffusionModel
from kdiff.sampling import Sampler


class Pipeline(DiffusionModel):
    """A `DiffusionModel` whose `sample` takes `sampler` where none is given: what a pipeline of diffusers is.

    Args:
        network: as of `DiffusionModel`.
        schedule: as of `DiffusionModel`.
        prediction: as of `DiffusionModel`.
        sampler: a `Sampler`, a `Solver`, or the name of one.
        options: the other arguments of `DiffusionModel`, by name.
    """

    def __init__(self, network: keras.layers.Layer, schedule="cosine", prediction="velocity", sampler=None, **options):
        super().__init__(network, schedule, prediction, **options)
        sampler = Sampler() if sampler is None else sampler
        self.sampler = sampler if isinstance(sampler, Sampler) else Sampler(sampler)

    @classmethod
    def _argument_defaults(cls) -> dict[str, Any]:
        """Those of `DiffusionModel` too."""
        return {**super()._argument_defaults(), **DiffusionModel._argument_defaults()}

    def sample(self, num_samples: int, *, sampler=None, **options):
        """New examples, as of `DiffusionModel.sample`; without a `sampler`, by its own."""
        return super().sample(num_samples, sampler=self.sampler if sampler is None else sampler, **options)

    def sample_steps(self, num_samples: int, *, sampler=None, **options):
        """The same step by step, as of `DiffusionModel.sample_steps`; without a `sampler`, by its own."""
        return super().sample_steps(num_samples, sampler=self.sampler if sampler is None else sampler, **options)
