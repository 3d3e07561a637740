"""Clipping at mean + 3 standard deviations, both moving averages over steps that were not clipped (Open-Sora Plan)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _numerics
from optclip._clip import clip_by
from optclip._history import Feed, accepted, history
from optclip._memories import Moments, mixed
from optclip._rules import Threshold
from optclip.measures import Measure, global_norm


def ema_sigma(
    sigmas: Any = 3.0,
    decay: Any = 0.99,
    *,
    first_limit: Any = 1.0,
    feeding: Feed = accepted,
    patience: int | None = 50,
    call: str = "ema_sigma",
) -> Threshold:
    """A limit of mean + sigmas * std, moving averages of the sizes before this one that were within their limits.

    Args:
      sigmas: > 0: a number, a traced scalar, or a schedule.
      decay: in [0, 1), per step.
      first_limit: > 0, the limit of the first step, in units of the size. The mean starts at three times the first
        size, but no higher than this.
      feeding: what enters the averages, see `optclip.thresholds`.
      patience: clips in a row after which the averages start afresh, at three times the size of the day whatever
        ``first_limit`` is; None for never.
      call: the name of the method, for error messages.

    Memory: 4 numbers per size (`History` with ``inner.mean`` and ``inner.std``, float32[S]).

    Guarantees: a new level that is beyond the limit ``patience`` times in a row is accepted within ``patience + 1``
      steps.

    Example:
      >>> tx = clip_by(leaf_norm, ema_sigma(3.0, first_limit=jnp.inf))
    """
    _checks.check_positive(call, "sigmas", sigmas)
    _checks.check_fraction(call, "decay", decay)
    _checks.check_positive(call, "first_limit", first_limit)

    def start(size: jax.Array, mean: Any) -> Moments:
        return Moments(jnp.full_like(size, mean), jnp.zeros_like(size))

    def limit(size: jax.Array, inner: Moments, count: jax.Array, sigmas: Any) -> jax.Array:
        del count
        return inner.mean + _numerics.times(sigmas, inner.std)

    def feed(value: jax.Array, inner: Moments, count: jax.Array) -> Moments:
        tripled = jnp.minimum(3 * value, jnp.finfo(value.dtype).max)
        old = jnp.where(count == 0, jnp.minimum(tripled, inner.mean), inner.mean)
        weight = jnp.asarray(1 - decay, value.dtype)
        weight = jnp.where((count == 0) & (value > old), 0, weight)  # a first size beyond its limit only starts
        mean = old + weight * (value - old)
        return Moments(mean, mixed(inner.std, jnp.abs(value - mean), weight))

    return history(
        lambda size: start(size, first_limit), limit, feed, knob=sigmas, feeding=feeding, warmup=1,
        warmup_limit=first_limit, patience=patience, restart=lambda size: start(size, jnp.inf), call=call,
    )  # fmt: skip


def clip_by_ema_sigma(
    sigmas: Any = 3.0,
    decay: Any = 0.99,
    *,
    first_limit: Any = 1.0,
    measure: Measure | None = None,
    feeding: Feed | None = None,
    patience: int | None = 50,
) -> optax.GradientTransformationExtraArgs:
    """Scales the gradient down to mean + 3 standard deviations of its norm, averaged over unclipped steps.

    c_t = m_{t-1} + sigmas * s_{t-1},  g <- g * min(1, c_t / ||g||);
    if ||g|| <= c_t:  m_t = decay * m_{t-1} + (1 - decay) * ||g||,
    s_t^2 = decay * s_{t-1}^2 + (1 - decay) * (||g|| - m_t)^2;  m_0 = min(3 * ||g_1||, first_limit), s_0 = 0

    When to use: as a fixed limit of ``first_limit`` that follows the norm once it is below; made for diffusion models,
    whose gradients end far below 1.

    Args:
      sigmas: > 0, standard deviations above the mean (Open-Sora Plan: 3): a number, a traced scalar, or a schedule.
      decay: in [0, 1), per step (Open-Sora Plan: 0.99).
      first_limit: > 0, the limit of the first step and the highest start of the mean (Open-Sora Plan: 1.0), in units
        of the norm; infinity for none.
      measure: the scope, see `optclip.measures`; None for `global_norm`.
      feeding: what enters the averages; None for `accepted`, norms that were not clipped.
      patience: clips in a row after which the averages start afresh, at three times the norm of the day, and zeros do
        not enter them; None for neither.

    State: `ClipState`; ``rule`` is a `History` with ``inner.mean`` and ``inner.std``: 4 numbers per size.

    Guarantees: a shift of the level that puts ``patience`` norms in a row beyond the limit is accepted within
      ``patience + 1`` steps. A norm within the limit starts the count anew, and is all that the averages then see.

    Edge cases: there is no warm-up but the first step. Zero, NaN and infinite norms do not enter the averages.

    Departures: as the averages stand still on a clipped step, a level once above mean + 3 std stays clipped for ever in
      the reference; so does a run whose norm starts above ``first_limit`` and stays there. Here ``patience`` clips
      in a row start the averages afresh; ``patience=None`` turns that off.

    References: Open-Sora Plan v1.5.0 report, "adaptive gradient clipping"; ``AdaptiveGradClipper`` of its code.

    Example:
      >>> tx = optax.chain(clip_by_ema_sigma(), optax.adamw(1e-4))
    """
    measure, feeding = measure or global_norm, feeding or accepted
    rule = ema_sigma(
        sigmas, decay, first_limit=first_limit, feeding=feeding, patience=patience, call="clip_by_ema_sigma"
    )
    return clip_by(measure, rule)
