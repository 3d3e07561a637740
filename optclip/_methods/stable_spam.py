"""Stable-SPAM's AdaClip and AdaGN, and the GradientStabilizer that grew out of them (Huang et al., 2025 and 2026)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _elementwise
from optclip._clip import clip_by
from optclip._history import Feed, mass, raw, running_mean
from optclip._rules import Threshold, per_size
from optclip.measures import Measure, leaf_norm
from optclip.responses import normalize, press

_STUCK = 0.2  # a norm brought to less than this for long is not damped but throttled


def adaclip(
    decay: float = 0.999,
    *,
    ord: float | None = None,
    stack_axis: Any = None,
    axis_name: Any = None,
    feeding: Feed | None = None,
    patience: int | None = 50,
) -> optax.GradientTransformationExtraArgs:
    """Presses the elements of a leaf beyond the moving average of its largest magnitude (Stable-SPAM's AdaClip).

    M = max_j |g_j|,  T <- decay * T + (1 - decay) * M,  T' = T / (1 - decay^t),  g_j <- g_j * T' / M where |g_j| > T'

    When to use: low-precision training, against spikes in single elements, in front of `adagn`. It remembers one number
    per leaf, where `spam_clip` remembers one per element.

    Args:
      decay: in [0, 1) (gamma_3; authors' code: 0.999), per step.
      ord: the p-norm that stands for the largest magnitude; None for infinity, the paper's, which is that magnitude.
      stack_axis: the axis along which leaves stack layers, see `measures.leaf_norm`.
      axis_name: see `measures.global_norm`.
      feeding: what enters the average: the raw maximum; None for `raw`.
      patience: steps in a row with a maximum over 4 times the average after which it starts afresh; None for never.

    State: `ClipState`; ``rule`` is a `History` with ``inner.mean``: two int32 and one float32 per leaf.

    Guarantees: no element is larger than the average; elements within it are bit-equal to the input. After ``patience``
      maxima in a row over 4 times the average the new level is accepted; else it is followed by 1 - decay of the way a
      step, as in the paper.

    Edge cases: the first step passes. Zero, NaN and infinite maxima do not enter. A NaN or an infinity makes the
      updates of its own leaf NaN.

    Departures: zeros are left out and an average far too small starts afresh; ``patience=None`` turns both off. The
      count of the bias correction is the clip's own: the authors' code restarts it with Adam's, which inflates T' by
      500 after each reset and so turns the clip off.

    References: Huang et al., "Stable-SPAM: How to train in 4-bit more stably than 16-bit Adam", arXiv:2502.17055v2,
      Section 3.1.

    Example:
      >>> tx = optax.chain(adaclip(), adagn(), optax.adam(1e-3))
    """
    feeding = feeding or raw
    rule = running_mean(decay, feeding=feeding, patience=patience, call="adaclip")
    ord = _checks.check_ord("adaclip", jnp.inf if ord is None else ord)
    return clip_by(partial(leaf_norm, ord=ord, stack_axis=stack_axis, axis_name=axis_name), rule, press)


class Moments(NamedTuple):
    """The memory of `moment_ratio`; S is the shape of the sizes.

    Attributes:
      entered: int32[S], sizes that entered.
      streak: int32[S], throttled steps in a row.
      mean: float32[S], the moving average of the sizes, from 0 (m).
      rms: float32[S], the square root of that of their squares, from 0 (the root of v).
    """

    entered: jax.Array
    streak: jax.Array
    mean: jax.Array
    rms: jax.Array


def moment_ratio(
    b1: float,
    b2: float,
    *,
    debias: bool,
    eps: float = 0.0,
    feeding: Feed = raw,
    patience: int | None = 100,
    call: str = "moment_ratio",
) -> Threshold:
    """The size to reach, with `responses.normalize`: EMA(size) / (sqrt(EMA(size^2)) + eps), this one included.

    Args:
      b1: in [0, 1), of the first moment.
      b2: in [0, 1), of the second, above b1 squared.
      debias: whether both are corrected for their start at 0; a fixed choice.
      eps: >= 0.
      feeding: what enters the moments, as a function of the size and the root of the second moment.
      patience: steps in a row with a result below 1/5 after which the second moment starts from the first; None for
        never.
      call: the name of the method, for error messages.

    Memory: 4 numbers per size (`Moments`).

    Example:
      >>> tx = clip_by(global_norm, moment_ratio(0.6, 0.999, debias=True), normalize)
    """
    for name, decay in (("b1", b1), ("b2", b2)):
        _checks.check_fraction(call, name, decay)
    _checks.check_nonnegative(call, "eps", eps)
    _checks.check_callable(call, feeding=feeding)
    if patience is not None:
        _checks.check_steps(call, "patience", patience, least=1)

    def init(size: jax.Array) -> Moments:
        zero = lambda: jnp.zeros(jnp.shape(size), jnp.int32)  # buffers of their own, so that a state can be donated
        return Moments(zero(), zero(), jnp.zeros_like(size), jnp.zeros_like(size))

    def step(size: jax.Array, memory: Moments, **extra: Any) -> tuple[jax.Array, Moments]:
        del extra
        count, old = memory.entered, memory
        scale = jnp.sqrt(mass(b2, jnp.maximum(count, 1), size.dtype)) if debias else 1
        value = feeding(size, jnp.where(count > 0, old.rms / scale, jnp.inf))
        enters = jnp.isfinite(value) if patience is None else jnp.isfinite(value) & (value > 0)
        count = count + enters.astype(jnp.int32)
        mean = jnp.where(enters, old.mean + (1 - b1) * (value - old.mean), old.mean)
        rms = jnp.where(enters, _elementwise.root_mean(b2, old.rms, value), old.rms)
        since = jnp.maximum(count, 1)
        m_mass, v_mass = (mass(b1, since, size.dtype), jnp.sqrt(mass(b2, since, size.dtype))) if debias else (1, 1)
        ratio = lambda rms: mean / jnp.where(rms == 0, 1, rms + eps * v_mass) * (v_mass / m_mass)
        streak = jnp.where(enters & (ratio(rms) < _STUCK), old.streak + 1, jnp.where(enters, 0, old.streak))
        if patience is not None:
            stuck = streak >= patience
            rms = jnp.where(stuck, mean / m_mass * v_mass, rms)
            streak = jnp.where(stuck, 0, streak)
        return jnp.where(count > 0, ratio(rms), 1), Moments(count, streak, mean, rms)

    return per_size(init, step)


def adagn(
    b1: float = 0.7,
    b2: float = 0.9,
    *,
    eps: float = 1e-8,
    measure: Measure | None = None,
    feeding: Feed | None = None,
    patience: int | None = 100,
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf to the ratio of the moments of its norm (Stable-SPAM's AdaGN).

    n = ||g_i||,  m <- b1 * m + (1 - b1) * n,  v <- b2 * v + (1 - b2) * n^2
    g_i <- g_i / n * m' / (sqrt(v') + eps), where m' = m / (1 - b1^t) and v' = v / (1 - b2^t)

    When to use: low-precision training, in front of Adam; there is no limit to choose. The result has a norm near 1
    whatever the gradient's: mind it under SGD.

    Args:
      b1: in [0, 1) (gamma_1; authors' code: 0.7, their scripts: 0.85), per step.
      b2: in [0, 1) (gamma_2; authors' code: 0.9, their scripts: 0.99999), per step.
      eps: >= 0 (1e-8), in units of the gradient norm.
      measure: the scope, see `optclip.measures`; None for `leaf_norm`.
      feeding: what enters the moments, as a function of the norm and the root of v'; None for `raw`.
      patience: steps in a row with a result below 1/5 after which v starts from the square of m; None for never.

    State: `ClipState`; ``rule`` is a `Moments`: two int32 and two float32 per size. ``stats.limits`` are the norms to
      reach.

    Guarantees: the norm of the result is at most (1 - b1) / sqrt((1 - b2) * (1 - b1^2 / b2)) once both corrections have
      worn off. Never throttled to below 1/5 for more than ``patience`` steps.

    Edge cases: the first step of a leaf is brought to norm 1. Zero, NaN and infinite norms do not enter. A zero
      gradient stays zero. A NaN or an infinity makes the updates of its own leaf NaN.

    Departures: zeros are left out, and a second moment that one huge gradient has inflated is set back;
      ``patience=None`` turns both off. The authors' code shares its step count with Adam's, which its resets disturb.

    References: Huang et al., "Stable-SPAM", arXiv:2502.17055v2, Section 3.2.

    Example:
      >>> tx = optax.chain(adaclip(), adagn(), optax.adam(1e-3))
    """
    measure, feeding = measure or leaf_norm, feeding or raw
    rule = moment_ratio(b1, b2, debias=True, eps=eps, feeding=feeding, patience=patience, call="adagn")
    return clip_by(measure, rule, normalize)


def gradient_stabilizer(
    b1: float = 0.6,
    b2: float = 0.999,
    *,
    debias: bool = False,
    measure: Measure | None = None,
    feeding: Feed | None = None,
    patience: int | None = 100,
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf to the ratio of the uncorrected moments of its norm (GradientStabilizer).

    R = ||g_i||,  m <- b1 * m + (1 - b1) * R,  v <- b2 * v + (1 - b2) * R^2,  g_i <- g_i / R * m / sqrt(v)

    When to use: any optimizer that is not indifferent to spikes; there is no limit to choose. Without ``debias`` the
    norm of the result starts near 13 and falls to 1 over 1 / (1 - b2) steps: harmless before Adam, dangerous before
    SGD.

    Args:
      b1: in [0, 1) (gamma_1; paper: 0.6), per step.
      b2: in [0, 1) (gamma_2; paper: 0.999), above b1 squared, per step.
      debias: whether both moments are corrected for their start at 0 (paper: no); a fixed choice.
      measure: the scope, see `optclip.measures`; ``global_norm`` for one norm over all leaves; None for `leaf_norm`.
      feeding: what enters the moments, as a function of the norm and the root of v; None for `raw`.
      patience: steps in a row with a result below 1/5 after which v starts from the square of m; None for never.

    State: `ClipState`; ``rule`` is a `Moments`: two int32 and two float32 per size.

    Guarantees: the norm of the result is at most (1 - b1) / sqrt((1 - b2) * (1 - b1^2 / b2)), 15.8 by default. Never
      throttled to below 1/5 for more than ``patience`` steps.

    Edge cases: zero, NaN and infinite norms do not enter. A zero gradient stays zero (paper: 0 / 0). A NaN or an
      infinity makes the updates of its own leaf NaN.

    Departures: zeros are left out, and a second moment that one huge gradient has inflated is set back;
      ``patience=None`` turns both off: then one gradient a million times too large makes the next 20,000 steps tiny.
      The paper leaves open whether R is the norm of each tensor or of all; here, as in Stable-SPAM's code, each.

    References: Huang et al., "GradientStabilizer", ICML 2026, arXiv:2502.17055v4, Algorithm 1.

    Example:
      >>> tx = optax.chain(gradient_stabilizer(debias=True), optax.sgd(0.1))
    """
    measure, feeding = measure or leaf_norm, feeding or raw
    rule = moment_ratio(b1, b2, debias=debias, feeding=feeding, patience=patience, call="gradient_stabilizer")
    return clip_by(measure, rule, normalize)
