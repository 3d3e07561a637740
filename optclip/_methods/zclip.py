"""ZClip: a norm beyond a z-score is brought back near the mean (Kumar et al., 2025)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _numerics
from optclip._clip import clip_by
from optclip._history import Feed, clipped, history
from optclip._memories import Moments, mixed
from optclip._rules import Threshold
from optclip.measures import Measure, global_norm

Target = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]  # (mean, std, score, z) -> limit


def reciprocal(mean: jax.Array, std: jax.Array, score: jax.Array, z: jax.Array) -> jax.Array:
    """mean + z^2 / score * std: the higher a spike, the harder it is clipped. The paper's choice."""
    return mean + z * (z / score) * std


def to_max(mean: jax.Array, std: jax.Array, score: jax.Array, z: jax.Array) -> jax.Array:
    """mean + z * std: a spike is clipped to the highest ordinary norm."""
    del score
    return mean + z * std


def to_mean(mean: jax.Array, std: jax.Array, score: jax.Array, z: jax.Array) -> jax.Array:
    """mean: a spike is clipped to the average norm."""
    del std, score, z
    return mean


def zscore(
    z: Any = 2.5,
    decay: Any = 0.97,
    *,
    target: Target = reciprocal,
    eps: Any = 1e-6,
    cap: Any = jnp.inf,
    feeding: Feed = clipped,
    warmup: int = 25,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 50,
    call: str = "zscore",
) -> Threshold:
    """A limit of mean + z * std, and lower for sizes beyond it: there it is a target.

    score = (size - mean) / (std + eps), over moving averages of the sizes before this one.

    Args:
      z: > 0, the score from which a size is an outlier: a number, a traced scalar, or a schedule.
      decay: in [0, 1), per step (alpha).
      target: the limit of an outlier: `reciprocal`, `to_max`, `to_mean`, or a function of (mean, std, score, z).
      eps: >= 0, added to the standard deviation in the score, in units of the size.
      cap: > 0, the largest limit, in units of the size, also during warm-up: a number, a traced scalar, or a schedule.
      feeding: what enters the averages, see `optclip.thresholds`.
      warmup: >= 1, sizes whose plain mean and standard deviation start the averages.
      warmup_limit: the static limit during them, in units of the size.
      patience: clips in a row (by the score, not the cap) after which the warm-up starts anew, and sizes of zero do
        not enter it; None for neither.
      call: the name of the method, for error messages.

    Memory: 4 numbers per size (`History` with ``inner.mean`` and ``inner.std``, float32[S]).

    Guarantees: a new level that is beyond the limit ``patience`` times in a row is accepted within
      ``patience + warmup`` steps.

    Example:
      >>> tx = clip_by(leaf_norm, zscore(3.0, target=to_max))
    """
    _checks.check_positive(call, "z", z)
    _checks.check_fraction(call, "decay", decay)
    _checks.check_nonnegative(call, "eps", eps)
    _checks.check_positive(call, "cap" if call == "zscore" else "max_norm", cap)
    _checks.check_steps(call, "warmup", warmup, least=1)
    _checks.check_callable(call, target=target)

    def init(size: jax.Array) -> Moments:
        return Moments(jnp.zeros_like(size), jnp.zeros_like(size))

    def limit(size: jax.Array, inner: Moments, count: jax.Array, z: Any) -> jax.Array:
        del count
        z, std = jnp.asarray(z, size.dtype), inner.std
        unit = std + jnp.asarray(eps, size.dtype)
        bound = inner.mean + _numerics.times(z, unit)
        z = jnp.where(z == jnp.inf, 1, z)  # no size is beyond the bound then, but derivatives see the target
        score = jnp.where(size > bound, (size - inner.mean) / jnp.where(unit == 0, 1, unit), z)
        return jnp.where(size > bound, jnp.minimum(target(inner.mean, std, score, z), bound), bound)

    def feed(value: jax.Array, inner: Moments, count: jax.Array) -> Moments:
        plain = 1 / (count + 1).astype(value.dtype)
        learning = count < warmup
        weight = jnp.where(learning, plain, jnp.asarray(1 - decay, value.dtype))
        before = jnp.abs(value - inner.mean)
        mean = inner.mean + weight * (value - inner.mean)
        # The plain variance grows by both deviations, from the old mean and the new; the moving one by the new alone.
        deviation = jnp.where(learning, before * jnp.sqrt(1 - weight), jnp.abs(value - mean))
        return Moments(mean, mixed(inner.std, deviation, weight))

    return history(
        init, limit, feed, knob=z, feeding=feeding, warmup=warmup, warmup_limit=warmup_limit, patience=patience,
        cap=cap, call=call,
    )  # fmt: skip


