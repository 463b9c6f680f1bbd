"""The pre-normalised residual connection that attention and feed-forward blocks share."""

from typing import Any

import keras
from keras import ops

from kdiff import backend
from kdiff.base import check_number
from kdiff.blocks.base import (
    Block,
    apply_layer,
    build_layer,
    check_given,
    copy_layer,
    derive_seed,
    dropout_layer,
    dropped,
    kernel_initializer,
    over_positions,
)
from kdiff.blocks.layers import Dense

__all__ = []


class _Branch(Block):
    """A pre-normalised residual: `(x + drop_path(gate * dropout(branch(norm(x, embed))))) / rescale`.

    A subclass defines its own arguments and passes the others, `**options`, to this constructor; `_build_branch` builds
    its layers, the last of which is initialised to zero if `self.starts_at_zero`; `_branch` calls them. With `gated`,
    as in AdaLN-Zero (Peebles & Xie, "Scalable Diffusion Models with Transformers", 2022, section 3.2),
    `gate = Dense(silu(embed))` is initialised to zero in place of the last layer: if both were zero, neither would
    receive a gradient.
    """

    def __init__(
        self,
        normalization: Any = "layer_norm",
        dropout: float = 0.0,
        zero: bool = True,
        gated: bool = False,
        drop_path: float = 0.0,
        rescale: float = 1.0,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_number(type(self).__name__, "dropout", dropout, 0, 1)
        check_number(type(self).__name__, "drop_path", drop_path, 0, 1)
        check_number(type(self).__name__, "rescale", rescale, 1e-6)
        self.normalization = copy_layer(normalization, name="normalization", dtype=self.dtype_policy)
        self.dropout = dropout
        self.zero = zero
        self.gated = gated
        self.drop_path = drop_path
        self.rescale = rescale
        self.seed = seed

    @classmethod
    def _argument_defaults(cls):
        """The arguments of the subclass, followed by those that it passes on."""
        own, shared = super()._argument_defaults(), super(_Branch, _Branch)._argument_defaults()
        return own | {name: default for name, default in shared.items() if name not in own}

    @property
    def starts_at_zero(self) -> bool:
        """Whether the last layer of the branch is initialised to zero."""
        return self.zero and not self.gated

    def build(self, x_shape, embed_shape=None, context_shape=None):
        """Builds the normalisation, the branch and, if there is one, the gate."""
        self._build_branch(x_shape, context_shape)
        build_layer(self.normalization, x_shape, embed_shape)
        self.drop = dropout_layer(self)
        self.gate = self._build_gate(x_shape[-1], embed_shape) if self.gated else None
        of_examples = {"noise_shape": (None, *[1] * (len(x_shape) - 1)), "seed": derive_seed(self.seed, 1)}
        self.drop_example = keras.layers.Dropout(self.drop_path, dtype=self.dtype_policy, **of_examples)

    def _build_gate(self, width, embed_shape):
        check_given(self, "embed", embed_shape, "one vector per example, for the gate")
        initializer = kernel_initializer(self.zero)
        layer = Dense(width, name="gate", kernel_initializer=initializer, dtype=self.dtype_policy)
        layer.build(embed_shape)
        return layer

    def call(self, x, embed=None, context=None, training=None):
        """Maps a map or tokens to the same shape; for `embed` and `context` see the class."""
        return self.residual(x, self._branch(self.normed(x, embed, training), context), embed, training)

    def normed(self, x, embed=None, training=None):
        """The input of the branch."""
        return apply_layer(self.normalization, x, embed, training=training)

    def residual(self, x, y, embed=None, training=None):
        """The residual sum of `x` and the output of the branch, `y`."""
        y = dropped(self.drop_example, dropped(self.drop, y, training), training)
        if self.gate is None:
            y = x + y
        else:
            check_given(self, "embed", embed, "one vector per example, for the gate")
            y = backend.scaled(y, over_positions(self.gate(ops.silu(embed)), x), x)
        return y if self.rescale == 1 else y / self.rescale
