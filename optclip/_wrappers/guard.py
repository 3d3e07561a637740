"""What guards share: whether anything is bad, and how a step is taken back."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optclip import _numerics
from optclip._vectors import stack


def any_of(flags: list[jax.Array]) -> jax.Array:
    """Whether any flag in any of the arrays is set.

    Behind a barrier, for else XLA:CPU reduces all flags anew in the kernel of each leaf: 16 s to compile 100 leaves.
    """
    return jnp.any(lax.optimization_barrier(stack([jnp.any(f) for f in flags]))) if flags else jnp.asarray(False)


def nonfinite(tree: Any) -> list[jax.Array]:
    """For each gradient of a tree whether any of it is not finite."""
    return [~_numerics.finite(x) for x in jax.tree.leaves(tree) if _numerics.is_gradient(x)]


def withhold(bad: jax.Array, updates: Any, fill: Any = 0.0) -> Any:
    """The updates, or ``fill`` in their place: 0 for those that are no gradients, and random keys as they are."""

    def one(u: Any) -> Any:
        if getattr(u, "dtype", None) == jax.dtypes.float0:
            return u
        u = jnp.asarray(u)
        if jnp.issubdtype(u.dtype, jax.dtypes.extended):
            return u
        other = jnp.asarray(fill if _numerics.is_gradient(u) else 0).astype(u.dtype)
        return _numerics.cast_like(jnp.where(bad, other, u), u)

    return jax.tree.map(one, updates)


def keep(bad: jax.Array, old: Any, new: Any) -> Any:
    """``old`` if ``bad``, else ``new`` in the dtypes and weak types of ``old``."""

    def one(o: Any, n: Any) -> Any:
        dtype = jnp.result_type(o)
        if dtype == jax.dtypes.float0:
            return o
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            return jnp.where(bad, o, n)
        return _numerics.cast_like(jnp.where(bad, jnp.asarray(o), jnp.asarray(n).astype(dtype)), o)

    return jax.tree.map(one, old, new)
