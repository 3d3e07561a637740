"""LARC: layer-wise adaptive rate clipping (You et al., 2017)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _elementwise, _numerics
from optclip._clip import ClipState, clip_by
from optclip._rules import Threshold, scheduled
from optclip._transformation import transformation
from optclip.measures import Measure, leaf_norm


def larc_clip(
    learning_rate: Any,
    trust_coefficient: Any = 0.02,
    *,
    weight_decay: float = 0.0,
    measure: Measure | None = None,
    record: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Scales the gradient of each leaf down so that a step is at most a fraction of its parameters (LARC, clip mode).

    r_i = trust_coefficient * ||w_i|| / (||g_i|| + weight_decay * ||w_i||)
    g_i <- (g_i + weight_decay * w_i) * min(1, r_i / learning_rate)

    When to use: large batches with SGD, in front of it, with the same learning rate.

    Args:
      learning_rate: > 0, that of the SGD behind: a number, a traced scalar, or a schedule.
      trust_coefficient: > 0 (apex: 0.02), the largest ratio of step to parameters: likewise.
      weight_decay: >= 0, added here in place of the optimizer, so that the clip sees it.
      measure: the scope, see `optclip.measures`; None for `leaf_norm`.
      record: whether the state keeps sizes and limits.

    State: `ClipState`; ``stats.sizes`` is ||g_i|| + weight_decay * ||w_i|| and ``stats.limits`` its limit, a float32
      scalar at each leaf; ``rule`` two int32 step counts where a schedule is given.

    Guarantees: learning_rate * ||g_i|| <= trust_coefficient * ||w_i||, unless the parameters are zero; without decay
      bit-equal to the input below.

    Edge cases: needs ``params`` in ``update``, else ValueError. A leaf whose parameters or whose gradient is zero is
      neither clipped nor decayed, as in apex. A NaN or an infinity makes the updates of its own leaf NaN.

    Departures: apex adds 1e-8 to the denominator of r_i.

    References: You, Gitman, Ginsburg, "Large batch training of convolutional networks", arXiv:1708.03888; NVIDIA apex,
      ``LARC(clip=True)``.

    Example:
      >>> tx = optax.chain(larc_clip(0.1, weight_decay=1e-4), optax.sgd(0.1, momentum=0.9))
    """
    measure = measure or leaf_norm
    _checks.check_positive("larc_clip", "learning_rate", learning_rate)
    _checks.check_positive("larc_clip", "trust_coefficient", trust_coefficient)
    _checks.check_nonnegative("larc_clip", "weight_decay", weight_decay)
    knobs = scheduled((learning_rate, trust_coefficient))

    def limits(weights: Any, memory: Any) -> tuple[Any, Any]:
        (rate, trust), memory = knobs.update(weights, memory)
        limit = lambda w: jnp.where(w == 0, jnp.inf, _numerics.times(trust / rate, w))
        return jax.tree.map(limit, weights), memory

    rule = Threshold(knobs.init, lambda sizes, memory, params, **extra: limits(measure(params), memory))

    def update(updates: Any, state: ClipState, params: Any = None, **extra: Any) -> tuple[Any, ClipState]:
        _checks.check_params("larc_clip", params, "its limit is relative to their norm", updates)
        norms, weights = measure(updates), measure(params)
        decays = jax.tree.map(lambda n: jnp.where(n == 0, 0, weight_decay).astype(n.dtype), norms)
        sizes = jax.tree.map(lambda n, w, d: n + d * w.astype(n.dtype), norms, weights, decays)
        decayed = jax.tree.map(_add, updates, params, jax.tree.broadcast(decays, updates))
        clipper: Any = clip_by(lambda _: sizes, rule, record=record)
        out, state = clipper.update(decayed, state, params, **extra)
        return _elementwise.cast_back(out, updates), state

    return transformation(clip_by(measure, rule, record=record).init, update)


def _add(g: Any, w: Any, decay: jax.Array) -> Any:
    if not _numerics.is_gradient(g):
        return g
    wide = _elementwise.widen(g)
    decay = decay.astype(jnp.finfo(wide.dtype).dtype)
    return jnp.where(decay == 0, wide, wide + decay * _elementwise.widen(w).astype(wide.dtype))
