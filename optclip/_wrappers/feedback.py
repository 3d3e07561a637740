"""Feedback around a clipper: what a clip cuts off is not lost, or is not a jump."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optclip import _checks, _numerics
from optclip._clip import clip_by
from optclip._rules import fixed
from optclip._transformation import takes_extra_args, transformation
from optclip.measures import Measure, global_norm, magnitude
from optclip.responses import clamp, rescale


class FeedbackState(NamedTuple):
    """The state of `u_clip`, `clip21` and `track_median`.

    Attributes:
      inner_state: the state of the clipper.
      buffer: the tree of the parameters in float32 (float64): what is owed (`u_clip`) or the estimate (`clip21`).
    """

    inner_state: Any
    buffer: Any


def u_clip(
    inner: optax.GradientTransformation, max_carry: Any = 100.0, *, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Carries what a clipper cut off over to the next step, so that clipping is unbiased on average (U-Clip).

    u_t = clip(g_t + D_{t-1}),  D_t = g_t + D_{t-1} - u_t

    When to use: where a clip is active often and its bias hurts (stochastic gradients of skewed noise, under SGD). Not
    against corrupt batches: a spike is paid out over the following steps, up to the bound.

    Args:
      inner: a clipper, of any scope; not an optimizer.
      max_carry: > 0, a bound on the buffer in units of the clipped update: ||D|| <= max_carry * ||u||, that is, at most
        so many steps of debt. A number, a traced scalar, or infinity for none. 100 is ours; the paper has no bound.
      axis_name: mesh axes to sum over, see `measures.global_norm`.

    State: `FeedbackState`; ``buffer`` is as large as the parameters, in float32.

    Guarantees: while the bound is not met the emitted updates and the buffer add up to the gradients, rounding to the
      dtype of the leaves included. With a clip that is not active, updates are bit-equal to the input.

    Edge cases: an element for which g + D - u is not finite keeps its buffer, and its update is what the clipper makes
      of it (NaN). The step after a clip depends on the last gradients, so below the limit updates still differ from
      the input until the debt is paid.

    Departures: the bound. The analysis asks for a limit above the size of the mean gradient, where the buffer is
      bounded by itself; below it the paper's buffer grows without end. ``max_carry=jnp.inf`` is the paper.

    References: Elesedy, Hutter, "U-Clip: on-average unbiased stochastic gradient clipping", 2023, arXiv:2302.02971,
      Algorithm 1.

    Example:
      >>> tx = u_clip(clip_by_global_norm(1.0))
      >>> state = tx.init(jnp.zeros(1))
      >>> out = []
      >>> for g in (3.0, 0.0, 0.0, 0.0):
      ...     u, state = tx.update(jnp.array([g]), state)
      ...     out.append(float(u[0]))
      >>> out
      [1.0, 1.0, 1.0, 0.0]
    """
    _checks.check_transformation("u_clip", "inner", inner)
    _checks.check_positive("u_clip", "max_carry", max_carry)
    clipper = takes_extra_args(inner)

    def update(updates: Any, state: FeedbackState, params: Any = None, **extra: Any) -> tuple[Any, FeedbackState]:
        due = _map(_plus, updates, state.buffer)
        cut, inner_state = clipper.update(due, state.inner_state, params, **extra)
        cut = _map(_rounded, jax.tree.map(_cast_like, cut, updates), state.buffer)
        owed = _map(lambda s, u, d: _enter(s - u.astype(d.dtype), d), due, cut, state.buffer)
        debt = global_norm(owed, axis_name=axis_name)
        bound = jnp.asarray(max_carry).astype(debt.dtype) * global_norm(cut, axis_name=axis_name)
        share = jnp.where(debt > bound, bound / jnp.where(debt > 0, debt, 1), 1)  # a bound of NaN bounds nothing
        owed = _map(lambda s: s * share.astype(s.dtype), owed)
        return cut, FeedbackState(inner_state, _memory(owed, updates, state.buffer))

    return transformation(_start(clipper), update, FeedbackState)


