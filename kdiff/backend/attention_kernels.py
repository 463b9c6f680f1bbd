"""Attention, in the form that is fastest on a backend."""

from typing import Any

from keras import ops

from kdiff.backend.running import BACKEND, on_cpu
from kdiff.backend.tangents import forward_mode_is_on

__all__ = ["HIDDEN", "attention"]


def attention(q: Any, k: Any, v: Any, mask: Any = None, bias: Any = None) -> Any:
    """`softmax(q k^T / sqrt(width) + bias) v` in each head, for q, k and v of the shape (batch, tokens, heads, width).

    Where a `mask`, (batch, query tokens, key tokens) or (batch, 1, key tokens), is False, the weight is 0. With the
    latter, queries without any key get 0; with the former each must have one. Logits and softmax are float32 for any
    type of q, k and v, since products overflow in float16. The `bias` is (batch or 1, heads, query tokens, key tokens),
    or None. PyTorch has a kernel that never stores the whole table of weights; JAX has one on accelerators, and
    computes by blocks on a CPU, unless the mask is per query, or there is a bias.
    """
    plain = forward_mode_is_on()
    if BACKEND == "torch" and not plain:
        return _attention_of_torch(q, k, v, mask, bias)
    if BACKEND == "jax" and not plain and on_cpu() and bias is None and (mask is None or mask.shape[1] == 1):
        y = _attention_by_blocks(q, k, v, mask)
    elif BACKEND == "jax" and not plain and mask is None and bias is None:
        y = ops.dot_product_attention(q, k, v)
    else:
        logits = _float32_product("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
        logits = logits if bias is None else logits + ops.cast(bias, "float32")
        logits = logits if mask is None else ops.where(mask[:, None], logits, HIDDEN)
        y = ops.einsum("bhqk,bkhd->bqhd", ops.cast(_softmax(logits), v.dtype), v)
    # Where all keys are masked, the softmax of equal logits is a mean.
    return y if mask is None or mask.shape[1] != 1 else ops.where(ops.any(mask, axis=-1)[..., None, None], y, 0)


def _float32_product(equation: str, x: Any, y: Any) -> Any:
    """The einsum of two tensors of the same type, accumulated and returned in float32.

    TensorFlow has no float32 product of 16-bit tensors, so they are cast first.
    """
    if BACKEND == "jax":
        import jax.numpy as jnp

        return jnp.einsum(equation, x, y, preferred_element_type="float32")
    return ops.einsum(equation, ops.cast(x, "float32"), ops.cast(y, "float32"))


def _softmax(logits: Any) -> Any:
    """The softmax over the last axis. On TensorFlow, the result of Keras' own keeps the logits as an attribute."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.nn.softmax(logits)
    return ops.softmax(logits, axis=-1)


HIDDEN = -1e30  # the logit of masked keys, finite, since a softmax of only infinities is NaN


def _attention_of_torch(q, k, v, mask, bias):
    """Attention by PyTorch's kernel, which on a CPU is slower for heads of 8 channels than of 16, so zeros are padded.

    It takes a mask or a bias in one argument.
    """
    import torch

    width = q.shape[-1]
    mask, scale = None if mask is None else mask[:, None], width**-0.5
    hidden = mask if bias is not None else None
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else torch.where(mask, bias, torch.finfo(q.dtype).min)
    if q.device.type == "cpu" and width < 16:
        q, k, v = (torch.nn.functional.pad(x, (0, 16 - width)) for x in (q, k, v))
    q, k, v = (torch.transpose(x, 1, 2) for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    if hidden is not None and hidden.shape[2] == 1:
        y = torch.where(torch.any(hidden, dim=-1)[..., None], y, 0)
    return torch.transpose(y[..., :width], 1, 2)


def _attention_by_blocks(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
    """Attention on JAX over some heads at a time, or some of the queries of one head, so that the table of weights fits
    in the cache. It is recomputed for the gradient. Positions come last, not channels, since heads are narrow, and XLA
    is slow for matrices with short rows. `mask` is (batch, 1, keys).
    """
    import jax

    (batch, tokens, heads, width), keys = q.shape, k.shape[1]
    in_table = 2**19  # entries: 2 MiB
    blocks = _divisor(batch * heads, in_table // (tokens * keys))
    queries = _divisor(tokens, in_table // keys) if blocks == 1 else tokens
    q, k, v = (ops.reshape(ops.transpose(x, (0, 2, 3, 1)), (-1, blocks, width, x.shape[1])) for x in (q, k, v))
    q = ops.transpose(ops.reshape(q * width**-0.5, (*q.shape[:-1], -1, queries)), (0, 3, 1, 2, 4))
    if mask is not None:
        mask = ops.reshape(ops.broadcast_to(mask, (batch, heads, keys)), (-1, blocks, keys, 1))

    @jax.checkpoint
    def of_queries(q, k, v, mask):
        logits = _float32_product("bdk,bdq->bkq", k, q)
        logits = logits if mask is None else ops.where(mask, logits, HIDDEN)
        weights = ops.exp(logits - jax.lax.stop_gradient(ops.max(logits, axis=1, keepdims=True)))
        y = _float32_product("bdk,bkq->bdq", v, ops.cast(weights, v.dtype))
        return ops.cast(y / ops.sum(weights, axis=1, keepdims=True), v.dtype)

    y = jax.lax.map(lambda block: jax.lax.map(lambda some: of_queries(some, *block[1:]), block[0]), (q, k, v, mask))
    y = ops.reshape(ops.transpose(y, (0, 2, 3, 1, 4)), (batch, heads, width, tokens))
    return ops.transpose(y, (0, 3, 1, 2))


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, or 1."""
    return max(d for d in range(1, number + 1) if number % d == 0 and d <= max(1, most))
