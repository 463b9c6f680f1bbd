"""The only file that names a backend: what Keras does not offer in one form for TensorFlow, JAX and PyTorch."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

BACKEND = keras.backend.backend()


def after_step(model: keras.Model, result: Any, update: Callable[[], None]) -> Any:
    """Runs `update`, which changes variables of `model`, after Keras' own training step, whose `result` is returned.

    On JAX a step is a pure function from state to state, `(logs, state)`: the update reads and writes that state.
    """
    if BACKEND != "jax":
        with _no_gradients():
            update()
        return result
    logs, state = result
    groups = [model.trainable_variables, model.non_trainable_variables, model.optimizer.variables]
    groups.append(model.metrics_variables)
    pairs = [pair for group, values in zip(groups, state, strict=True) for pair in zip(group, values, strict=True)]
    with keras.StatelessScope(pairs) as scope:
        update()
    return logs, tuple([scope.get_current_value(variable) for variable in group] for group in groups)


def compiled(function: Callable, *models: keras.Model) -> Callable:
    """A fast form of `function(*arguments)`, which uses weights of these models and changes nothing.

    JAX compiles it with XLA, with the weights as arguments, so that training on does not leave old ones in it.
    TensorFlow makes a graph. PyTorch runs it as it stands, without gradients: on a CPU its compiler gains nothing.
    Arguments are nests of tensors, arrays and NumPy numbers; only a change of shapes compiles again.
    """
    if BACKEND == "jax":
        import jax

        def variables():
            return list({id(v): v for model in models for v in model.variables}.values())

        @jax.jit
        def pure(values, *arguments):
            with keras.StatelessScope(list(zip(variables(), values, strict=True))):
                return function(*arguments)

        return lambda *arguments: pure([v.value for v in variables()], *arguments)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        graph = tf.function(function, autograph=False)
        return lambda *arguments: graph(*tree.map_structure(tf.convert_to_tensor, arguments))

    plain = without_gradients(function)
    return lambda *arguments: plain(*tree.map_structure(ops.convert_to_tensor, arguments))


def without_gradients(function: Callable) -> Callable:
    """The function without the record for gradients that PyTorch, alone, keeps of all it computes."""

    def plain(*arguments):
        with _no_gradients():
            return function(*arguments)

    return plain


def pullback(function: Callable, x: Any) -> tuple[Any, Callable, Any]:
    """(y, pull, rest) of `(y, rest) = function(x)`, where `pull(v)`, to be called once, is (dy / dx)^T v.

    No gradient flows through the three themselves.
    """
    if BACKEND == "jax":
        import jax

        y, pull, rest = jax.vjp(function, x, has_aux=True)
        return y, lambda v: pull(v)[0], rest
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            y, rest = function(x)
        return y, lambda v: tape.gradient(y, x, v), rest
    import torch

    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y, rest = function(x)
    detached = None if rest is None else rest.detach()
    return y.detach(), lambda v: torch.autograd.grad(y, x, v)[0], detached


def fused(function: Callable) -> Callable:
    """A function of tensors alone that JAX and TensorFlow compile as a whole, in or out of a larger program.

    Op by op, JAX would compile the many small operations of `function` one at a time for every new shape, and
    TensorFlow would trace them again wherever it is called.
    """
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, reduce_retracing=True, autograph=False)
    return function


def synchronise(model: keras.Model) -> None:
    """Brings the variables of a model that is being trained up to date; JAX keeps them elsewhere during an epoch."""
    if BACKEND == "jax":
        model.jax_state_sync()


def _no_gradients():
    if BACKEND == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def move_towards(variables: Sequence, targets: Sequence, fraction) -> None:
    """variable += fraction (target - variable), for all of them; `fraction` is a scalar tensor."""
    if BACKEND == "torch":
        import torch

        values = [variable.value for variable in variables]
        steps = torch._foreach_sub([target.value.to(torch.float32) for target in targets], values)
        torch._foreach_mul_(steps, fraction)
        torch._foreach_add_(values, steps)
        return
    for variable, target in zip(variables, targets, strict=True):
        variable.assign_add(fraction * (ops.cast(target.value, variable.dtype) - variable.value))


def portable_optimizer(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an optimizer, with the class that every backend knows in place of PyTorch's own."""
    if ".backend.torch.optimizers." not in (config.get("module") or ""):
        return config
    return {**config, "module": "keras.optimizers", "registered_name": None}


def leave_accelerator(tf: Any) -> None:
    """Keeps TensorFlow, where it only prepares batches for JAX or PyTorch, from taking the accelerator's memory."""
    if BACKEND != "tensorflow":
        with contextlib.suppress(RuntimeError):  # its devices were started before: the user has chosen
            tf.config.set_visible_devices([], "GPU")


def is_tf_dataset(data: Any) -> bool:
    """Whether `data` is a `tf.data.Dataset`; TensorFlow is not imported to find out."""
    tf = sys.modules.get("tensorflow")
    return tf is not None and hasattr(tf, "data") and isinstance(data, tf.data.Dataset)


