"""SPAMP: per-layer power shaping and projection of gradients (You and Liu, 2025)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _elementwise, _numerics
from optclip._clip import ClipState, cast_tree, clip_by, one_at_least, respond, stats_after
from optclip._history import Feed, raw, running_mean
from optclip._transformation import transformation
from optclip.measures import Measure, leaf_norm
from optclip.responses import rescale


def spamp(
    decay: float = 0.99,
    *,
    least: float = 0.7,
    measure: Measure | None = None,
    feeding: Feed | None = None,
    patience: int | None = 50,
    record: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Shapes the elements of a spike by a power, and projects the leaf to the moving average of its norm (SPAMP).

    tau_i = EMA(||g_i||), bias-corrected and with this step,  a = min(1, max(least, tau_i / ||g_i||))
    g' = sign(g_i) * |g_i|^a for each element,  u_i = g' * min(1, tau_i / ||g'||)

    When to use: as a softer clip per layer: in a spike, the small elements lose less than the large ones. The power
    depends on the unit of the gradient.

    Args:
      decay: in [0, 1) (beta; paper: 0.9 to 0.999), per step.
      least: in (0, 1], the smallest power (paper: 0.7); 1 is a plain clip at the average.
      measure: the scope, see `optclip.measures`; None for `leaf_norm`.
      feeding: what enters the average: the raw norm; None for `raw`.
      patience: steps in a row with a norm over 4 times its average after which the average starts afresh; None for
        never.
      record: whether the state keeps norms and averages.

    State: `ClipState`; ``rule`` is a `History` with ``inner.mean``: two int32 and one float32 per size.

    Guarantees: ||u_i|| <= tau_i; bit-equal to the input below. Never stuck: the raw norm enters, so the average covers
      1 - decay of the way to a new level in each step, or all of it when patience runs out.

    Edge cases: the first step passes. Zero, NaN and infinite norms do not enter. A NaN or an infinity makes the updates
      of its own scope NaN.

    Departures: the paper asks for a decreasing power in [0.7, 1] without saying which; this one is 1 up to the average
      and then falls with 1 / norm. The average is bias-corrected, or the first steps would be cut to 1 - decay.
      ``patience=None`` turns the fresh start off.

    References: You, Liu, "Gradient shaping beyond clipping", ACM Multimedia Asia 2025, arXiv:2510.01578.

    Example:
      >>> tx = optax.chain(spamp(), optax.sgd(0.1))
    """
    measure, feeding = measure or leaf_norm, feeding or raw
    _checks.check("spamp", "least", least, lambda x: (x > 0) & (x <= 1), "in (0, 1]")
    rule = running_mean(decay, feeding=feeding, patience=patience, call="spamp")

    def power(g: Any, size: jax.Array, tau: jax.Array) -> Any:
        if not _numerics.is_gradient(g):
            return g
        wide = _elementwise.widen(g)
        exponent = jnp.clip(tau / jnp.where(size == 0, 1, size), least, 1).astype(jnp.finfo(wide.dtype).dtype)
        shaped = (size > tau) & (wide != 0)
        magnitude = jnp.where(shaped, jnp.abs(wide), 1)
        return jnp.where(shaped, wide * magnitude ** (exponent - 1), wide)

    def update(updates: Any, state: ClipState, params: Any = None, **extra: Any) -> tuple[Any, ClipState]:
        sizes = one_at_least(measure(updates))
        limits, memory = rule.update(sizes, state.rule, params, **extra)
        wide = [jax.tree.broadcast(x, updates) for x in (sizes, limits)]
        shaped = jax.tree.map(power, updates, *wide)
        out = _elementwise.cast_back(respond(rescale, shaped, one_at_least(measure(shaped)), limits), updates)
        return out, ClipState(cast_tree(memory, state.rule), stats_after(sizes, limits, state.stats))

    return transformation(clip_by(measure, rule, record=record).init, update, ClipState)
