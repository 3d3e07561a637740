"""Clipping at a multiple of the median norm of the last period (icefall's ScaledAdam)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip import _checks, _numerics
from optclip._clip import clip_by
from optclip._history import Feed, history, raw
from optclip._memories import Window, empty, held, push, smallest
from optclip._rules import Threshold, select
from optclip.measures import Measure, global_norm

_EARLY = (10, 20, 40)  # values after which a first, doubled estimate is made


class Median(NamedTuple):
    """The memory of `median_ratio`.

    Attributes:
      values: float32[S + (window,)], the last values.
      median: float32[S], the median in force, doubled if it was an early one; infinity before the first.
    """

    values: jax.Array
    median: jax.Array


def median_ratio(
    ratio: Any,
    window: int = 100,
    *,
    feeding: Feed = raw,
    warmup: int = 0,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 1000,
    call: str = "median_ratio",
) -> Threshold:
    """A limit of ratio * median of the last ``window`` sizes, drawn anew once per window.

    The median is the value of rank 2 * (n // 4) of n. Early estimates, after 10, 20 and 40 sizes, are doubled. The
    size on which an estimate is drawn is part of it; the very first is left out.

    Args:
      ratio: > 0: a number, a traced scalar, or a schedule.
      window: >= 4, sizes remembered, and steps between two estimates.
      feeding: what enters the window, see `optclip.thresholds`.
      warmup: steps that only collect, besides those before the first estimate.
      warmup_limit: the static limit during them, in units of the size.
      patience: clips in a row after which the window starts afresh, and sizes of zero do not enter it; None for
        neither.
      call: the name of the method, for error messages.

    Memory: window + 3 numbers per size (`History` with `Median`).

    Guarantees: fed `raw` sizes, a new level is accepted within 1.5 * window steps.

    Example:
      >>> tx = clip_by(leaf_norm, median_ratio(2.0))
    """
    _checks.check_positive(call, "ratio", ratio)
    _checks.check_count(call, "window", window, least=4)
    early = np.asarray([n for n in _EARLY if n < window] or [0], np.int32)

    def init(size: jax.Array) -> Median:
        return Median(empty(size, window).values, jnp.full_like(size, jnp.inf))

    def feed(value: jax.Array, inner: Median, count: jax.Array) -> Median:
        started = count > 0
        old = Window(inner.values)
        new = select(started, push(value, old, count), old)
        n = held(new)
        middle = smallest(new, jnp.minimum(2 * (n // 4), jnp.maximum(n - 1, 0)))
        first = jnp.any(count[..., None] == early.reshape((1,) * count.ndim + (-1,)), axis=-1)
        drawn = started & (first | (count % window == 0))
        return Median(new.values, jnp.where(drawn, jnp.where(first, 2 * middle, middle), inner.median))

    def limit(size: jax.Array, inner: Median, count: jax.Array, ratio: Any) -> jax.Array:
        return _numerics.times(ratio, feed(size, inner, count).median)

    return history(
        init, limit, feed, knob=ratio, feeding=feeding, warmup=warmup, warmup_limit=warmup_limit, patience=patience,
        call=call,
    )  # fmt: skip


def clip_by_median(
    ratio: Any = 2.0,
    window: int = 100,
    *,
    measure: Measure | None = None,
    feeding: Feed | None = None,
    warmup: int = 0,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 1000,
) -> optax.GradientTransformationExtraArgs:
    """Scales the gradient down to ``ratio`` times the median of its norm over the last period.

    c = ratio * sorted(n)[2 * (window // 4)] over the last ``window`` norms, drawn every ``window`` steps,
    g <- g * min(1, c / ||g||)

    When to use: against heavy tails. Up to half of the norms may be wild before the median moves.

    Args:
      ratio: > 0 (``clipping_scale``; icefall's recipes: 2): a number, a traced scalar, or a schedule.
      window: >= 4, norms remembered, and steps between two estimates (icefall: 100).
      measure: the scope, see `optclip.measures`; None for `global_norm`.
      feeding: what enters the window; None for `raw`, the norm before the clip.
      warmup: steps that only collect; the first estimate is after 10 in any case (``window``, if that is less), doubled
        until the window is full.
      warmup_limit: the static limit during warm-up, in units of the norm.
      patience: clips in a row after which the window starts afresh, and zeros do not enter it; None for neither.

    State: `ClipState`; ``rule`` is a `History` with a ``values`` window and the ``median`` in force: window + 3 numbers
      per size, 103 by default.

    Guarantees: a lasting shift of the level is accepted within 1.5 * window steps.

    Edge cases: the first 10 steps (``window``, if that is less) pass. Zero, NaN and infinite norms do not enter the
      window.

    Departures: icefall weighs each leaf by the root mean square of its parameters; here ``measure`` says how large.
      It zeroes the gradient if the norm is NaN; here it becomes NaN (see `skip_nonfinite`). Zeros enter there
      (``patience=None`` lets them in).

    References: icefall, ``ScaledAdam(clipping_scale=2.0)``.

    Example:
      >>> tx = optax.chain(clip_by_median(2.0), optax.adam(1e-3))
    """
    measure, feeding = measure or global_norm, feeding or raw
    rule = median_ratio(
        ratio, window, feeding=feeding, warmup=warmup, warmup_limit=warmup_limit, patience=patience,
        call="clip_by_median",
    )  # fmt: skip
    return clip_by(measure, rule)
