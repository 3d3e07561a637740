"""Percentile clipping per leaf, by an order statistic of the last norms (bitsandbytes)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optclip import _checks
from optclip._clip import clip_by
from optclip._history import Feed, history, raw
from optclip._memories import Window, empty, held, push, smallest
from optclip._rules import Threshold, select
from optclip.measures import Measure, leaf_norm


def order_statistic(
    rank: Any,
    window: int = 100,
    *,
    feeding: Feed = raw,
    warmup: int = 0,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 1000,
    call: str = "order_statistic",
    name: str = "rank",
) -> Threshold:
    """A limit at a given place among the last sizes in rising order, this one included; the first fills the window.

    Args:
      rank: 0 <= rank < window, counted from the smallest: an integer, a traced scalar, or a schedule.
      window: >= 1, sizes remembered.
      feeding: what enters the window, see `optclip.thresholds`; fed `clipped` sizes, the limit can only sink.
      warmup: steps that only collect.
      warmup_limit: the static limit during them, in units of the size.
      patience: clips in a row after which the window starts afresh, and sizes of zero do not enter it; None for
        neither. Clips in a row are ordinary here: keep it beyond the window.
      call: the name of the method, for error messages.
      name: the name of its argument, likewise.

    Memory: window + 2 numbers per size (`History` with ``inner.values``, float32[S + (window,)]).

    Guarantees: fed `raw` sizes, a new level is accepted within ``window - rank`` steps.

    Example:
      >>> tx = clip_by(global_norm, order_statistic(90, window=100))
    """
    _checks.check_count(call, "window", window, least=1)
    _checks.check(call, name, rank, lambda x: (x >= 0) & (x < window) & (x % 1 == 0), f"in [0, {window}), an integer")

    def init(size: jax.Array) -> Window:
        return empty(size, window)

    def feed(value: jax.Array, inner: Window, count: jax.Array) -> Window:
        filled = Window(jnp.broadcast_to(value[..., None], inner.values.shape))
        return select(count == 0, filled, push(value, inner, count))

    def limit(size: jax.Array, inner: Window, count: jax.Array, rank: Any) -> jax.Array:
        window = feed(size, inner, count)
        n = held(window)
        rank = jnp.asarray(rank)
        place = jnp.minimum(jnp.where(rank >= 0, rank, 0).astype(jnp.int32), jnp.maximum(n - 1, 0))
        found = jnp.where(n > 0, smallest(window, place), jnp.inf)
        return jnp.where(rank >= 0, found, jnp.nan)

    return history(
        init, limit, feed, knob=rank, feeding=feeding, warmup=warmup, warmup_limit=warmup_limit, patience=patience,
        call=call,
    )  # fmt: skip


def percentile_clipping(
    percentile: Any = 5,
    window: int = 100,
    *,
    measure: Measure | None = None,
    feeding: Feed | None = None,
    warmup: int = 0,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 1000,
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf down to the ``percentile``-th smallest, from 0, of its last 100 norms (bitsandbytes).

    c_i = sorted(n_{i,t-99}, ..., n_{i,t})[percentile],  g_i <- g_i * min(1, c_i / ||g_i||)

    When to use: `autoclip` for each leaf with a short window. At 5 nineteen steps in twenty are clipped.

    Args:
      percentile: 0 <= percentile < window, a place in the window counted from the smallest (bitsandbytes' example: 5):
        an integer, a traced scalar, or a schedule.
      window: >= 1, norms remembered per leaf (bitsandbytes: 100).
      measure: the scope, see `optclip.measures`; None for `leaf_norm`.
      feeding: what enters the window; None for `raw`, the norm before the clip.
      warmup: steps that only collect.
      warmup_limit: the static limit during warm-up, in units of the norm.
      patience: clips in a row after which the window starts afresh, and zeros do not enter it; None for neither.

    State: `ClipState`; ``rule`` is a `History` with ``inner.values``: window + 2 numbers per leaf, 102 by default.

    Guarantees: a lasting shift of the level is accepted within ``window - percentile`` steps.

    Edge cases: the first step passes and fills the window. Zero, NaN and infinite norms do not enter it.

    Departures: bitsandbytes keeps squares, which overflow float32 beyond 1e19, and has no bfloat16. There zeros enter
      (``patience=None`` lets them in).

    References: bitsandbytes, ``percentile_clipping`` of its optimizers, before version 0.50.

    Example:
      >>> tx = optax.chain(percentile_clipping(5), optax.adam(1e-3))
    """
    measure, feeding = measure or leaf_norm, feeding or raw
    rule = order_statistic(
        percentile, window, feeding=feeding, warmup=warmup, warmup_limit=warmup_limit, patience=patience,
        call="percentile_clipping", name="percentile",
    )  # fmt: skip
    return clip_by(measure, rule)
