"""Clipping at a multiple of the moving average of the norm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _numerics
from optclip._clip import clip_by
from optclip._history import Feed, clipped, history
from optclip._rules import Threshold
from optclip.measures import Measure, global_norm


class Ema(NamedTuple):
    """The memory of `ema_ratio`: the moving average of what was fed, float32[S]."""

    mean: jax.Array


def ema_ratio(
    ratio: Any,
    decay: float = 0.99,
    *,
    feeding: Feed = clipped,
    warmup: int = 25,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 50,
    call: str = "ema_ratio",
) -> Threshold:
    """A limit of ratio * EMA of the sizes before this one.

    Args:
      ratio: > 1, a factor on the average size: a number, a traced scalar, or a schedule.
      decay: in [0, 1), per step. The average is exact (a plain mean) until 1 / (1 - decay) values are in.
      feeding: what enters the average, see `optclip.thresholds`.
      warmup: steps that only collect.
      warmup_limit: the static limit during them, in units of the size.
      patience: clips in a row after which the average starts afresh; None for never.
      call: the name of the method, for error messages.

    Memory: 3 numbers per size (`History` with `Ema`).

    Example:
      >>> tx = clip_by(leaf_norm, ema_ratio(1.5))  # the same rule for every leaf
    """
    _checks.check_above_one(call, "ratio", ratio)
    _checks.check_fraction(call, "decay", decay)

    def init(size: jax.Array) -> Ema:
        return Ema(jnp.zeros_like(size))

    def limit(size: jax.Array, inner: Ema, count: jax.Array, ratio: Any) -> jax.Array:
        return jnp.where(count > 0, _numerics.times(ratio, inner.mean), jnp.inf)

    def feed(value: jax.Array, inner: Ema, count: jax.Array) -> Ema:
        weight = jnp.maximum(1 - decay, 1 / (count.astype(value.dtype) + 1))
        return Ema(inner.mean + weight * (value - inner.mean))

    return history(
        init,
        limit,
        feed,
        knob=ratio,
        feeding=feeding,
        warmup=warmup,
        warmup_limit=warmup_limit,
        patience=patience,
        call=call,
    )


def clip_by_ema(
    ratio: Any = 2.0,
    decay: float = 0.99,
    *,
    measure: Measure | None = None,
    feeding: Feed | None = None,
    warmup: int = 25,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 50,
) -> optax.GradientTransformationExtraArgs:
    """Scales the gradient down to ``ratio`` times the moving average of its norm.

    c_t = ratio * m_{t-1},  g <- g * min(1, c_t / ||g||),  m_t = decay * m_{t-1} + (1 - decay) * min(||g||, c_t)

    When to use: an adaptive limit with one number of memory and one to choose.

    Args:
      ratio: > 1, a factor on the average norm: a number, a traced scalar, or a schedule.
      decay: in [0, 1), per step.
      measure: the scope, see `optclip.measures`; None for `global_norm`.
      feeding: what enters the average; None for `clipped`, the norm after the clip.
      warmup: steps that only collect (25, as ZClip).
      warmup_limit: the static limit during warm-up, in units of the norm.
      patience: clips in a row after which the average starts afresh; None for never.

    State: `ClipState`; ``rule`` is a `History` with ``inner.mean``, one float32 per size.

    Guarantees: a shift of the level that puts ``patience`` norms in a row beyond the limit is accepted within
      ``patience + warmup`` steps. A norm within the limit starts the count anew; the average then climbs to the level.

    Edge cases: the first step passes. Zero, NaN and infinite norms do not enter the average.

    Departures: many codes have this rule, no paper; the plain mean until 1 / (1 - decay) values are in replaces a
      start at the first norm. ``patience=None`` turns the escape off.

    References: none. torchzero's ``ClipNormByEMA`` is another rule: it clips to the norm of the average gradient.

    Example:
      >>> tx = optax.chain(clip_by_ema(2.0), optax.adamw(1e-3))
    """
    measure, feeding = measure or global_norm, feeding or clipped
    rule = ema_ratio(
        ratio, decay, feeding=feeding, warmup=warmup, warmup_limit=warmup_limit, patience=patience, call="clip_by_ema"
    )
    return clip_by(measure, rule)
