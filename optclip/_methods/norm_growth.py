"""The norm-growth limiter of Fira and APOLLO."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _numerics
from optclip._clip import clip_by
from optclip._history import Feed, clipped, history
from optclip._rules import Threshold
from optclip.measures import Measure, leaf_norm


class Last(NamedTuple):
    """The memory of `growth_ratio`: the last value that was fed, float32[S]."""

    norm: jax.Array


def growth_ratio(
    ratio: Any = 1.01, *, feeding: Feed = clipped, patience: int | None = 50, call: str = "growth_ratio"
) -> Threshold:
    """A limit of ratio * the last size.

    Args:
      ratio: > 1 (gamma), the largest growth in a step: a number, a traced scalar, or a schedule.
      feeding: what counts as the last size, see `optclip.thresholds`; `clipped` as in the papers.
      patience: steps in a row with a size over 4 times its limit after which one passes; None for never.
      call: the name of the method, for error messages.

    Memory: 3 numbers per size (`History` with `Last`).

    Example:
      >>> tx = clip_by(global_norm, growth_ratio(1.1))
    """
    _checks.check_above_one(call, "ratio", ratio)

    def init(size: jax.Array) -> Last:
        return Last(jnp.zeros_like(size))

    def limit(size: jax.Array, inner: Last, count: jax.Array, ratio: Any) -> jax.Array:
        return jnp.where(count > 0, _numerics.times(ratio, inner.norm), jnp.inf)

    def feed(value: jax.Array, inner: Last, count: jax.Array) -> Last:
        del inner, count
        return Last(value)

    return history(init, limit, feed, knob=ratio, feeding=feeding, patience=patience, excess=4.0, call=call)


def norm_growth_limiter(
    ratio: Any = 1.01, *, measure: Measure | None = None, feeding: Feed | None = None, patience: int | None = 50
) -> optax.GradientTransformationExtraArgs:
    """Lets the norm of each leaf grow by at most ``ratio`` in a step.

    u_t <- u_t * min(1, ratio * ||u_{t-1}|| / ||u_t||), where u_{t-1} is the last update after its own limit

    When to use: behind the scaling of a low-rank or sign-like optimizer, before the learning rate; also in front of an
    optimizer.

    Args:
      ratio: > 1 (gamma; papers: 1.01): a number, a traced scalar, or a schedule.
      measure: the scope, see `optclip.measures`; None for `leaf_norm`.
      feeding: what counts as the last norm: the one after the limit; None for `clipped`.
      patience: steps in a row with a norm over 4 times its limit after which one passes as it is; None for never.

    State: `ClipState`; ``rule`` is a `History` with ``inner.norm``: two int32 and one float32 per size.

    Guarantees: never stuck. After ``patience`` norms in a row over 4 times the limit one passes; else a new level is
      climbed to by 1% a step, as in the papers (140 steps for 4 times).

    Edge cases: the first step passes. Zero, NaN and infinite norms are not remembered, so a leaf that was zero goes on
      from its last norm. A NaN or an infinity makes the updates of its own leaf NaN.

    Departures: the authors' code remembers zeros, adds 1e-8 to the last norm, and then needs 2,000 steps to climb back
      from it; ``patience=None`` does so too, without the 1e-8, and so stays at zero.

    References: Chen et al., "Fira", arXiv:2410.01623, Section 4.3; Zhu et al., "APOLLO", MLSys 2025, arXiv:2412.05270.

    Example:
      >>> tx = optax.chain(optax.scale_by_adam(), norm_growth_limiter(), optax.scale(-1e-3))
    """
    measure, feeding = measure or leaf_norm, feeding or clipped
    return clip_by(measure, growth_ratio(ratio, feeding=feeding, patience=patience, call="norm_growth_limiter"))
