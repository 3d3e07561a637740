"""What then? The shelf of responses: each maps an update, its size and its limit to the new update.

A response is a function ``(update, size, limit) -> update`` of arrays that broadcast against each other. `clip_by`
hands it updates in float32 (float64, complex64) and casts the result back to the dtype of the leaf. All but `clamp`
keep the direction, and turn an update whose size is not finite into NaN: loud, and the same for NaN and infinity.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Response = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

__all__ = ["Response", "clamp", "normalize", "rescale", "smooth", "zero"]


def _loud(size: jax.Array, limit: jax.Array) -> jax.Array:
    """The limit; NaN where the size is not finite, so that whatever is made from it is NaN too."""
    return jnp.where(jnp.isfinite(size), limit, jnp.nan)


def _to_size(where: jax.Array, update: jax.Array, size: jax.Array, target: jax.Array) -> jax.Array:
    """``update * target / size`` where true, else ``update`` itself, bit for bit.

    In two factors, for target / size may underflow where neither does. Where it is not selected the quotient is made
    harmless: an infinity there would be NaN in the derivative.
    """
    size, target = jnp.where(where, size, 1), jnp.where(where, target, 1)
    halfway = jnp.where(size > 2.0**64, 2.0**-64, 1.0).astype(size.dtype)
    return jnp.where(where, update * halfway * (target / (size * halfway)), update)


def rescale(update: jax.Array, size: jax.Array, limit: jax.Array) -> jax.Array:
    """Scales the update down to its limit: u * min(1, limit / size). Unchanged, bit for bit, up to the limit.

    Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML 2013.
    """
    limit = _loud(size, limit)
    return _to_size(~(size <= limit), update, size, limit)


def clamp(update: jax.Array, size: jax.Array, limit: jax.Array) -> jax.Array:
    """Clamps each element to [-limit, limit], whatever its size; infinities land on the bound, NaN stays NaN."""
    del size
    return jnp.where(update > limit, limit, jnp.where(update < -limit, -limit, update))


def smooth(update: jax.Array, size: jax.Array, limit: jax.Array) -> jax.Array:
    """u * limit / (size + limit): always shorter than the limit, slope 1 at zero, no kink.

    Source: the AUTO-S form of Bu et al., "Automatic Clipping", NeurIPS 2023, with gamma = limit.
    """
    limit = _loud(size, limit)
    changed = (size != 0) & (limit != jnp.inf)
    return _to_size(changed, update, size / 2 + limit / 2, limit / 2)


def zero(update: jax.Array, size: jax.Array, limit: jax.Array) -> jax.Array:
    """Drops an update whose size is beyond its limit: 0 there, unchanged up to the limit."""
    limit = _loud(size, limit)
    known = (size <= limit) | (size > limit)
    return jnp.where(size <= limit, update, jnp.where(known, jnp.zeros_like(update), jnp.nan))


def normalize(update: jax.Array, size: jax.Array, limit: jax.Array) -> jax.Array:
    """Brings every update to its limit, up or down: u * limit / size. Zero stays, and so does all with limit inf."""
    limit = _loud(size, limit)
    return _to_size((size != 0) & (limit != jnp.inf), update, size, limit)
