"""Rules with a history, written once for any scope: what is allowed, what is remembered, and a way out when stuck.

A rule says three things about one array of sizes: its empty memory, the limit it makes of its memory, and how a value
enters that memory. `history` adds what all of them share: warm-up, what is fed, and patience.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import _checks
from optclip._numerics import times
from optclip._rules import Threshold, per_size, resolve, select

Feed = Callable[[jax.Array, jax.Array], jax.Array]  # (size, limit) -> the value that enters; infinity or NaN for none


def raw(size: jax.Array, limit: jax.Array) -> jax.Array:
    """Feeds the size before the clip: follows any shift of the level, and is moved by every spike."""
    del limit
    return size


def clipped(size: jax.Array, limit: jax.Array) -> jax.Array:
    """Feeds the size after the clip, min(size, limit): spikes hardly move it, a lasting shift is followed slowly."""
    return jnp.minimum(size, limit)


def winsorized(factor: float = 10.0) -> Feed:
    """Feeds min(size, factor * limit): between `raw` (infinite factor) and `clipped` (factor 1)."""
    _checks.check_positive("winsorized", "factor", factor)

    def feed(size: jax.Array, limit: jax.Array) -> jax.Array:
        return jnp.minimum(size, times(factor, limit))

    return feed


def accepted(size: jax.Array, limit: jax.Array) -> jax.Array:
    """Feeds sizes up to the limit, and nothing on a spike."""
    return jnp.where(size <= limit, size, jnp.inf)


class History(NamedTuple):
    """The memory of a rule with a history; S is the shape of the sizes (see `optclip.thresholds.per_size`).

    Attributes:
      step: int32[S], updates seen, if the knob or the cap is a schedule; else ().
      entered: int32[S], values that entered since the start, or since patience last ran out.
      streak: int32[S], clips in a row.
      inner: the rule's own arrays.
    """

    step: Any
    entered: jax.Array
    streak: jax.Array
    inner: Any


def mass(decay: Any, count: jax.Array, dtype: Any) -> jax.Array:
    """1 - decay**count, the weight of ``count`` >= 1 values in a moving average that started at 0."""
    log = math.log(decay) if isinstance(decay, float) and decay > 0 else jnp.log(jnp.asarray(decay, dtype))
    return -jnp.expm1(count.astype(dtype) * log)  # 1 - decay**count has few digits left for a decay of 0.99999


def history(
    init: Callable[[jax.Array], Any],
    limit: Callable[..., jax.Array],
    feed: Callable[..., Any],
    *,
    knob: Any = (),
    feeding: Feed = raw,
    warmup: int = 0,
    warmup_limit: Any = jnp.inf,
    patience: int | None = None,
    restart: Callable[[jax.Array], Any] | None = None,
    excess: float = 1.0,
    cap: Any = jnp.inf,
    call: str = "history",
) -> Threshold:
    """A threshold of any scope from a rule with a history.

    Args:
      init: ``size -> inner``, the empty memory (a NamedTuple of arrays whose shapes start with that of ``size``).
      limit: ``(size, inner, count, knob) -> limit``, before the size is fed.
      feed: ``(value, inner, count) -> inner``, the memory with one more value.
      knob: the limit-like argument (a factor, a z-score): a number, a traced scalar or a schedule of the step.
      feeding: what enters the memory: `raw`, `clipped`, `winsorized(factor)` or `accepted`.
      warmup: values to collect first; until then the limit is ``warmup_limit``, and what enters is the raw size.
      warmup_limit: > 0, the static limit during warm-up; infinity passes everything.
      patience: after so many clips in a row the memory starts afresh, and the step passes under ``warmup_limit``:
        a new level, if it is beyond the limit throughout, is accepted within ``patience + warmup`` steps. Sizes of
        zero, which say nothing about the level, are then not fed either, and no limit is zero. None leaves the rule
        as it is.
      restart: ``size -> inner``, the memory when patience has run out; None for ``init``.
      excess: how many times its limit a size must be for its clip to count towards patience: > 1 for rules whose
        limit climbs to a new level by itself, if slowly.
      cap: > 0, the largest limit (a number, a traced scalar or a schedule). It comes last: the memory and the
        patience see the limit before it.
      call: the name of the method, for error messages.

    A size that is not finite changes nothing in the memory.
    """
    _checks.check_callable(call, feeding=feeding)
    _checks.check_steps(call, "warmup", warmup)
    _checks.check_positive(call, "warmup_limit", warmup_limit)
    if patience is not None:
        _checks.check_steps(call, "patience", patience, least=1)
    counted = callable(knob) or callable(cap)

    def start(size: jax.Array) -> History:
        zeros = lambda: jnp.zeros(jnp.shape(size), jnp.int32)  # one buffer each, for a state can be donated
        return History(zeros() if counted else (), zeros(), zeros(), init(size))

    def step(size: jax.Array, memory: History, **extra: Any) -> tuple[jax.Array, History]:
        del extra
        count, inner = memory.entered, memory.inner
        resting = jnp.asarray(warmup_limit, size.dtype)
        allowed = limit(size, inner, count, resolve(knob, memory.step))
        learning = count < warmup
        allowed = jnp.where(learning, resting, allowed)
        streak = jnp.where((size > jnp.asarray(excess, size.dtype) * allowed) & ~learning, memory.streak + 1, 0)
        if patience is not None:
            stuck = streak >= patience
            inner = select(stuck, (restart or init)(size), inner)
            count, streak = jnp.where(stuck, 0, count), jnp.where(stuck, 0, streak)
            allowed = jnp.where(stuck, resting, jnp.maximum(allowed, jnp.finfo(size.dtype).tiny))
            learning = learning | stuck
        value = jnp.where(learning, size, feeding(size, allowed))
        enters = jnp.isfinite(value) if patience is None else jnp.isfinite(value) & (value > 0)
        fed = feed(jnp.where(enters, value, jnp.ones_like(value)), inner, count)
        after = memory.step + 1 if counted else ()
        allowed = jnp.minimum(allowed, jnp.asarray(resolve(cap, memory.step)).astype(size.dtype))
        return allowed, History(after, count + enters.astype(jnp.int32), streak, select(enters, fed, inner))

    return per_size(start, step)


class RunningMean(NamedTuple):
    """The memory of `running_mean`: the moving average from 0, float32[S]."""

    mean: jax.Array


def running_mean(
    decay: float = 0.999, *, feeding: Feed = raw, patience: int | None = 50, call: str = "running_mean"
) -> Threshold:
    """A limit of the bias-corrected EMA of the sizes, this one included.

    Args:
      decay: in [0, 1), per step.
      feeding: what enters the average, see `optclip.thresholds`.
      patience: steps in a row with a size over 4 times its limit after which the average starts afresh; None for never.
      call: the name of the method, for error messages.

    Memory: 3 numbers per size (`History` with `RunningMean`).

    Example:
      >>> tx = clip_by(leaf_norm, running_mean(0.99))
    """
    _checks.check_fraction(call, "decay", decay)

    def init(size: jax.Array) -> RunningMean:
        return RunningMean(jnp.zeros_like(size))

    def limit(size: jax.Array, inner: RunningMean, count: jax.Array, knob: Any) -> jax.Array:
        del knob
        mean = feed(size, inner, count).mean / mass(decay, count + 1, size.dtype)
        return jnp.where(mean > 0, mean, jnp.inf)

    def feed(value: jax.Array, inner: RunningMean, count: jax.Array) -> RunningMean:
        del count
        return RunningMean(inner.mean + (1 - decay) * (value - inner.mean))

    return history(init, limit, feed, feeding=feeding, patience=patience, excess=4.0, call=call)
