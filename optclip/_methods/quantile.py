"""Clipping at a quantile of the norm that one number tracks (Andrew et al., 2021, on the norm of the step)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _numerics
from optclip._clip import clip_by
from optclip._history import history
from optclip._rules import Threshold
from optclip.measures import Measure, global_norm


class Quantile(NamedTuple):
    """The memory of `quantile_tracker`: the quantile of the sizes so far, float32[S]."""

    estimate: jax.Array


def quantile_tracker(
    quantile: Any = 0.5,
    rate: Any = 0.2,
    *,
    ratio: Any = 1.0,
    warmup: int = 0,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 50,
    call: str = "quantile_tracker",
) -> Threshold:
    """A limit of ratio * q, where q is a quantile of the sizes before this one, tracked by one number.

    q <- q * exp(-rate * ([size <= q] - quantile)), from the first size on

    Args:
      quantile: in (0, 1), the fraction of sizes up to q (gamma): a number or a traced scalar.
      rate: > 0 (eta_C), the largest relative change of q in a step, likewise.
      ratio: > 0, a factor on the quantile: a number, a traced scalar, or a schedule.
      warmup: steps that only track.
      warmup_limit: the static limit during them, in units of the size.
      patience: clips in a row after which the tracker starts afresh, and sizes of zero do not move it; None for
        neither.
      call: the name of the method, for error messages.

    Memory: 3 numbers per size (`History` with `Quantile`). There is no ``feeding`` to choose: only whether a size is
    beyond q enters, and no spike, however high, moves it by more than a factor exp(rate * quantile).

    Guarantees: a new level that is beyond the limit ``patience`` times in a row is accepted, to a factor of exp(rate),
      within ``patience + warmup`` steps.

    Example:
      >>> tx = clip_by(leaf_norm, quantile_tracker(0.9))
    """
    _checks.check(call, "quantile", quantile, lambda x: (x > 0) & (x < 1), "in (0, 1)")
    _checks.check_positive(call, "rate", rate)
    _checks.check_positive(call, "ratio", ratio)

    def init(size: jax.Array) -> Quantile:
        return Quantile(jnp.full_like(size, jnp.inf))

    def limit(size: jax.Array, inner: Quantile, count: jax.Array, ratio: Any) -> jax.Array:
        del count
        return _numerics.times(ratio, inner.estimate)

    def feed(value: jax.Array, inner: Quantile, count: jax.Array) -> Quantile:
        info, dtype = jnp.finfo(value.dtype), value.dtype
        excess = (value <= inner.estimate).astype(dtype) - jnp.asarray(quantile, dtype)
        moved = inner.estimate * jnp.exp(-jnp.asarray(rate, dtype) * excess)
        return Quantile(jnp.where(count == 0, value, jnp.clip(moved, info.tiny, info.max)))

    return history(
        init, limit, feed, knob=ratio, warmup=warmup, warmup_limit=warmup_limit, patience=patience, call=call
    )


def clip_by_quantile(
    quantile: Any = 0.5,
    rate: Any = 0.2,
    *,
    ratio: Any = 1.0,
    measure: Measure | None = None,
    warmup: int = 0,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 50,
) -> optax.GradientTransformationExtraArgs:
    """Scales the gradient down to a quantile of its norm, tracked by a single number.

    g <- g * min(1, ratio * q_{t-1} / ||g||),  q_t = q_{t-1} * exp(-rate * ([||g|| <= q_{t-1}] - quantile))

    When to use: `autoclip` without the window: one number per size, at any scope. With the default about half of the
    steps are clipped; 0.9 or more only guards.

    Args:
      quantile: in (0, 1), the fraction of norms up to q (paper's gamma: 0.5): a number or a traced scalar.
      rate: > 0 (paper's eta_C: 0.2), the largest relative change of q in a step, likewise.
      ratio: > 0, a factor on the quantile (paper: 1; 2 with the median guards as `clip_by_median` does): a number, a
        traced scalar, or a schedule.
      measure: the scope, see `optclip.measures`; None for `global_norm`.
      warmup: steps that only track.
      warmup_limit: the static limit during warm-up, in units of the norm.
      patience: clips in a row after which q starts afresh at the norm of the day, and zeros do not move it; None for
        neither.

    State: `ClipState`; ``rule`` is a `History` with ``inner.estimate``: 3 numbers per size.

    Guarantees: a shift of the level that puts ``patience`` norms in a row beyond the limit is accepted, to a factor of
      exp(rate), within ``patience + warmup`` steps.

    Edge cases: the first step passes. Zero, NaN and infinite norms do not move q.

    Departures: the paper's quantile is that of the clients' updates within one round, from a count with noise; here of
      the norms of the steps, one after the other, without noise or privacy. The paper starts at 0.1; here q starts
      at the first norm. A shift by a factor x takes the paper's rule ln(x) / (rate * quantile) steps, 23 for a
      factor of 10; ``patience`` shortens what is longer than it.

    References: Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private learning with adaptive clipping", NeurIPS
      2021, arXiv:1905.03871, Section 2 (the geometric update).

    Example:
      >>> tx = optax.chain(clip_by_quantile(0.9), optax.adamw(1e-3))
    """
    measure = measure or global_norm
    rule = quantile_tracker(
        quantile, rate, ratio=ratio, warmup=warmup, warmup_limit=warmup_limit, patience=patience,
        call="clip_by_quantile",
    )  # fmt: skip
    return clip_by(measure, rule)
