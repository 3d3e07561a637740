"""AGGC: adaptive group-wise gradient clipping into a band (Li et al., 2026)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _numerics
from optclip._clip import clip_by
from optclip._history import Feed, clipped, history
from optclip._rules import Threshold
from optclip.measures import group_norm
from optclip.responses import normalize, rescale


class BandMean(NamedTuple):
    """The memory of `ema_band`: the moving average from 0 of what was fed, float32[S]."""

    mean: jax.Array


def ema_band(
    high: Any,
    low: float | None = None,
    *,
    decay: float = 0.95,
    max_down: float = 0.9,
    max_up: float = 1.1,
    feeding: Feed = clipped,
    call: str = "ema_band",
) -> Threshold:
    """The size brought into the band [low * EMA, high * EMA], by a factor in [max_down, max_up].

    With ``low`` the limit is the size to reach, for `responses.normalize`; without, one for `responses.rescale`.

    Args:
      high: > 0: a number, a traced scalar, or a schedule.
      low: > 0 and below ``high``, or None for a band without a lower edge.
      decay: in [0, 1), of an average that starts at 0.
      max_down: in (0, 1], the smallest factor in a step.
      max_up: >= 1, the largest.
      feeding: what enters the average, see `optclip.thresholds`; `clipped` is the size after scaling, up or down.
      call: the name of the method, for error messages.

    Memory: 3 numbers per size (`History` with `BandMean`).

    Example:
      >>> tx = clip_by(leaf_norm, ema_band(1.5, 0.5), normalize)
    """
    _checks.check_positive(call, "high", high)
    if low is not None:
        top = high if isinstance(high, (int, float)) else jnp.inf
        _checks.check(call, "low", low, lambda x: (x > 0) & (x < top), "> 0 and below high")
    _checks.check_fraction(call, "decay", decay)
    _checks.check(call, "max_down", max_down, lambda x: (x > 0) & (x <= 1), "in (0, 1]")
    _checks.check(call, "max_up", max_up, lambda x: x >= 1, ">= 1")

    def init(size: jax.Array) -> BandMean:
        return BandMean(jnp.zeros_like(size))

    def limit(size: jax.Array, inner: BandMean, count: jax.Array, high: Any) -> jax.Array:
        del count
        top = jnp.where(inner.mean > 0, _numerics.times(high, inner.mean), jnp.inf)
        if low is None:
            return jnp.maximum(top, max_down * size)
        reached = jnp.clip(size, jnp.minimum(low * inner.mean, max_up * size), jnp.maximum(top, max_down * size))
        return jnp.where(size == 0, jnp.inf, reached)

    def feed(value: jax.Array, inner: BandMean, count: jax.Array) -> BandMean:
        del count
        return BandMean(inner.mean + (1 - decay) * (value - inner.mean))

    # What is reached may lie above the size: `clipped`, the smaller of the two, would miss that.
    fed = _reached if feeding is clipped and low is not None else feeding
    return history(init, limit, feed, knob=high, feeding=fed, call=call)


def _reached(size: jax.Array, limit: jax.Array) -> jax.Array:
    return jnp.where(size == 0, size, jnp.where(jnp.isfinite(size), limit, jnp.nan))


def aggc(
    groups: Any,
    high: Any = 0.7,
    low: float | None = None,
    *,
    decay: float = 0.95,
    max_down: float = 0.9,
    max_up: float = 1.1,
    feeding: Feed | None = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Brings the norm of each group of leaves towards a band around its own moving average (AGGC).

    n = ||g_G||,  n' = min(max(n, low * S_G), high * S_G), at least max_down * n and at most max_up * n
    g_G <- g_G * n' / n,  S_G <- decay * S_G + (1 - decay) * n'

    When to use: fine-tuning with modules of different scale (query, key, value, MLP, norms), one group for each kind.
    ``high`` below 1, as published, makes every step shrink by up to 10%; above 1 it clips spikes only, but never by
    more than ``max_down``.

    Args:
      groups: a prefix tree of labels, as `optax.partition` takes them, or a function from the updates to one.
      high: > 0, the upper edge in units of the average (authors' scripts: 0.6 to 0.7 for LoRA, 0.7 to 0.999 for
        reinforcement learning): a number, a traced scalar, or a schedule.
      low: > 0 and below ``high``, the lower edge: smaller norms are raised (authors: 0.95 to 0.98, switched off). None
        never raises.
      decay: in [0, 1) (authors: 0.95 for LoRA, 0.99 for reinforcement learning), per step.
      max_down: in (0, 1], the smallest factor in a step (authors: 0.9).
      max_up: >= 1, the largest (authors: 1.1).
      feeding: what enters the average: the norm after scaling; None for `clipped`.
      axis_name: see `clip_by_global_norm`.

    State: `ClipState`; ``rule`` is a `History` with ``inner.mean``: two int32 and one float32 per group.

    Guarantees: never stuck: no step shrinks by more than ``max_down``.

    Edge cases: the first step passes, for the average starts at 0. NaN and infinite norms do not enter it. A NaN or an
      infinity makes the updates of its own group NaN.

    Departures: the authors' code takes norms per micro-batch, in backward hooks; here they are those of the update.

    References: Li, Wu, Chang, "AGGC", Findings of ACL 2026, arXiv:2601.11864; https://github.com/ZhiyuanLi218/AGGC.

    Example:
      >>> tx = aggc({"encoder": "encoder", "head": "head"}, high=1.2)
    """
    feeding = feeding or clipped
    rule = ema_band(high, low, decay=decay, max_down=max_down, max_up=max_up, feeding=feeding, call="aggc")
    measure = partial(group_norm, groups=groups, axis_name=axis_name)
    return clip_by(measure, rule, rescale if low is None else normalize)