def is_data_loader(data: Any) -> bool:
    """Whether `data` is a `torch.utils.data.DataLoader`; PyTorch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(data, torch.utils.data.DataLoader)


def checked_dataset(dataset: Any, check: Callable[[Any], None]) -> Any:
    """A `tf.data.Dataset` that calls `check` with each of its elements, as NumPy arrays, before it yields them."""
    import tensorflow as tf

    def checked(*element):
        element = element if len(element) > 1 else element[0]

        def run(*arrays):
            check(tree.pack_sequence_as(element, list(arrays)))
            return np.int32(0)

        done = tf.numpy_function(run, tree.flatten(element), tf.int32, stateful=True)
        with tf.control_dependencies([done]):
            return tree.map_structure(tf.identity, element)

    return dataset.map(checked)


def loader_batch(batch: Any) -> Any:
    """A batch of a PyTorch `DataLoader`, with tensors in place of NumPy arrays: Keras takes no others there."""
    import torch

    def tensor(value):
        return torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" else value

    return tree.map_structure(tensor, batch)


def on_host(function: Callable[[np.ndarray], np.ndarray], tensor: Any, shape: tuple, dtype: Any) -> Any:
    """`function(tensor)`, on NumPy arrays, as a step of a `tf.data.Dataset`; its shape and type must be given."""
    import tensorflow as tf

    result = tf.numpy_function(function, [tensor], tf.as_dtype(dtype), stateful=False)
    return tf.ensure_shape(result, shape)


# --- layers


def recomputed(layer: keras.layers.Layer, tensors: dict[str, Any], **options: Any) -> Any:
    """`layer(**tensors, **options)`, of which only the inputs are kept for the gradient: the rest is computed again.

    `keras.RematScope` does not do it: on TensorFlow it takes no keyword arguments, on JAX only arrays, and with dropout
    the second pass would draw other numbers. Here each pass starts from the same values of the layer's variables.
    """
    weights, changing = layer.trainable_variables, layer.non_trainable_variables
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    values = [ops.convert_to_tensor(variable.value) for variable in weights]
    values += [ops.copy(variable.value) for variable in changing]  # PyTorch changes them in place

    def pure(*arguments):
        inputs = dict(zip(given, arguments, strict=False))
        with keras.StatelessScope(list(zip(weights + changing, arguments[len(given) :], strict=True))) as scope:
            y = layer(**inputs, **options)
            return (y, *[scope.get_current_value(variable) for variable in changing])

    y, *states = keras.remat(pure)(*given.values(), *values)
    for variable, state in zip(changing, states, strict=True):
        variable.assign(state)
    return y


@contextlib.contextmanager
def unallocated() -> Iterator[None]:
    """Variables that are made inside have shapes, and never values.

    Keras holds back the values of those made in a `StatelessScope`, but remembers the variables, to give them values at
    the end of the next scope. It has no public way to forget them.
    """
    from keras.src.backend.common import global_state

    waiting = list(global_state.get_global_attribute("uninitialized_variables", []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute("uninitialized_variables", waiting)


def concrete(x: Any) -> np.ndarray | None:
    """The numbers in `x` if they are at hand; None while a graph is traced or where fetching would stall a device."""
    if isinstance(x, keras.KerasTensor) or (ops.is_tensor(x) and _out_of_reach(x)):
        return None
    return ops.convert_to_numpy(x)


def _out_of_reach(x: Any) -> bool:
    if BACKEND == "tensorflow":
        return not hasattr(x, "numpy") or "GPU" in x.device
    if BACKEND == "torch":
        return x.device.type != "cpu"
    import jax

    return isinstance(x, jax.core.Tracer) or any(device.platform != "cpu" for device in x.devices())


def group_norm(x: Any, groups: int, gamma: Any, beta: Any, epsilon: float) -> Any:
    """`gamma (x - mean) / sqrt(var + epsilon) + beta` over each group of channels of `x`, (batch, ..., channels).

    Statistics are float32, the result has the type of `x`; `gamma` and `beta` may be None. PyTorch has a kernel for
    it. On the others it is one multiplication and one addition, by numbers that depend on example and channel: Keras'
    own layer broadcasts five-dimensional arrays.
    """
    if BACKEND == "torch":
        import torch

        weights = [None if w is None else ops.cast(w, x.dtype) for w in (gamma, beta)]
        # A copy: the kernel for channels-last loses a digit, and crashes where `x` needs no gradient but `gamma` does.
        y = torch.nn.functional.group_norm(torch.movedim(x, -1, 1).contiguous(), groups, *weights, epsilon)
        return torch.movedim(y, 1, -1)
    batch, channels = ops.shape(x)[0], x.shape[-1]
    y = ops.reshape(ops.cast(x, "float32"), (batch, -1, channels))

    def group_mean(per_channel):
        mean = ops.mean(ops.reshape(per_channel, (batch, groups, -1)), axis=-1, keepdims=True)
        return ops.reshape(ops.repeat(mean, channels // groups, axis=-1), (batch, 1, channels))

    mean = group_mean(ops.mean(y, axis=1))
    variance = group_mean(ops.mean(ops.square(y - mean), axis=1))
    scale = ops.rsqrt(variance + epsilon)
    scale = scale if gamma is None else scale * ops.cast(gamma, "float32")
    shift = -mean * scale if beta is None else ops.cast(beta, "float32") - mean * scale
    return ops.cast(ops.reshape(y * scale + shift, ops.shape(x)), x.dtype)


def attention(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
    """`softmax(q k^T / sqrt(width)) v` in each head, for q, k and v of the shape (batch, tokens, heads, width).

    Where a `mask`, (batch, query tokens, key tokens), is False, the weight is 0. The softmax is float32. PyTorch has a
    kernel that never holds the whole table of weights; JAX has one on accelerators, and goes block by block on a CPU.
    """
    if BACKEND == "torch":
        import torch

        mask = None if mask is None else mask[:, None]
        q, k, v = (torch.transpose(x, 1, 2) for x in (q, k, v))
        return torch.transpose(torch.nn.functional.scaled_dot_product_attention(q, k, v, mask), 1, 2)
    if BACKEND == "jax" and mask is None:
        return _attention_by_blocks(q, k, v) if _on_cpu() else ops.dot_product_attention(q, k, v)
    logits = ops.cast(ops.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k), "float32")
    logits = logits if mask is None else ops.where(mask[:, None], logits, -1e30)
    return ops.einsum("bhqk,bkhd->bqhd", ops.cast(ops.softmax(logits, axis=-1), v.dtype), v)


def _on_cpu() -> bool:
    import jax

    return jax.default_backend() == "cpu"


def _attention_by_blocks(q: Any, k: Any, v: Any) -> Any:
    """Attention on JAX: of some heads at a time, or of some of the queries of one head, so that the table of weights
    stays in the cache. It is not kept for the gradient, but computed again. Positions come last, not channels: heads
    are narrow, and XLA multiplies matrices with short rows slowly.
    """
    import jax

    (batch, tokens, heads, width), keys = q.shape, k.shape[1]
    in_table = 2**19  # numbers: 2 MiB
    blocks = _divisor(batch * heads, in_table // (tokens * keys))
    queries = _divisor(tokens, in_table // keys) if blocks == 1 else tokens
    q, k, v = (ops.reshape(ops.transpose(x, (0, 2, 3, 1)), (-1, blocks, width, x.shape[1])) for x in (q, k, v))
    q = ops.transpose(ops.reshape(q * width**-0.5, (*q.shape[:-1], -1, queries)), (0, 3, 1, 2, 4))

    @jax.checkpoint
    def of_queries(q, k, v):
        logits = ops.cast(ops.einsum("bdk,bdq->bkq", k, q), "float32")
        weights = ops.exp(logits - jax.lax.stop_gradient(ops.max(logits, axis=1, keepdims=True)))
        y = ops.einsum("bdk,bkq->bdq", v, ops.cast(weights, v.dtype))
        return y / ops.cast(ops.sum(weights, axis=1, keepdims=True), y.dtype)

    y = jax.lax.map(lambda block: jax.lax.map(lambda some: of_queries(some, *block[1:]), block[0]), (q, k, v))
    y = ops.reshape(ops.transpose(y, (0, 2, 3, 1, 4)), (batch, heads, width, tokens))
    return ops.transpose(y, (0, 3, 1, 2))


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, or 1."""
    return max(d for d in range(1, number + 1) if number % d == 0 and d <= max(1, most))


