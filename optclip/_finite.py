"""States hold no infinity, for some pick between two states by arithmetic, and 0 * infinity is NaN.

``optax.contrib.sam`` does: ``cond * a + (1 - cond) * b``. Where a rule means infinity, its state has the largest number
of the dtype, and for that the next smaller.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def kept(tree: Any) -> Any:
    """The tree as a state keeps it; NaN stays."""

    def one(x: Any) -> Any:
        largest = jnp.finfo(x.dtype).max
        return jnp.where(x == jnp.inf, largest, jnp.minimum(x, np.nextafter(largest, x.dtype.type(0))))

    return _map_floats(one, tree)


def meant(tree: Any) -> Any:
    """What is meant by a tree from a state; what is no array, such as a shape or a sharding, stands as it is."""

    def one(x: Any) -> Any:
        return _meant(x) if isinstance(x, jax.Array) else np.where(x == jnp.finfo(x.dtype).max, x.dtype.type(np.inf), x)

    return _map_floats(one, tree)


@partial(jax.jit, inline=True)  # or reading a state would move a constant to its device
def _meant(x: jax.Array) -> jax.Array:
    return jnp.where(x == jnp.finfo(x.dtype).max, jnp.inf, x)


def _map_floats(change: Callable[[Any], Any], tree: Any) -> Any:
    arrays = jax.Array, np.ndarray, np.generic
    is_float = lambda x: isinstance(x, arrays) and jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: change(x) if is_float(x) else x, tree)
