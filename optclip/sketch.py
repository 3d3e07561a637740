"""A sketch of a stream of sizes: a log-spaced histogram with its extremes, a few kilobytes for any number of steps.

Sizes from 2^-40 to 2^40 (9e-13 to 1.1e12) fall into bins of equal ratio; smaller ones, zero among them, count in the
first bin and larger ones in the last. Sketches of the same size add up (`merge`), so that processes, restarts and runs
can be read together. What is not finite enters nothing but its count.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["LOWEST", "OCTAVES", "Sketch", "add", "edges", "empty", "fraction_above", "merge", "quantile"]

LOWEST, OCTAVES = -40, 80


class Sketch(NamedTuple):
    """Sketches of an array of streams; S is the shape of that array.

    Attributes:
      counts: int32[S, 80 * bins per octave], how many sizes fell into each bin.
      nonfinite: int32[S], how many were NaN or infinite.
      low: float32[S], the smallest finite size; the largest number of float32 before the first.
      high: float32[S], the largest finite size; 0 before the first.
    """

    counts: jax.Array
    nonfinite: jax.Array
    low: jax.Array
    high: jax.Array


def empty(shape: tuple[int, ...] = (), *, per_octave: int = 8) -> Sketch:
    """A sketch that has seen nothing, with ``per_octave`` bins to every factor of two.

    Example:
      >>> sketch.empty().counts.nbytes
      2560
    """
    return Sketch(
        counts=jnp.zeros((*shape, OCTAVES * per_octave), jnp.int32),
        nonfinite=jnp.zeros(shape, jnp.int32),
        low=jnp.full(shape, jnp.finfo(jnp.float32).max),
        high=jnp.zeros(shape, jnp.float32),
    )


def add(sketch: Sketch, size: jax.Array) -> Sketch:
    """The sketch with one more size for each of its streams; under jit, scan and vmap alike.

    Args:
      sketch: of shape S.
      size: float[S], >= 0.

    Example:
      >>> s = sketch.add(sketch.empty(), jnp.float32(3))
      >>> int(s.counts.sum()), float(s.high)
      (1, 3.0)
    """
    size = jnp.asarray(size).astype(jnp.float32)
    finite = jnp.isfinite(size)
    bins = sketch.counts.shape[-1]
    position = (jnp.log2(jnp.where(finite & (size > 0), size, 2.0**LOWEST)) - LOWEST) * (bins // OCTAVES)
    index = jnp.where(finite, jnp.clip(jnp.floor(position), 0, bins - 1), -1).astype(jnp.int32)
    # One comparison per bin instead of a scatter: it fuses, and shards and batches as everything else does.
    hit = jax.nn.one_hot(index, bins, dtype=jnp.int32)
    return Sketch(
        counts=sketch.counts + hit,
        nonfinite=sketch.nonfinite + (~finite).astype(jnp.int32),
        low=jnp.where(finite, jnp.minimum(sketch.low, size), sketch.low),
        high=jnp.where(finite, jnp.maximum(sketch.high, size), sketch.high),
    )


def merge(a: Sketch, b: Sketch) -> Sketch:
    """The sketch of both streams together, exactly.

    Example:
      >>> one, two = (sketch.add(sketch.empty(), jnp.float32(x)) for x in (1, 2))
      >>> float(sketch.merge(one, two).low)
      1.0
    """
    if a.counts.shape != b.counts.shape:
        raise ValueError(f"merge needs sketches of one shape, got {a.counts.shape} and {b.counts.shape}")
    return Sketch(
        counts=a.counts + b.counts,
        nonfinite=a.nonfinite + b.nonfinite,
        low=jnp.minimum(a.low, b.low),
        high=jnp.maximum(a.high, b.high),
    )


def edges(sketch: Sketch) -> np.ndarray:
    """The edges of the bins, float64[bins + 1]."""
    bins = sketch.counts.shape[-1]
    return 2.0 ** (LOWEST + np.arange(bins + 1) * (OCTAVES / bins))


def quantile(sketch: Sketch, q: Any) -> np.ndarray:
    """The q-quantile of every stream, right to the width of a bin (a ratio of 2^(1 / bins per octave)).

    Within a bin sizes are taken to be evenly spread on the log axis; the result never leaves [low, high], so the
    quantiles of a constant stream, q = 0 and q = 1 are exact.

    Args:
      sketch: of shape S, with concrete values.
      q: in [0, 1], a number.

    Returns:
      float64[S]; NaN for a stream that has seen nothing finite.

    Example:
      >>> s = sketch.add(sketch.add(sketch.empty(), jnp.float32(1)), jnp.float32(3))
      >>> float(sketch.quantile(s, 1.0))
      3.0
    """
    counts = np.asarray(sketch.counts, np.float64)
    total, cumulative = counts.sum(-1), counts.cumsum(-1)
    rank = np.clip(q * total, np.minimum(total, 1e-9), None)[..., None]
    index = np.argmax(cumulative >= rank, axis=-1)[..., None]
    inside = np.take_along_axis(counts, index, -1)
    before = np.take_along_axis(cumulative, index, -1) - inside
    part = (rank - before) / np.maximum(inside, 1)
    bins = counts.shape[-1]
    value = 2.0 ** (LOWEST + (index + part) * (OCTAVES / bins))[..., 0]
    low, high = np.asarray(sketch.low, np.float64), np.asarray(sketch.high, np.float64)
    first, last = index[..., 0] == 0, index[..., 0] == bins - 1  # open bins: only their far ends are known
    value = np.clip(np.where(first, low, np.where(last, high, value)), low, np.maximum(low, high))
    value = np.where(q == 0, low, np.where(q == 1, high, value))
    return np.where(total > 0, value, np.nan)


def fraction_above(sketch: Sketch, limit: Any) -> np.ndarray:
    """The fraction of the finite sizes of every stream beyond ``limit``, right to the content of one bin.

    Args:
      sketch: of shape S, with concrete values.
      limit: > 0, a number or an array that broadcasts against S.

    Returns:
      float64[S]; NaN for a stream that has seen nothing finite.

    Example:
      >>> s = sketch.add(sketch.add(sketch.empty(), jnp.float32(1)), jnp.float32(3))
      >>> float(sketch.fraction_above(s, 2.0))
      0.5
    """
    counts = np.asarray(sketch.counts, np.float64)
    bins, total = counts.shape[-1], counts.sum(-1)
    low, high = np.asarray(sketch.low, np.float64), np.asarray(sketch.high, np.float64)
    limit = np.asarray(limit, np.float64)
    position = np.clip((np.log2(limit) - LOWEST) * (bins / OCTAVES), 0, bins)[..., None]
    part = np.clip(np.arange(1, bins + 1) - position, 0, 1)  # of each bin, how much of it lies beyond
    above = (counts * part).sum(-1) / np.maximum(total, 1)
    above = np.where(limit >= high, 0.0, np.where(limit < low, 1.0, above))
    return np.where(total > 0, above, np.nan)
