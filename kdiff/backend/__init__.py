"""The only folder that names a backend: what Keras does not offer in one form for TensorFlow, JAX and PyTorch."""

from kdiff.backend.data import (
    checked_dataset,
    is_data_loader,
    is_tf_dataset,
    leave_accelerator,
    loader_batch,
    on_host,
)
from kdiff.backend.operations import (
    HIDDEN,
    attention,
    average_pool,
    convolution,
    dense,
    gelu_tanh,
    group_norm,
    layer_norm,
    max_pool,
    scaled,
    upsample_bilinear,
    upsample_nearest,
)
from kdiff.backend.running import (
    BACKEND,
    after_step,
    compiled,
    concrete,
    fused,
    has_numbers,
    move_towards,
    needs_no_preparation,
    portable_optimizer,
    pullback,
    recomputed,
    replaced,
    synchronise,
    unallocated,
    without_gradients,
)
