"""Execution: training steps, compilation, gradients and concrete values."""

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras.src.backend.common.stateless_scope import in_stateless_scope

from kdiff.backend.tangents import forward_mode_is_on

__all__ = [
    "BACKEND",
    "after_step",
    "by_numpy",
    "compiled",
    "concrete",
    "fused",
    "has_numbers",
    "is_away",
    "needs_no_preparation",
    "on_cpu",
    "portable_optimizer",
    "remat",
    "synchronise",
    "tensor",
    "uncompiled",
    "uninterrupted",
    "unique_variables",
    "vjp",
    "with_fixed_shapes",
    "without_gradients",
]

BACKEND = keras.backend.backend()


def on_cpu() -> bool:
    """Whether JAX computes on the CPU."""
    import jax

    return jax.default_backend() == "cpu"


@contextlib.contextmanager
def _held() -> Iterator[None]:
    """A context in which the first Ctrl-C waits for the end; the second does not."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught = []

    def wait(*arguments):
        caught.append(arguments)
        signal.signal(signal.SIGINT, handler)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[0])


def uninterrupted(function: Callable) -> Callable:
    """`function`, during which the first Ctrl-C waits for the end.

    For steps, which must be completed, and for building or tracing: Keras' optimizers are `built` before they have all
    their variables, and `ops.shape` takes an interrupt on TensorFlow for an axis of unknown length.
    """

    @functools.wraps(function)
    def whole(*args, **kwargs):
        if BACKEND == "torch":
            import torch

            if torch.compiler.is_compiling():  # its compiler does not support signals
                return function(*args, **kwargs)
        with _held():
            return function(*args, **kwargs)

    return whole


def after_step(model: keras.Model, result: Any, update: Callable[[], None]) -> Any:
    """Runs `update`, which changes variables of `model`, after Keras' own training step, and returns its `result`.

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


def compiled(function: Callable, *models: keras.Model, variables: Sequence[keras.Variable] | None = None) -> Callable:
    """A fast form of `function(*arguments)`, which uses weights of these models and has no side effects.

    JAX compiles it with XLA, with the weights as arguments, so that further training does not leave old ones in it.
    TensorFlow builds a graph. PyTorch runs it eagerly, without gradients, since on a CPU its compiler gains nothing.
    Arguments are nests of tensors, arrays and NumPy scalars; only a change of shapes recompiles.

    Args:
        function: the function.
        models: whose weights it uses.
        variables: all variables of the models, for a caller that compiles again if a model gets others; None looks for
            them in each call, which for 700 variables takes a millisecond.
    """
    if BACKEND == "jax":
        import jax

        def those():
            return unique_variables(*models) if variables is None else variables

        @jax.jit
        def pure(values, *arguments):
            with keras.StatelessScope(list(zip(those(), values, strict=True))):
                return function(*arguments)

        return lambda *arguments: pure(_values(those()), *arguments)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        graph = tf.function(uninterrupted(function), autograph=False)
        return lambda *arguments: graph(*tree.map_structure(tf.convert_to_tensor, arguments))

    return without_gradients(function)


def unique_variables(*models: keras.layers.Layer) -> list[keras.Variable]:
    """The variables of the models, each once."""
    return list({id(v): v for model in models for v in model.variables}.values())


def _values(variables: Sequence[keras.Variable]) -> list:
    """Their values. Keras' property looks for a scope for each of them."""
    if in_stateless_scope():
        return [v.value for v in variables]
    return [v.value if v._value is None else v._value for v in variables]


def uncompiled(step: Callable) -> Callable:
    """A step before Keras compiled it with PyTorch; on the other backends, the step itself.

    PyTorch's compiler stops at the gradient, and would trace everything before it once for each of the nested
    functions, and compile the rest for each value by which averages are updated.
    """
    return getattr(step, "_torchdynamo_orig_callable", step) if BACKEND == "torch" else step