def upsample_nearest(x: Any) -> Any:
    """Each pixel of maps (batch, height, width, channels) as a 2x2 square."""
    batch, height, width, channels = ops.shape(x)
    if BACKEND == "jax":
        x = ops.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
        return ops.reshape(x, (batch, 2 * height, 2 * width, channels))
    return ops.image.resize(x, (2 * height, 2 * width), "nearest", data_format="channels_last")


def upsample_bilinear(x: Any) -> Any:
    """Maps (batch, height, width, channels) at twice the size, by bilinear interpolation between pixel centres."""
    height, width = ops.shape(x)[1:3]
    y = ops.image.resize(x, (2 * height, 2 * width), "bilinear", data_format="channels_last")
    return ops.cast(y, x.dtype)


def average_pool(x: Any) -> Any:
    """The average of each 2x2 square of maps (batch, height, width, channels) of even size."""
    if BACKEND == "jax":
        batch, height, width, channels = x.shape
        return ops.mean(ops.reshape(x, (batch, height // 2, 2, width // 2, 2, channels)), axis=(2, 4))
    return ops.average_pool(x, 2, 2, "valid", "channels_last")


def max_pool(x: Any) -> Any:
    """The maximum of each 2x2 square of maps (batch, height, width, channels) of even size."""
    return ops.max_pool(x, 2, 2, "valid", "channels_last")
