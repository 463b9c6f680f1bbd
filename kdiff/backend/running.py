"""Training steps, compilation, gradients, variables: what surrounds the arithmetic."""

import contextlib
import functools
import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from kdiff.backend.tangents import forward_mode_is_on

__all__ = [
    "BACKEND",
    "after_step",
    "allocate",
    "by_numpy",
    "compiled",
    "concrete",
    "fused",
    "give",
    "has_numbers",
    "move_towards",
    "needs_no_preparation",
    "portable_optimizer",
    "remat",
    "replaced",
    "synchronise",
    "tensor",
    "unallocated",
    "uncompiled",
    "uninterrupted",
    "vjp",
    "with_fixed_shapes",
    "without_gradients",
]

BACKEND = keras.backend.backend()


@contextlib.contextmanager
def _held() -> Iterator[None]:
    """Inside, the first Ctrl-C waits for the end; the second does not."""
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
    """`function`, in which the first Ctrl-C waits for the end.

    For a step, which must be made as a whole, and for what builds or traces: Keras' optimizers are `built` before they
    have all their variables, and its `ops.shape` takes an interrupt on TensorFlow for an axis of unknown length.
    """

    @functools.wraps(function)
    def whole(*args, **kwargs):
        if BACKEND == "torch":
            import torch

            if torch.compiler.is_compiling():  # its compiler knows no signals
                return function(*args, **kwargs)
        with _held():
            return function(*args, **kwargs)

    return whole


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

        graph = tf.function(uninterrupted(function), autograph=False)
        return lambda *arguments: graph(*tree.map_structure(tf.convert_to_tensor, arguments))

    return without_gradients(function)


def uncompiled(step: Callable) -> Callable:
    """A step as it was before Keras had PyTorch compile it; on the other backends, the step.

    PyTorch's compiler stops at the gradient, and would trace all that comes before once for each of the functions that
    the step is in, and compile the rest for each number that the averages move by.
    """
    return getattr(step, "_torchdynamo_orig_callable", step) if BACKEND == "torch" else step


def with_fixed_shapes(function: Callable) -> Callable:
    """The function, compiled by PyTorch, for each shape of its arguments alone.

    After a second shape the compiler would take sizes for symbols, of which it cannot decide what kdiff's layers and
    Keras' ask of them ("cannot determine truth value of Relational").
    """
    import torch

    return torch.compile(function, dynamic=False)


def tensor(x: Any, dtype: str) -> Any:
    """Keras' `convert_to_tensor`; PyTorch's own of arrays, of which its compiler makes no part of a step by Keras'."""
    if BACKEND == "torch" and isinstance(x, np.ndarray):
        import torch

        x = torch.as_tensor(x)
    return ops.convert_to_tensor(x, dtype)


def without_gradients(function: Callable) -> Callable:
    """The function of nests of tensors without the record for gradients that PyTorch, alone, keeps of all it computes.

    Arguments may also be arrays and NumPy numbers.
    """

    def plain(*arguments):
        with _no_gradients():
            return function(*tree.map_structure(ops.convert_to_tensor, arguments))

    return plain


