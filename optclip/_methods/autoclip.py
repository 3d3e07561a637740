"""AutoClip: the limit is a percentile of the norms so far, this one included (Seetharaman et al., 2020)."""

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


def percentile(
    percent: Any,
    window: int = 1000,
    *,
    feeding: Feed = raw,
    warmup: int = 0,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 1000,
    call: str = "percentile",
) -> Threshold:
    """A limit at a percentile of the last sizes, this one included; linearly interpolated.

    Args:
      percent: in [0, 100]: a number, a traced scalar, or a schedule. 0 clips to the smallest, 100 clips nothing.
      window: >= 1, sizes remembered.
      feeding: what enters the window, see `optclip.thresholds`; fed `clipped` sizes, the limit can only sink.
      warmup: steps that only collect.
      warmup_limit: the static limit during them, in units of the size.
      patience: clips in a row after which the window starts afresh, and sizes of zero do not enter it; None for
        neither. Clips in a row are ordinary here: keep it beyond the window.
      call: the name of the method, for error messages.

    Memory: window + 2 numbers per size (`History` with ``inner.values``, float32[S + (window,)]).

    Guarantees: fed `raw` sizes, a new level is accepted within ``window`` steps.

    Example:
      >>> tx = clip_by(leaf_norm, percentile(50.0, window=100))  # the median of each leaf
    """
    _checks.check(call, "percent", percent, lambda x: (x >= 0) & (x <= 100), "in [0, 100]")
    _checks.check_count(call, "window", window, least=1)

    def init(size: jax.Array) -> Window:
        return empty(size, window)

    def limit(size: jax.Array, inner: Window, count: jax.Array, percent: Any) -> jax.Array:
        return percentile_of(push(size, inner, count), percent)

    return history(
        init, limit, push, knob=percent, feeding=feeding, warmup=warmup, warmup_limit=warmup_limit,
        patience=patience, call=call,
    )  # fmt: skip


def autoclip(
    percent: Any = 10.0,
    window: int = 1000,
    *,
    measure: Measure | None = None,
    feeding: Feed | None = None,
    warmup: int = 0,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 1000,
) -> optax.GradientTransformationExtraArgs:
    """Scales the gradient down to a percentile of the norms so far (AutoClip).

    c_t = percentile of (n_{t-window+1}, ..., n_t),  g <- g * min(1, c_t / ||g||)

    When to use: without any idea of the scale of the gradient. At the paper's 10 nine steps in ten are clipped, so that
    it is a rule for the step size as much as a guard against spikes; 90 or more only guards.

    Args:
      percent: in [0, 100] (paper: 10): a number, a traced scalar, or a schedule. 100 clips nothing.
      window: >= 1, norms remembered.
      measure: the scope, see `optclip.measures`; None for `global_norm`.
      feeding: what enters the window; None for `raw`, the norm before the clip.
      warmup: steps that only collect (paper: 0).
      warmup_limit: the static limit during warm-up, in units of the norm.
      patience: clips in a row after which the window starts afresh, and zeros do not enter it; None for neither.

    State: `ClipState`; ``rule`` is a `History` with ``inner.values``: window + 2 numbers per size, 4 kB by default.

    Guarantees: the paper's trajectory for the first ``window`` steps; a lasting shift of the level is accepted within
      ``window`` steps.

    Edge cases: the first step passes, for the percentile of one norm is itself. Zero, NaN and infinite norms do not
      enter the window.

    Departures: the paper keeps every norm for ever, and never accepts a higher level once the run is long; here the
      last ``window``. Zeros do not enter, so that a layer that wakes up after a thousand idle steps is not held at
      zero (``patience=None`` lets them in). The authors' TensorFlow code clips each leaf to the global limit and takes
      the nearest rank; this is the paper's global rescale with linear interpolation, as their PyTorch code has it.

    References: Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: adaptive gradient clipping for source separation
      networks", MLSP 2020, arXiv:2007.14469, Algorithm 1. A rolling window in place of the whole history: Merad,
      Gaiffas, "Robust stochastic optimization via gradient quantile clipping", TMLR 2024, arXiv:2309.17316.

    Example:
      >>> tx = optax.chain(autoclip(10.0), optax.adam(1e-3))
    """
    measure, feeding = measure or global_norm, feeding or raw
    rule = percentile(
        percent, window, feeding=feeding, warmup=warmup, warmup_limit=warmup_limit, patience=patience, call="autoclip"
    )  # fmt: skip
    return clip_by(measure, rule)
