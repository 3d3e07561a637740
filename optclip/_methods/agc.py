"""AGC: adaptive gradient clipping relative to the parameters (Brock et al., 2021)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _numerics
from optclip._clip import clip_by, of_parameters
from optclip._rules import Threshold, scheduled
from optclip.measures import Measure, unit_norm


def param_ratio(ratio: Any, measure: Measure, *, eps: Any = 1e-3, call: str = "param_ratio") -> Threshold:
    """A limit relative to the parameters, measured as the updates are: ratio * max(measure(params), eps).

    Args:
      ratio: > 0 (lambda): a number, a traced scalar, or a schedule.
      measure: the measure of the clipper, of the same scope.
      eps: >= 0, a floor for the size of the parameters, so that zero-initialised ones can move.
      call: the name of the method, for error messages.

    Memory: an int32 step count if ``ratio`` is a schedule, else nothing.

    Example:
      >>> rule = param_ratio(0.5, global_norm)
      >>> float(rule.update(jnp.float32(1), (), jnp.full(4, 2.0))[0])
      2.0
    """
    _checks.check_positive(call, "clipping" if call != "param_ratio" else "ratio", ratio)
    _checks.check_nonnegative(call, "eps", eps)
    factor = scheduled(ratio)

    def update(sizes: Any, memory: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra
        _checks.check_params(call, params, "its limit is relative to their size")
        value, memory = factor.update(sizes, memory)
        weights = jax.tree.map(lambda w: jnp.maximum(w, jnp.asarray(eps, w.dtype)), measure(params))
        return _numerics.times(value, weights), memory

    return Threshold(factor.init, update)


def adaptive_grad_clip(
    clipping: Any,
    eps: Any = 1e-3,
    axis: Any = None,
    *,
    stack_axis: Any = None,
    axis_name: Any = None,
    record: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Clips the gradient of each unit relative to the norm of its parameters (AGC).

    G_u <- G_u * min(1, clipping * max(||W_u||, eps) / ||G_u||) for each unit u

    When to use: networks without normalisation layers, trained by SGD with momentum. Under Adam-like optimizers, whose
    step does not follow the size of the gradient, 0.01 is far too strong.

    Args:
      clipping: > 0 (lambda), the largest ratio of gradient to parameter norm (NFNets: 0.01): a number, a traced
        scalar, or a schedule.
      eps: >= 0, the floor for the norm of a unit's parameters (paper: 1e-3).
      axis: the axes that make up a unit and are reduced: an int, a tuple, or a prefix tree of these per leaf. None
        counts fan-in per rank as NFNets do, see `measures.unit_norm`. Attention projections (heads, head_dim, model)
        want ``(0, 1)``.
      stack_axis: axes along which leaves stack layers.
      axis_name: the mesh axes over which the reduced dimensions are sharded, see `measures.unit_norm`.
      record: whether the state keeps norms and limits; off, for they are as many as units.

    State: `ClipState`; if recorded, ``stats`` holds ``keepdims`` arrays.

    Guarantees: ||G_u|| <= clipping * max(||W_u||, eps) to rounding; bit-equal to the input below.

    Edge cases: needs ``params`` in ``update``, else ValueError. A zero-initialised unit moves by at most
      clipping * eps per unit of learning rate. A NaN or an infinity makes the updates of its own unit NaN.

    Departures: the authors' code floors ||G_u|| at 1e-6 before dividing; here any norm is divided by safely. Their
      code leaves out the last linear layer; so do you, in one line:
      ``optax.masked(adaptive_grad_clip(0.01), {"head": False, "body": True})``.

    References: Brock, De, Smith, Simonyan, "High-performance large-scale image recognition without normalization",
      ICML 2021, arXiv:2102.06171, equation (3).

    Example:
      >>> tx = optax.chain(adaptive_grad_clip(0.01), optax.sgd(0.1, momentum=0.9))
    """
    measure = partial(unit_norm, axis=axis, stack_axis=stack_axis, axis_name=axis_name)
    rule = param_ratio(clipping, measure, eps=eps, call="adaptive_grad_clip")
    return of_parameters(clip_by(measure, rule, record=record), "adaptive_grad_clip")