def clip21(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Clips the difference to a running estimate of the gradient, and emits the estimate (Clip21).

    v_t = v_{t-1} + clip(g_t - v_{t-1}),  u_t = v_t

    When to use: gradients of little noise (large batches, one client's own data) that must be clipped hard: the bias of
    clipping vanishes as the estimate catches up. With noisy gradients it is a tracker of their median, `track_median`.

    Args:
      inner: a clipper, of any scope; not an optimizer. Its limit is the largest step of the estimate.

    State: `FeedbackState`; ``buffer`` is the estimate v, as large as the parameters, in float32.

    Guarantees: two emitted updates in a row differ by at most the limit. Where the clip is not active the update is the
      gradient, bit for bit.

    Edge cases: starts at zero, and takes ||g|| / limit steps to reach a gradient. An element for which the new estimate
      is not finite keeps the old one, and its update is NaN. A zero gradient does not give a zero update but a step
      towards it.

    Departures: none; the estimate starts at zero.

    References: Khirirat, Gorbunov, Horvath, Islamov, Karray, Richtarik, "Clip21: error feedback for gradient
      clipping", 2023, arXiv:2305.18929, Algorithm 1 with one node.

    Example:
      >>> tx = clip21(clip_by_global_norm(1.0))
      >>> state = tx.init(jnp.zeros(1))
      >>> out = []
      >>> for _ in range(4):
      ...     u, state = tx.update(jnp.array([2.5]), state)
      ...     out.append(float(u[0]))
      >>> out
      [1.0, 2.0, 2.5, 2.5]
    """
    _checks.check_transformation("clip21", "inner", inner)
    return _track(inner, 0.0)


def track_median(
    limit: Any, decay: Any = 0.0, *, measure: Measure | None = None
) -> optax.GradientTransformationExtraArgs:
    """Emits a running estimate of the median of the gradients, which heavy tails hardly move.

    m_t = m_{t-1} + (1 - decay) * clip(g_t - m_{t-1}, limit),  u_t = m_t

    When to use: heavy-tailed gradient noise, in place of momentum, which is the same estimate without the clip.

    Args:
      limit: > 0, in units of the gradient norm: a number, a traced scalar, a schedule, or a prefix tree. The estimate
        moves by at most (1 - decay) * limit per step.
      decay: in [0, 1). 0 is the pure median tracker; above it differences within the limit are averaged as momentum
        does (the Huber loss), and only those beyond are clipped. A number or a traced scalar.
      measure: None for `measures.global_norm`, the geometric median; `measures.magnitude` for that of each element.

    State: `FeedbackState`; ``buffer`` is the estimate m, as large as the parameters, in float32.

    Guarantees: `clip21` with a fixed clipper if ``decay`` is 0. No gradient moves the estimate by more than the limit.

    Edge cases: as `clip21`. With ``measure=magnitude`` an infinite element counts as one limit.

    Departures: none.

    References: Schaipp, Garrigos, Simsekli, Gower, "Tracking the median of gradients with a stochastic proximal point
      method", TMLR 2025, arXiv:2402.12828; the steps for the l2, l1 and Huber distances.

    Example:
      >>> tx = optax.chain(track_median(1.0, decay=0.9), optax.sgd(0.1))
    """
    measure = measure or global_norm
    _checks.check_fraction("track_median", "decay", decay)
    response = clamp if measure is magnitude else rescale
    return _track(clip_by(measure, fixed(limit, call="track_median"), response), decay)


def _track(inner: optax.GradientTransformation, decay: Any) -> optax.GradientTransformationExtraArgs:
    clipper = takes_extra_args(inner)

    def move(v: jax.Array, g: jax.Array, apart: jax.Array, step: jax.Array) -> jax.Array:
        w, g = (1 - jnp.asarray(decay, jnp.finfo(v.dtype).dtype)).astype(v.dtype), g.astype(v.dtype)
        mixed = jnp.where(w == 1, g, w * g + (1 - w) * v)  # v + (g - v) would not be g
        return jnp.where(step == apart, mixed, v + w * step)

    def update(updates: Any, state: FeedbackState, params: Any = None, **extra: Any) -> tuple[Any, FeedbackState]:
        apart = _map(lambda g, v: g.astype(v.dtype) - v, updates, state.buffer)
        step, inner_state = clipper.update(apart, state.inner_state, params, **extra)
        moved = _map(lambda g, a, s, v: move(v, g, a, s), updates, apart, step, state.buffer)
        emitted = jax.tree.map(_cast_like, moved, updates)
        moved = _map(_enter, moved, state.buffer)
        return emitted, FeedbackState(inner_state, _memory(moved, updates, state.buffer))

    return transformation(_start(clipper), update, FeedbackState)


def _start(clipper: optax.GradientTransformationExtraArgs) -> Any:
    def init(params: Any) -> FeedbackState:
        def zeros(p: Any) -> jax.Array:
            if not _numerics.is_gradient(p):
                return jnp.zeros((), jnp.float32)
            return _numerics.widen(jnp.zeros_like(p), _numerics.accumulator(p))

        return FeedbackState(clipper.init(params), jax.tree.map(zeros, params))

    return init


def _plus(g: jax.Array, debt: jax.Array) -> jax.Array:
    g = g.astype(debt.dtype)
    return jnp.where(debt == 0, g, g + debt)  # a sum with 0 is not g where subnormal numbers are flushed


def _rounded(u: jax.Array, debt: jax.Array) -> jax.Array:
    """``u`` behind a barrier. Else XLA:GPU takes, where it is widened, what was rounded to it."""
    return u if u.dtype == debt.dtype else lax.optimization_barrier(u)


def _map(f: Any, updates: Any, *rest: Any) -> Any:
    """Maps over the leaves that are gradients, and leaves the others as they are in the first tree."""
    one = lambda x, *others: f(jnp.asarray(x), *others) if _numerics.is_gradient(x) else x
    return jax.tree.map(one, updates, *rest)


def _cast_like(x: Any, like: Any) -> Any:
    return _numerics.cast_like(x, like) if _numerics.is_gradient(like) else x


def _enter(new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(new), new, old)


def _memory(new: Any, updates: Any, old: Any) -> Any:
    """The new buffer; the old one under leaves that are no gradients."""
    return jax.tree.map(lambda n, g, o: n if _numerics.is_gradient(g) else o, new, updates, old)