def by_numpy(function: Callable, x: Any, shape: tuple) -> Any:
    """`function(x)`, a NumPy function of a batch, also where it is compiled; there are no gradients.

    Args:
        function: from a float32 array (batch, ...) to one of shape (batch, *shape).
        x: a tensor.
        shape: of an example of the result.
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

    A gradient that is taken around it flows through y and `rest`, and takes what `pull` gives for constant: there are
    no second derivatives, for which few operations are made.
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
        targets = [target.value.to(torch.float32) for target in targets]
        if fraction.device.type == "cpu":  # elsewhere it would wait for the number
            torch._foreach_lerp_(values, targets, float(fraction))
            return
        steps = torch._foreach_sub(targets, values)
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


def remat(layer: keras.layers.Layer, tensors: dict[str, Any], **options: Any) -> Any:
    """`layer(**tensors, **options)`, of which only the inputs are kept for the gradient: the rest is computed again.

    `keras.RematScope` does not do it: on TensorFlow it takes no keyword arguments, on JAX only arrays, and with dropout
    the second pass would draw other numbers. Here each pass starts from the same values of the layer's variables.
    Tensors may be nested. TensorFlow would ask for the gradient of those that are not floating-point, such as masks.
    """
    weights, changing = layer.trainable_variables, layer.non_trainable_variables
    leaves = tree.flatten(tensors)
    learned = [leaf is not None and ops.is_tensor(leaf) and "float" in str(leaf.dtype) for leaf in leaves]
    given = [leaf for leaf, is_learned in zip(leaves, learned, strict=True) if is_learned]
    values = [ops.convert_to_tensor(variable.value) for variable in weights]
    values += [ops.copy(variable.value) for variable in changing]  # PyTorch changes them in place

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


def give(variable: keras.Variable, array: np.ndarray) -> None:
    """Gives a variable the numbers of an array, which stays the caller's own.

    One that was made in `unallocated` has them for its first value, and its initializer is never run.
    """
    value = _packed(array)  # JAX, and PyTorch below, keep the memory of what they are given
    if variable._value is not None:
        variable.assign(value)
        return
    if BACKEND == "torch":  # Keras would copy it again
        import torch

        value = torch.from_numpy(value)
    variable._initialize(ops.convert_to_tensor(value, variable.dtype))
    variable._initializer = None


def _packed(array: np.ndarray) -> np.ndarray:
    """A copy in C order: of transposed kernels in blocks that a cache holds, 1.3 to 1.8 times as fast as in one."""
    copy = np.empty(array.shape, array.dtype)
    if array.ndim < 2:
        copy[...] = array
        return copy
    *_, rows, columns = array.shape
    for i, j in itertools.product(range(0, rows, 32), range(0, columns, 256)):
        copy[..., i : i + 32, j : j + 256] = array[..., i : i + 32, j : j + 256]
    return copy


def allocate(layer: keras.layers.Layer) -> None:
    """Initializes what a layer that was built in `unallocated` has of variables without a value."""
    for variable in layer.variables:
        if variable._value is None:
            variable._deferred_initialize()
    for one in layer._flatten_layers():
        one._post_build()  # by which PyTorch's modules learn of their parameters


@contextlib.contextmanager
def replaced(layer: keras.layers.Layer, part: keras.layers.Layer) -> Iterator[None]:
    """Inside, another layer may take the place of `part` as an attribute of `layer`.

    Keras forgets no layer that an attribute has held, and takes no new one after `build`.
    """
    tracker = layer._tracker
    tracker.untrack(part)
    locked, tracker.locked = tracker.locked, False
    try:
        yield
    finally:
        tracker.locked = locked


def needs_no_preparation(layer: keras.layers.Layer, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether `layer.call` does on PyTorch what `layer(...)` does: with built layers and tensors in float32.

    Keras prepares each call of a layer anew, for more than a tenth of a millisecond: of a small network it is most of
    the time. TensorFlow and JAX do it once, when they compile.
    """
    if BACKEND != "torch" or not layer.built or layer.compute_dtype != "float32" or layer.variable_dtype != "float32":
        return False
    import torch
    from keras.src import backend as keras_backend

    if layer._call_has_training_arg and kwargs.get("training") is None:
        return False  # Keras finds out from the layers around it
    values = [part for value in (*args, *kwargs.values()) for part in (value if isinstance(value, tuple) else (value,))]
    values = [value for value in values if value is not None and not isinstance(value, bool)]
    known = all(isinstance(x, torch.Tensor) and x.dtype in (torch.float32, torch.bool) for x in values)
    watched = layer._forward_hooks or layer._forward_pre_hooks or layer.activity_regularizer is not None
    changed = getattr(layer, "quantization_mode", None) or getattr(layer, "_remat_mode", None)
    return known and not watched and not changed and keras_backend.get_autocast_scope() is None


def has_numbers(x: Any) -> bool:
    """False on PyTorch where Keras asks for the shapes of results alone."""
    return BACKEND != "torch" or x.device.type != "meta"


def concrete(x: Any) -> np.ndarray | None:
    """The numbers in `x` if they are at hand; None while a graph is traced or where fetching would stall a device."""
    if isinstance(x, keras.KerasTensor) or (ops.is_tensor(x) and _out_of_reach(x)):
        return None
    return ops.convert_to_numpy(x)


def _out_of_reach(x: Any) -> bool:
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly() or not hasattr(x, "numpy") or "GPU" in x.device
    if BACKEND == "torch":
        import torch

        return x.device.type != "cpu" or torch.compiler.is_compiling() or forward_mode_is_on()
    import jax

    return isinstance(x, jax.core.Tracer) or any(device.platform != "cpu" for device in x.devices())