def with_fixed_shapes(function: Callable) -> Callable:
    """The function, compiled by PyTorch separately for each shape of its arguments.

    After a second shape the compiler would use symbolic sizes, for which it cannot evaluate conditions in the layers of
    kdiff and Keras ("cannot determine truth value of Relational").
    """
    import torch

    return torch.compile(function, dynamic=False)


def tensor(x: Any, dtype: str) -> Any:
    """Keras' `convert_to_tensor`; for arrays PyTorch's own, which its compiler keeps out of a compiled step."""
    if BACKEND == "torch" and isinstance(x, np.ndarray):
        import torch

        x = torch.as_tensor(x)
    return ops.convert_to_tensor(x, dtype)


def without_gradients(function: Callable) -> Callable:
    """The function of nests of tensors, without recording gradients on PyTorch.

    Arguments may also be arrays and NumPy scalars.
    """

    def plain(*arguments):
        with _no_gradients():
            return function(*tree.map_structure(ops.convert_to_tensor, arguments))

    return plain


def by_numpy(function: Callable, x: Any, shape: tuple) -> Any:
    """`function(x)` for a NumPy function of a batch, also in compiled code; without gradients.

    Args:
        function: from a float32 array (batch, ...) to one of shape (batch, *shape).
        x: a tensor.
        shape: of the result for one example.
    """
    if BACKEND == "jax":
        import jax

        result = jax.ShapeDtypeStruct((len(x), *shape), "float32")
        return jax.pure_callback(lambda x: function(np.asarray(x)), result, x)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        y = tf.numpy_function(function, [x], tf.float32)
        return tf.ensure_shape(y, (x.shape[0], *shape))
    return ops.convert_to_tensor(function(ops.convert_to_numpy(x)))


def vjp(function: Callable, x: Any, often: bool = False) -> tuple[Any, Callable, Any]:
    """(y, pull, rest) of `(y, rest) = function(x)`, where `pull(v)` is (dy / dx)^T v; called once, unless `often`.

    A gradient taken around it flows through y and `rest`, and treats the output of `pull` as constant: there are no
    second derivatives, which few operations support.
    """
    if BACKEND == "jax":
        import jax

        y, pull, rest = jax.vjp(function, x, has_aux=True)
        return y, lambda v: jax.lax.stop_gradient(pull(jax.lax.stop_gradient(v))[0]), rest
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(persistent=often) as tape:
            tape.watch(x)
            y, rest = function(x)
        return y, lambda v: tf.stop_gradient(tape.gradient(y, x, v)), rest
    import torch

    inside = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad():
        x = x if inside else x.detach().requires_grad_()
        y, rest = function(x)

    def pull(v):
        return torch.autograd.grad(y, x, v.detach(), retain_graph=inside or often)[0]

    if inside:
        return y, pull, rest
    return y.detach(), pull, tree.map_structure(lambda value: None if value is None else value.detach(), rest)


def fused(function: Callable) -> Callable:
    """A function of tensors, compiled as a whole by JAX and TensorFlow, inside or outside a larger program.

    Op by op, JAX would compile the many small operations of `function` separately for every new shape, and TensorFlow
    would trace them again at every call site.
    """
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, reduce_retracing=True, autograph=False)
    return function


def synchronise(model: keras.Model) -> None:
    """Updates the variables of a model during training; JAX keeps their values elsewhere during an epoch."""
    if BACKEND == "jax":
        model.jax_state_sync()