def zclip(
    z: Any = 2.5,
    decay: Any = 0.97,
    *,
    target: Target | None = None,
    max_norm: Any = jnp.inf,
    eps: Any = 1e-6,
    measure: Measure | None = None,
    feeding: Feed | None = None,
    warmup: int = 25,
    warmup_limit: Any = jnp.inf,
    patience: int | None = 50,
) -> optax.GradientTransformationExtraArgs:
    """Clips norms with a z-score beyond ``z``, the harder the higher they are (ZClip).

    score = (||g|| - m) / (s + eps);  if score > z:  g <- g * (m + z^2 / score * s) / ||g||;
    m <- decay * m + (1 - decay) * n,  s^2 <- decay * s^2 + (1 - decay) * (n - m)^2, with n the norm after the clip

    When to use: language-model pre-training with rare spikes. It does nothing on an ordinary step.

    Args:
      z: > 0 (paper: 2.5): a number, a traced scalar, or a schedule.
      decay: in [0, 1), per step (paper's alpha: 0.97).
      target: where an outlier is brought: `thresholds.reciprocal` (the paper's), `thresholds.to_max`,
        `thresholds.to_mean`, or a function of (mean, std, score, z); None for `reciprocal`.
      max_norm: > 0, the largest norm at any time (authors' code: 1.0; paper: none): a number, a traced scalar, or a
        schedule.
      eps: >= 0, added to s in the score (authors' code: 1e-6), in units of the norm.
      measure: the scope, see `optclip.measures`; None for `global_norm`.
      feeding: what enters the averages; None for `clipped`, the norm after the clip and before ``max_norm``.
      warmup: >= 1, norms whose plain mean and standard deviation start the averages (paper: 25).
      warmup_limit: the static limit during warm-up, in units of the norm.
      patience: clips in a row (by the score, not by ``max_norm``) after which the warm-up starts anew, and zeros do
        not enter it; None for neither.

    State: `ClipState`; ``rule`` is a `History` with ``inner.mean`` and ``inner.std``: 4 numbers per size.

    Guarantees: the paper's trajectory as long as there are no ``patience`` clips in a row. A shift of the level that
      puts ``patience`` norms in a row beyond the limit is accepted within ``patience + warmup`` steps; a norm within
      the limit starts the count anew.

    Edge cases: the first ``warmup`` steps pass. Zero, NaN and infinite norms do not enter the averages. Recorded limits
      of steps that were not clipped are m + z * (s + eps).

    Departures: the paper's rule never accepts a level more than about ten standard deviations higher, as what it feeds
      back makes it ever stricter; here ``patience`` clips in a row start the warm-up anew (``patience=None`` turns that
      off). The authors' code has ``max_norm=1.0`` by default and a factor on the whole target; the paper has neither.
      Their "percentile" mode is ``target=to_max``, their ``skip_update_on_spike`` is ``feeding=accepted``.

    References: Kumar, Owen, Chowdhury, Guera, "ZClip: adaptive spike mitigation for LLM pre-training", 2025,
      arXiv:2504.02507, Section 3 and Algorithm 1.

    Example:
      >>> tx = optax.chain(zclip(), optax.adamw(1e-3))
    """
    target, measure, feeding = target or reciprocal, measure or global_norm, feeding or clipped
    rule = zscore(
        z, decay, target=target, eps=eps, cap=max_norm, feeding=feeding, warmup=warmup, warmup_limit=warmup_limit,
        patience=patience, call="zclip",
    )  # fmt: skip
    return clip_by(measure, rule)
