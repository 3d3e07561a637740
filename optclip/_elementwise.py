"""Memory as large as the updates: one float32 array per leaf. A leaf that is not finite leaves its own untouched."""

from typing import Any

import jax
import jax.numpy as jnp

from optclip import _mesh, _numerics
from optclip._vectors import stack


def zeros(tree: Any, *, complex: bool = False) -> Any:
    """Zeros in the shapes of ``tree``, float32 or wider; a scalar where a leaf has no gradient."""

    def one(x: Any) -> jax.Array:
        if not _numerics.is_gradient(x):
            return jnp.zeros((), jnp.float32)
        dtype = _numerics.accumulator(x)
        if complex and jnp.iscomplexobj(x):
            dtype = _numerics.complex_of(dtype)
        return _mesh.like(jnp.zeros(jnp.shape(x), dtype), x)

    return jax.tree.map(one, tree)


def counts(tree: Any) -> jax.Array:
    """A zero for each leaf, in ``jax.tree.leaves`` order: the updates that entered its memory."""
    return jnp.zeros(len(jax.tree.leaves(tree)), jnp.int32)


def finite(leaves: list[Any]) -> jax.Array:
    """For each leaf whether all of it is finite, on every device: bool[leaves]."""
    odd = [~_numerics.finite(x) if _numerics.is_gradient(x) else jnp.zeros((), bool) for x in leaves]
    return ~_mesh.agree(stack(odd)) if odd else jnp.zeros(0, bool)


def root_mean(decay: Any, rms: jax.Array, value: jax.Array) -> jax.Array:
    """sqrt(decay * rms^2 + (1 - decay) * value^2), which no square takes out of range; derivative 0 at zero."""
    a, b = decay**0.5 * rms, (1 - decay) ** 0.5 * value
    large, small = jnp.maximum(a, b), jnp.minimum(a, b)
    still = large == 0
    return jnp.where(still, 0, large * jnp.sqrt(1 + jnp.square(small / jnp.where(still, 1, large))))


def widen(x: Any) -> jax.Array:
    """A gradient leaf in float32 or wider."""
    return _numerics.widen(jnp.asarray(x), _numerics.accumulator(x))


def cast_back(wide: Any, updates: Any) -> Any:
    """The leaves of ``wide`` in the dtypes and weak types of ``updates``."""
    return jax.tree.map(lambda w, x: _numerics.cast_like(w, x) if _numerics.is_gradient(x) else x, wide, updates)
