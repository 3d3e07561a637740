"""Clipping at a percentile of a full window of past norms, under a cap (TRELLIS)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optclip import _checks
from optclip._clip import clip_by
from optclip._history import Feed, history, raw
from optclip._memories import Window, empty, percentile_of, push
from optclip._rules import Threshold
from optclip.measures import Measure, global_norm


def past_percentile(
    percent: Any,
    window: int = 1000,
    *,
    cap: Any = jnp.inf,
    feeding: Feed = raw,
    warmup: int | None = None,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 1000,
    call: str = "past_percentile",
) -> Threshold:
    """A limit at a percentile of the sizes before this one, linearly interpolated, and never beyond a cap.

    Args:
      percent: in [0, 100]: a number, a traced scalar, or a schedule.
      window: >= 1, sizes remembered.
      cap: > 0, the largest limit, in units of the size, also during warm-up: a number, a traced scalar, or a schedule.
      feeding: what enters the window, see `optclip.thresholds`; fed `clipped` sizes the limit can only sink.
      warmup: steps that only collect; None for a full window.
      warmup_limit: the static limit during them, in units of the size.
      patience: clips in a row after which the window starts afresh, and sizes of zero do not enter it; None for
        neither.
      call: the name of the method, for error messages.

    Memory: window + 2 numbers per size (`History` with ``inner.values``, float32[S + (window,)]).

    Guarantees: fed `raw` sizes, a new level is accepted, under the cap, within ``window`` steps.

    Example:
      >>> tx = clip_by(leaf_norm, past_percentile(90.0, window=100, cap=1.0))
    """
    _checks.check(call, "percent", percent, lambda x: (x >= 0) & (x <= 100), "in [0, 100]")
    _checks.check_count(call, "window", window, least=1)
    _checks.check_positive(call, "cap" if call == "past_percentile" else "max_norm", cap)

    def init(size: jax.Array) -> Window:
        return empty(size, window)

    def limit(size: jax.Array, inner: Window, count: jax.Array, percent: Any) -> jax.Array:
        del size, count
        return percentile_of(inner, percent)

    return history(
        init, limit, push, knob=percent, feeding=feeding, warmup=window if warmup is None else warmup,
        warmup_limit=warmup_limit, patience=patience, cap=cap, call=call,
    )  # fmt: skip


def clip_by_percentile(
    percent: Any = 95.0,
    window: int = 1000,
    max_norm: Any = 1.0,
    *,
    measure: Measure | None = None,
    feeding: Feed | None = None,
    warmup: int | None = None,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 1000,
) -> optax.GradientTransformationExtraArgs:
    """Scales the gradient down to a percentile of the last norms, and never leaves it longer than ``max_norm``.

    c_t = min(max_norm, percentile of (n_{t-window}, ..., n_{t-1})),  g <- g * min(1, c_t / ||g||);
    c_t = max_norm until the window is full

    When to use: as a fixed limit that tightens by itself once gradients are far below it. ``max_norm=inf`` leaves the
    percentile alone: quantile clipping with a rolling buffer.

    Args:
      percent: in [0, 100] (TRELLIS: 95): a number, a traced scalar, or a schedule.
      window: >= 1, norms remembered (TRELLIS: 1000).
      max_norm: > 0, the largest limit (TRELLIS's configurations: 1.0): a number, a traced scalar, or a schedule.
      measure: the scope, see `optclip.measures`; None for `global_norm`.
      feeding: what enters the window; None for `raw`, the norm before the clip.
      warmup: norms to collect first; None for a full window.
      warmup_limit: a static limit during warm-up besides ``max_norm``, in units of the norm.
      patience: clips in a row after which the window starts afresh, and zeros do not enter it; None for neither.
        Clips by ``max_norm`` alone do not count.

    State: `ClipState`; ``rule`` is a `History` with ``inner.values``: window + 2 numbers per size, 4 kB by default.

    Guarantees: the norm of the result is at most ``max_norm``. A lasting shift of the level is accepted, under
      ``max_norm``, within ``window`` steps.

    Edge cases: zero, NaN and infinite norms do not enter the window.

    Departures: in TRELLIS zeros enter (``patience=None`` lets them in).

    References: TRELLIS, ``AdaptiveGradClipper``. The theory of a rolling quantile: Merad, Gaiffas, "Robust stochastic
      optimization via gradient quantile clipping" (QC-SGD), TMLR 2024, arXiv:2309.17316.

    Example:
      >>> tx = optax.chain(clip_by_percentile(95.0, max_norm=1.0), optax.adamw(1e-4))
    """
    measure, feeding = measure or global_norm, feeding or raw
    rule = past_percentile(
        percent, window, cap=max_norm, feeding=feeding, warmup=warmup, warmup_limit=warmup_limit, patience=patience,
        call="clip_by_percentile",
    )  # fmt: skip
    return clip_by(measure, rule)
