"""States hold no infinity, for some pick between two states by arithmetic, and 0 * infinity is NaN.

``optax.contrib.sam`` does: ``cond * a + (1 - cond) * b``. Where a rule means infinity, its state has the largest number
of the dtype, and for that the next smaller.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def kept(tree: Any) -> Any:
    """The tree as a state keeps it; NaN stays."""

    def one(x: Any) -> Any:
        if not _is_float(x):
            return x
        largest = jnp.finfo(x.dtype).max
        return jnp.where(x == jnp.inf, largest, jnp.minimum(x, np.nextafter(largest, x.dtype.type(0))))

    return jax.tree.map(one, tree)


def meant(tree: Any) -> Any:
    """What is meant by a tree from a state; what is no array, such as a shape or a sharding, stands as it is."""

    def one(x: Any) -> Any:
        if not _is_float(x):
            return x
        return _meant(x) if isinstance(x, jax.Array) else np.where(x == jnp.finfo(x.dtype).max, x.dtype.type(np.inf), x)

    return jax.tree.map(one, tree)


@partial(jax.jit, inline=True)  # or reading a state would move a constant to its device
def _meant(x: jax.Array) -> jax.Array:
    return jnp.where(x == jnp.finfo(x.dtype).max, jnp.inf, x)


def _is_float(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic)) and jnp.issubdtype(x.dtype, jnp.floating)