def _no_gradients():
    if BACKEND == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def portable_optimizer(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an optimizer, with the generic class instead of PyTorch's own."""
    if ".backend.torch.optimizers." not in (config.get("module") or ""):
        return config
    return {**config, "module": "keras.optimizers", "registered_name": None}


def remat(layer: keras.layers.Layer, tensors: dict[str, Any], **options: Any) -> Any:
    """`layer(**tensors, **options)`, storing only the inputs for the gradient and recomputing the rest.

    `keras.RematScope` cannot be used: it accepts no keyword arguments on TensorFlow, only arrays on JAX, and with
    dropout the second pass would draw other numbers. Here each pass starts from the same values of the layer's
    variables. Tensors may be nested. TensorFlow would request the gradient of those that are not floating-point, such
    as masks.
    """
    weights, changing = layer.trainable_variables, layer.non_trainable_variables
    leaves = tree.flatten(tensors)
    learned = [leaf is not None and ops.is_tensor(leaf) and "float" in str(leaf.dtype) for leaf in leaves]
    given = [leaf for leaf, is_learned in zip(leaves, learned, strict=True) if is_learned]
    values = [ops.convert_to_tensor(variable.value) for variable in weights]
    values += [ops.copy(variable.value) for variable in changing]  # PyTorch modifies them in place

    def pure(*arguments):
        values = iter(arguments[: len(given)])
        inputs = [next(values) if one else leaf for leaf, one in zip(leaves, learned, strict=True)]
        with keras.StatelessScope(list(zip(weights + changing, arguments[len(given) :], strict=True))) as scope:
            y = layer(**tree.pack_sequence_as(tensors, inputs), **options)
            return (y, *[scope.get_current_value(variable) for variable in changing])

    y, *states = keras.remat(pure)(*given, *values)
    for variable, state in zip(changing, states, strict=True):
        variable.assign(state)
    return y


def needs_no_preparation(layer: keras.layers.Layer, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether `layer.call` equals `layer(...)` on PyTorch: for built layers and tensors in float32.

    Keras' preparation of each call takes more than a tenth of a millisecond, most of the time of a small network.
    TensorFlow and JAX do it once, at compilation.
    """
    if BACKEND != "torch" or not layer.built or layer.compute_dtype != "float32" or layer.variable_dtype != "float32":
        return False
    import torch
    from keras.src import backend as keras_backend

    if layer._call_has_training_arg and kwargs.get("training") is None:
        return False  # Keras infers it from the outer layers
    values = [part for value in (*args, *kwargs.values()) for part in (value if isinstance(value, tuple) else (value,))]
    values = [value for value in values if value is not None and not isinstance(value, bool)]
    known = all(isinstance(x, torch.Tensor) and x.dtype in (torch.float32, torch.bool) for x in values)
    watched = layer._forward_hooks or layer._forward_pre_hooks or layer.activity_regularizer is not None
    changed = getattr(layer, "quantization_mode", None) or getattr(layer, "_remat_mode", None)
    return known and not watched and not changed and keras_backend.get_autocast_scope() is None


def has_numbers(x: Any) -> bool:
    """False on PyTorch while Keras only infers output shapes."""
    return BACKEND != "torch" or x.device.type != "meta"


def concrete(x: Any) -> np.ndarray | None:
    """The values of `x` if available; None while a graph is traced, or if fetching would stall a device."""
    if isinstance(x, keras.KerasTensor) or (ops.is_tensor(x) and _out_of_reach(x)):
        return None
    return ops.convert_to_numpy(x)


def is_away(x: Any) -> bool:
    """Whether a tensor lies on an accelerator, so that to look at its numbers it would be waited for."""
    if BACKEND == "tensorflow":
        return ops.is_tensor(x) and "GPU" in getattr(x, "device", "")
    if BACKEND == "torch":
        return ops.is_tensor(x) and x.device.type != "cpu"
    return ops.is_tensor(x) and any(device.platform != "cpu" for device in x.devices())


def _out_of_reach(x: Any) -> bool:
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly() or not hasattr(x, "numpy") or "GPU" in x.device
    if BACKEND == "torch":
        import torch

        return x.device.type != "cpu" or torch.compiler.is_compiling() or forward_mode_is_on()
    import jax

    return isinstance(x, jax.core.Tracer) or any(device.platform != "cpu" for device in x.devices())
