"""Clipping at mean + k standard deviations of a window of past norms (Levanter), the step-outlier rule as a limit."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _numerics
from optclip._clip import clip_by
from optclip._history import Feed, history, raw
from optclip._memories import Window, empty, moments_of, push
from optclip._rules import Threshold
from optclip.measures import Measure, global_norm


def window_zscore(
    z: Any = 6.0,
    window: int = 128,
    *,
    warmup: int = 64,
    ddof: int = 0,
    eps: float = 1e-6,
    feeding: Feed = raw,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 1000,
    call: str = "window_zscore",
) -> Threshold:
    """A limit of mean + z * std over a window of the sizes before this one: beyond it a step is an outlier.

    Args:
      z: > 0, standard deviations above the mean (OLMo's step skipping: 6, Levanter's clip: 3): a number, a traced
        scalar, or a schedule.
      window: >= 2, sizes remembered (128).
      warmup: the least history, sizes before this one (64): no limit until then. At most ``window`` of them count.
      ddof: 0 for the population's standard deviation (Levanter), 1 for the unbiased one (OLMo, MaxText).
      eps: >= 0, the least standard deviation, in units of the size.
      feeding: what enters the window, see `optclip.thresholds`.
      warmup_limit: the static limit during warm-up, in units of the size.
      patience: clips in a row after which the window starts afresh, and sizes of zero do not enter it; None for
        neither.
      call: the name of the method, for error messages.

    Memory: window + 2 numbers per size (`History` with ``inner.values``, float32[S + (window,)]).

    Guarantees: fed `raw` sizes, a new level is accepted within ceil(window / (1 + z^2)) + 1 steps.

    Departures: OLMo and MaxText count the current step in the least history: ``warmup=63, ddof=1`` is their rule.

    Example:
      >>> tx = clip_by(global_norm, window_zscore(6.0), responses.zero)  # drops outliers
    """
    _checks.check_positive(call, "z", z)
    _checks.check_count(call, "window", window, least=2)
    _checks.check_count(call, "ddof", ddof)
    _checks.check_nonnegative(call, "eps", eps)

    def init(size: jax.Array) -> Window:
        return empty(size, window)

    def limit(size: jax.Array, inner: Window, count: jax.Array, z: Any) -> jax.Array:
        mean, std = moments_of(inner, ddof)
        return mean + _numerics.times(z, jnp.maximum(std, jnp.asarray(eps, size.dtype)))

    return history(
        init, limit, push, knob=z, feeding=feeding, warmup=warmup, warmup_limit=warmup_limit, patience=patience,
        call=call,
    )  # fmt: skip


def clip_by_historical_norm(
    z: Any = 3.0,
    window: int = 128,
    *,
    measure: Measure | None = None,
    feeding: Feed | None = None,
    warmup: int = 64,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 1000,
) -> optax.GradientTransformationExtraArgs:
    """Scales an update down to mean + ``z`` standard deviations of the norms of the last ``window`` updates.

    c_t = mean(W) + z * max(std(W), 1e-6) over W = (n_{t-window}, ..., n_{t-1}),  u <- u * min(1, c_t / ||u||)

    When to use: after the optimizer, on its updates, against steps far beyond the ordinary; it also works on
    gradients.

    Args:
      z: > 0, standard deviations above the mean (Levanter: 3): a number, a traced scalar, or a schedule.
      window: >= 2, norms remembered (Levanter: 128).
      measure: the scope, see `optclip.measures`; None for `global_norm`.
      feeding: what enters the window; None for `raw`, the norm before the clip, "to prevent collapse".
      warmup: norms to collect first (Levanter: half the window).
      warmup_limit: the static limit during warm-up, in units of the norm.
      patience: clips in a row after which the window starts afresh, and zeros do not enter it; None for neither.

    State: `ClipState`; ``rule`` is a `History` with ``inner.values``: window + 2 numbers per size, 130 by default.

    Guarantees: never stuck: a lasting shift of the level is accepted within 14 steps at the defaults, for every norm
      enters the window.

    Edge cases: the first ``warmup`` steps pass. Zero, NaN and infinite norms do not enter the window.

    Departures: in Levanter zeros enter, so that a layer that wakes up is held at 1e-6 for 14 steps, and one NaN turns
      the clip off for a whole window; here neither. ``patience=None`` lets the zeros in.

    References: Levanter, ``clip_update_by_historical_norm``.

    Example:
      >>> tx = optax.chain(optax.adamw(1e-3), clip_by_historical_norm())
    """
    measure, feeding = measure or global_norm, feeding or raw
    rule = window_zscore(
        z, window, warmup=warmup, feeding=feeding, warmup_limit=warmup_limit, patience=patience,
        call="clip_by_historical_norm",
    )  # fmt: skip
    return clip_by(measure, rule)
