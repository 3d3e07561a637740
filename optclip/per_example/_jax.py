"""Everything that depends on the version of jax, in one place."""

from __future__ import annotations

import jax

__all__ = ["drop_leading"]


def drop_leading(x: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of one row of ``x``."""
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
