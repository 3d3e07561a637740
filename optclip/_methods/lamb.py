"""The trust clip of LAMB (You et al., 2020): an update no longer than its parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _numerics
from optclip._clip import clip_by, of_parameters
from optclip._rules import Threshold, scheduled
from optclip.measures import Measure, leaf_norm


def trust_ratio(ratio: Any, measure: Measure, *, cap: float = jnp.inf, call: str = "trust_ratio") -> Threshold:
    """A limit of ratio * min(measure(params), cap), and none where the parameters are zero.

    Args:
      ratio: > 0: a number, a traced scalar, or a schedule.
      measure: the measure of the clipper, of the same scope.
      cap: > 0, the largest size of parameters to count.
      call: the name of the method, for error messages.

    Memory: an int32 step count if ``ratio`` is a schedule, else nothing.

    Example:
      >>> tx = clip_by(leaf_norm, trust_ratio(0.1, leaf_norm))
    """
    _checks.check_positive(call, "ratio", ratio)
    _checks.check_positive(call, "cap", cap)
    factor = scheduled((ratio,))

    def update(sizes: Any, memory: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra
        _checks.check_params(call, params, "its limit is relative to their size")
        (value,), memory = factor.update(sizes, memory)

        def limit(w: jax.Array) -> jax.Array:
            return jnp.where(w == 0, jnp.inf, _numerics.times(value, jnp.minimum(w, jnp.asarray(cap, w.dtype))))

        return jax.tree.map(limit, measure(params)), memory

    return Threshold(factor.init, update)


def lamb_clip(
    ratio: Any = 1.0, *, cap: float = jnp.inf, measure: Measure | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales the update of each leaf down to ``ratio`` times the norm of its parameters (LAMB with trust clip).

    u_i <- u_i * min(1, ratio * min(||w_i||, cap) / ||u_i||)

    When to use: large batches, behind Adam and weight decay and before the learning rate. LAMB without the clip
    (`optax.scale_by_trust_ratio`) also raises small updates, which can make them wild; this never does.

    Args:
      ratio: > 0 (timm: 1), the largest trust ratio: a number, a traced scalar, or a schedule.
      cap: > 0, the largest norm of parameters to count (pytorch-lamb: 10).
      measure: the scope, see `optclip.measures`; None for `leaf_norm`.

    State: `ClipState`; ``stats.sizes`` is the tree of the updates with a float32 scalar at each leaf.

    Guarantees: ||u_i|| <= ratio * min(||w_i||, cap), unless the parameters are zero; bit-equal to the input below.

    Edge cases: needs ``params`` in ``update``, else ValueError. The update of a leaf whose parameters are all zero
      passes. A NaN or an infinity makes the updates of its own leaf NaN.

    Departures: none from timm's ``trust_clip``; the paper clamps the norm of the parameters only.

    References: You et al., "Large batch optimization for deep learning", ICLR 2020, arXiv:1904.00962, Algorithm 2;
      timm, ``Lamb(trust_clip=True)``.

    Example:
      >>> tx = optax.chain(optax.scale_by_adam(), lamb_clip(), optax.scale(-1e-3))
    """
    measure = measure or leaf_norm
    return of_parameters(clip_by(measure, trust_ratio(ratio, measure, cap=cap, call="lamb_clip")), "lamb_clip")
