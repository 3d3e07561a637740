"""AdaGC: limits relative to a moving average that starts at the smallest norm of a warm-up (Wang et al., 2025)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _numerics
from optclip._clip import clip_by
from optclip._history import Feed, clipped
from optclip._rules import Threshold, per_size, resolve, select
from optclip._vectors import pack
from optclip.measures import Measure, global_norm, leaf_norm

_STUCK = 4.0  # a norm so many times its limit is not one that the limit is climbing to


class EmaFromMin(NamedTuple):
    """The memory of `ema_from_min`; S is the shape of the sizes.

    Attributes:
      step: int32[S], updates seen, if the ratio is a schedule; else ().
      entered: int32[S], values that entered since the start, or since patience last ran out.
      streak: int32[S], far clips in a row.
      mean: float32[S], the smallest value of the warm-up (gamma), and after it the moving average.
    """

    step: Any
    entered: jax.Array
    streak: jax.Array
    mean: jax.Array


def ema_from_min(
    ratio: Any = 1.05,
    decay: float = 0.98,
    *,
    feeding: Feed = clipped,
    warmup: int = 100,
    warmup_limit: Any = 1.0,
    patience: int | None = 50,
    call: str = "ema_from_min",
) -> Threshold:
    """A limit of ratio * EMA of the sizes before this one, where the EMA starts at the smallest size of the warm-up.

    Args:
      ratio: > 1 (lambda_rel): a number, a traced scalar, or a schedule.
      decay: in [0, 1) (beta), per step.
      feeding: what enters, in the warm-up too, see `optclip.thresholds`.
      warmup: values to collect first (T_start).
      warmup_limit: > 0 (lambda_abs), in units of the norm of *all* sizes together, which the warm-up clips by.
      patience: steps in a row with a size over 4 times its limit after which its warm-up starts afresh; None for never.
      call: the name of the method, for error messages.

    Memory: 3 numbers per size (`EmaFromMin`).

    Example:
      >>> tx = clip_by(global_norm, ema_from_min(1.5, warmup=10))
    """
    _checks.check_above_one(call, "ratio", ratio)
    _checks.check_fraction(call, "decay", decay)
    _checks.check_steps(call, "warmup", warmup)
    _checks.check_callable(call, feeding=feeding)
    _checks.check_positive(call, "warmup_limit" if call == "ema_from_min" else "max_norm", warmup_limit)
    if patience is not None:
        _checks.check_steps(call, "patience", patience, least=1)

    def init(size: jax.Array) -> EmaFromMin:
        zero = lambda: jnp.zeros(jnp.shape(size), jnp.int32)  # buffers of their own, so that a state can be donated
        return EmaFromMin(zero() if callable(ratio) else (), zero(), zero(), jnp.zeros_like(size))

    def step(size: jax.Array, memory: EmaFromMin, *, total: jax.Array, **extra: Any) -> tuple[jax.Array, EmaFromMin]:
        del extra
        tiny = jnp.finfo(size.dtype).tiny
        cap, total = jnp.asarray(warmup_limit, size.dtype), total.astype(size.dtype)
        over = total > cap
        share = jnp.where(over, cap, 1) / jnp.where(over, total, 1)
        resting = jnp.where(over, jnp.maximum(size * share, tiny), jnp.inf)
        count, mean = memory.entered, memory.mean
        factor = resolve(ratio, memory.step)
        learning = count < jnp.maximum(warmup, 1)
        allowed = jnp.where(learning, jnp.where(warmup, resting, jnp.inf), _numerics.times(factor, mean))
        streak = jnp.where((size > _STUCK * allowed) & ~learning, memory.streak + 1, 0)
        if patience is not None:
            stuck = streak >= patience
            count, streak = jnp.where(stuck, 0, count), jnp.where(stuck, 0, streak)
            allowed = jnp.maximum(jnp.where(stuck, resting, allowed), tiny)
            learning = learning | stuck
        value = feeding(size, allowed)
        enters = jnp.isfinite(value) if patience is None else jnp.isfinite(value) & (value > 0)
        smallest = jnp.where(count == 0, value, jnp.minimum(mean, value))
        fed = jnp.where(learning, smallest, mean + (1 - decay) * (value - mean))
        after = memory.step + 1 if callable(ratio) else ()
        entered = enters.astype(jnp.int32)
        return allowed, EmaFromMin(after, count + entered, streak, select(enters, fed, mean))

    rule = per_size(init, step)

    def update(sizes: Any, memory: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        leaves = list({id(s): s for s in jax.tree.leaves(sizes)}.values())  # those that labels share count once
        finite = [jnp.where(jnp.isfinite(s), s, 0) for s in pack(leaves)[0]]
        # Scalar sizes are the same on every device; the types of arrays (units) say whether they are sharded.
        total = global_norm(finite, axis_name=() if all(jnp.ndim(s) == 0 for s in leaves) else None)
        return rule.update(sizes, memory, params, **{**extra, "total": total})

    return Threshold(rule.init, update)


def adagc(
    ratio: Any = 1.05,
    decay: float = 0.98,
    max_norm: Any = 1.0,
    *,
    measure: Measure | None = None,
    feeding: Feed | None = None,
    warmup: int = 100,
    patience: int | None = 50,
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf down to ``ratio`` times the moving average of its own clipped norm (AdaGC).

    Warm-up, t <= 100: g <- g * min(1, max_norm / ||g||) with the global norm,  m_i = min(m_i, ||g_i||)
    Then: g_i <- g_i * min(1, ratio * m_i / ||g_i||),  m_i <- decay * m_i + (1 - decay) * ||g_i||

    When to use: large language models, in place of one global norm: a spike in one layer no longer shrinks the steps
    of all others.

    Args:
      ratio: > 1 (lambda_rel; paper: 1.05): a number, a traced scalar, or a schedule.
      decay: in [0, 1) (beta; paper: 0.98), per step.
      max_norm: > 0 (lambda_abs; paper: 1.0), the limit of the norm of all sizes together during the warm-up, in units
        of the gradient norm.
      measure: the scope, see `optclip.measures`; None for `leaf_norm`.
      feeding: what enters the average: the norm after the clip; None for `clipped`.
      warmup: steps under the global clip (T_start; paper: 100), counted for each leaf by its own non-zero gradients.
      patience: steps in a row with a norm over 4 times its limit after which the warm-up of that leaf starts afresh;
        None for never.

    State: `ClipState`; ``rule`` is an `EmaFromMin`: two int32 and one float32 per size.

    Guarantees: never stuck. After ``patience`` norms in a row over 4 times the limit the new level is accepted; else
      the limit climbs to it by (1 - decay) * (ratio - 1) a step (0.1%: 693 steps to double), as in the paper. Gradients
      over 4 times ``max_norm`` for good are clipped to about ``max_norm`` for good: every warm-up brings them to it.

    Edge cases: zero, NaN and infinite norms do not enter the average; a leaf that was zero has its warm-up when it
      wakes. A NaN or an infinity makes the updates of its own leaf NaN.

    Departures: zeros are left out, and a warm-up that took in a freak tiny gradient (or, through the global clip, a
      spike elsewhere) is repeated when patience runs out; on leaves that are never zero or far off, the trajectory is
      the paper's. ``patience=None`` gives the paper's rule throughout, which keeps a leaf at zero once its average is.
      The authors' PyTorch code has defaults 1.04 and 0.99 and adds 1e-6 to the norm. Paddle's has 101 warm-up steps and
      takes the minimum of the raw norms.

    References: Wang et al., "AdaGC: Improving Training Stability for LLM Pretraining", arXiv:2502.11034, Algorithm 1.

    Example:
      >>> tx = optax.chain(adagc(), optax.adamw(1e-3))
    """
    measure, feeding = measure or leaf_norm, feeding or clipped
    rule = ema_from_min(
        ratio, decay, feeding=feeding, warmup=warmup, warmup_limit=max_norm, patience=patience, call="adagc"
    )
    return clip_by(measure, rule)
