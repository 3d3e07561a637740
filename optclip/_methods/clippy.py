"""Clippy: the step of each tensor relative to its parameters, element by element (Tang et al., 2023)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip import _checks, _numerics
from optclip._clip import ClipState, clip_by, own_state
from optclip._rules import Threshold, scheduled
from optclip._transformation import transformation
from optclip.measures import Measure, leaf_norm

_UNIT = 2.0**-64  # of the ratios: a huge step over a tiny parameter is beyond the largest float32
_largest = partial(leaf_norm, ord=np.inf)


def clippy(
    relative: Any = 0.1,
    absolute: Any = 1e-7,
    *,
    measure: Measure | None = None,
    record: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Scales each update down so that no parameter moves by more than a fraction of itself (Clippy).

    s_i = min_j (relative * |w_ij| + absolute) / |u_ij|,  u_i <- u_i * min(1, s_i)

    When to use: behind a whole optimizer, learning rate included, for models that diverge through single coordinates
    (recommenders under Adagrad).

    Args:
      relative: > 0 (lambda_rel; authors' code: 0.1), the largest relative change of a parameter: a number, a traced
        scalar, or a schedule.
      absolute: >= 0 (lambda_abs; authors' code: 1e-7), the change that a parameter of 0 may make, in units of the
        parameter: likewise. One parameter near 0 holds back its whole tensor, so raise it (1e-3) where parameters start
        at 0; with 0 such a tensor never moves.
      measure: how the ratios |u_ij| / (relative * |w_ij| + absolute) of a scope make a size: None for the largest of
        each leaf.
      record: whether the state keeps sizes and limits.

    State: `ClipState`; ``stats.sizes`` is the largest ratio, a float32 scalar at each leaf, and ``stats.limits`` is 1;
      ``rule`` an int32 step count where a schedule is given.

    Guarantees: |u_ij| <= relative * |w_ij| + absolute; bit-equal to the input where that holds. No lock at zero,
      unless ``absolute`` is 0: with updates to follow, a parameter can grow by 1 + relative in each step.

    Edge cases: needs ``params`` in ``update``, else ValueError. An element of the update that is 0 does not count. A
      NaN or an infinity makes the updates of its own leaf NaN.

    Departures: the authors' code is one with Adagrad, and has a third term with its accumulator, 0 by default; here any
      optimizer may come before. Its defaults are kept; the paper's experiments use larger ones.

    References: Tang et al., "Improving training stability for multitask ranking models in recommender systems", KDD
      2023, arXiv:2302.09178, Algorithm 1; TensorFlow Recommenders, ``ClippyAdagrad``.

    Example:
      >>> tx = optax.chain(optax.adagrad(0.1), clippy(absolute=1e-3))
    """
    measure = measure or _largest
    _checks.check_callable("clippy", measure=measure)
    _checks.check_positive("clippy", "relative", relative)
    _checks.check_nonnegative("clippy", "absolute", absolute)
    knobs = scheduled((relative, absolute))

    def clipper(sizes: Any, memory: Any) -> Any:
        rule = Threshold(knobs.init, lambda *_, **extra: (jnp.full((), _UNIT, jnp.float32), memory))
        return clip_by(sizes, rule, record=record)

    def init(params: Any) -> ClipState:
        return clipper(measure, knobs.init(params)).init(params)

    def update(updates: Any, state: ClipState, params: Any = None, **extra: Any) -> tuple[Any, ClipState]:
        _checks.check_params("clippy", params, "its limit is relative to them", updates)
        own = own_state(state, lambda: knobs.init(updates))
        (rel, least), memory = knobs.update(list(filter(_numerics.is_gradient, jax.tree.leaves(updates))), own.rule)
        sizes = lambda updates: measure(jax.tree.map(partial(_ratio, rel, least), updates, params))
        out, after = clipper(sizes, memory).update(updates, own, params, **extra)
        return out, after._replace(stats=jax.tree.map(_in_ones, after.stats)) if own is state else state

    return transformation(init, update)


def _ratio(rel: jax.Array, least: jax.Array, update: Any, param: Any) -> Any:
    if not _numerics.is_gradient(update):
        return update
    size = jnp.abs(jnp.asarray(update)).astype(_numerics.accumulator(update))
    bound = _numerics.times(rel, jnp.abs(jnp.asarray(param)).astype(size.dtype)) + least.astype(size.dtype)
    bound = jnp.where(bound >= 0, jnp.where(size == 0, 1, bound), jnp.nan)
    small = bound < 1
    ratio = jnp.where(small, size, size * _UNIT) / jnp.where(small, bound / _UNIT, bound)
    # What is still beyond the largest number is not to pass for an infinite update.
    return jnp.where(jnp.isfinite(size), jnp.minimum(ratio, jnp.finfo(size.dtype).max), size)


def _in_ones(ratio: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(ratio), jnp.minimum(ratio, jnp.finfo(ratio.dtype).max * _UNIT) / _UNIT, ratio)
