"""What rules remember: a window of the last values, or moving moments. Neither overflows for any finite size."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optclip._numerics import over


class Window(NamedTuple):
    """The last values of each size, float32[S + (window,)], in a ring; infinite where none has entered yet."""

    values: jax.Array


def empty(size: jax.Array, window: int) -> Window:
    """A window without values for each element of ``size``."""
    return Window(jnp.full(jnp.shape(size) + (window,), jnp.inf, size.dtype))  # not NaN, for jax_debug_nans


def push(value: jax.Array, window: Window, count: jax.Array) -> Window:
    """The window with ``value`` in place of the oldest; ``count`` values entered before it."""
    values = window.values
    slots = lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    return Window(jnp.where(slots == (count % values.shape[-1])[..., None], value[..., None], values))


def ranked(window: Window) -> tuple[jax.Array, jax.Array]:
    """The values in rising order, those that are not finite last, and how many are finite."""
    values = window.values
    finite = jnp.isfinite(values)
    return jnp.sort(jnp.where(finite, values, jnp.inf), axis=-1), jnp.sum(finite, axis=-1, dtype=jnp.int32)


def at(values: jax.Array, index: jax.Array) -> jax.Array:
    """``values[..., index]`` with an index for each row."""
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def percentile_of(window: Window, percent: Any) -> jax.Array:
    """The linearly interpolated percentile, as NumPy's; infinity for an empty window."""
    values, n = ranked(window)
    # percent * (n - 1) is exact for whole percents, and so is what remains after whole steps: no digit is lost.
    place = jnp.asarray(percent, values.dtype) * (jnp.maximum(n, 1) - 1).astype(values.dtype)
    low = jnp.floor(place / 100)
    part = (place - 100 * low) / 100
    below = at(values, low.astype(jnp.int32))
    above = at(values, jnp.minimum(low.astype(jnp.int32) + 1, jnp.maximum(n, 1) - 1))
    return jnp.where(n > 0, below + part * (above - below), jnp.inf)


def moments_of(window: Window, ddof: int = 0) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation, with n - ddof degrees of freedom; infinity and 0 for an empty window."""
    finite = jnp.isfinite(window.values)
    values = jnp.where(finite, window.values, 0)  # first, for an infinity would be NaN in the derivative
    n = jnp.sum(finite, axis=-1, dtype=values.dtype)
    largest = jnp.max(values, axis=-1)
    largest = jnp.where(largest > 0, largest, 1)  # in units of it nothing overflows, and equal values have no spread
    unit = over(values, largest[..., None])
    mean = jnp.sum(unit, axis=-1) / jnp.maximum(n, 1)
    square = jnp.sum(jnp.where(finite, jnp.square(unit - mean[..., None]), 0), axis=-1)
    spread = root(square / jnp.maximum(n - ddof, 1))
    return jnp.where(n > 0, largest * mean, jnp.inf), largest * spread


class Moments(NamedTuple):
    """Moving moments of what was fed.

    Attributes:
      mean: float32[S].
      std: float32[S], the standard deviation.
    """

    mean: jax.Array
    std: jax.Array


def mixed(std: jax.Array, deviation: jax.Array, weight: Any) -> jax.Array:
    """sqrt((1 - weight) * std^2 + weight * deviation^2)."""
    largest = jnp.maximum(std, deviation)
    largest = jnp.where(largest > 0, largest, 1)
    weight = jnp.asarray(weight, std.dtype)
    return largest * root((1 - weight) * jnp.square(over(std, largest)) + weight * jnp.square(over(deviation, largest)))


def root(x: jax.Array) -> jax.Array:
    """The square root with derivative 0 at 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)
