"""StableAdamW's update clipping, for steps whose second moment lags behind the gradient (Wortsman et al., 2023)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _elementwise, _numerics
from optclip._clip import ClipState, cast_tree, clip_by
from optclip._history import mass
from optclip._rules import fixed
from optclip._transformation import takes_extra_args, transformation
from optclip.measures import Measure, leaf_rms


class StableAdamWState(NamedTuple):
    """The state of `stable_adamw_clip`.

    Attributes:
      clip: a `ClipState` with the statistics of the clip.
      entered: int32[leaves], gradients that entered.
      rms: the tree of the updates, float32: the square root of the moving average of the square, from 0.
      inner: the state of the optimizer.
    """

    clip: ClipState
    entered: jax.Array
    rms: Any
    inner: Any


def stable_adamw_clip(
    inner: optax.GradientTransformation,
    max_rms: Any = 1.0,
    decay: float = 0.99,
    *,
    eps: float = 1e-6,
    measure: Measure | None = None,
    record: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Scales the whole step of an optimizer down where gradients outrun their second moment (StableAdamW).

    v <- decay * v + (1 - decay) * g^2,  v' = v / (1 - decay^t),  RMS_i = sqrt(mean_j(g_j^2 / max(v'_j, eps^2)))
    step_i <- step_i / max(1, RMS_i / max_rms), weight decay included

    When to use: around Adam, for spikes that come because its second moment is out of date: low precision, vision and
    language. A clip of the gradient in front of Adam does not see them.

    Args:
      inner: the optimizer; it gets the gradients as they are.
      max_rms: > 0 (d; paper: 1): a number, a traced scalar, a schedule, or a prefix tree of these.
      decay: in [0, 1), that of the second moment (paper: 0.99); give the ``b2`` of ``inner``.
      eps: > 0 (authors' code: 1e-6), the floor of the root of v', in units of the gradient.
      measure: how the ratios |g_j| / max(sqrt(v'_j), eps) of a scope make a size; None for
        `leaf_rms`, the root mean square of each leaf.
      record: whether the state keeps sizes and limits.

    State: `StableAdamWState`: one float32 array and one int32 per leaf, the clip's own, for an optimizer does not show
      its moments, and the state of ``inner``. ``clip.stats.sizes`` are the RMS_i.

    Guarantees: no step grows. RMS_i is at most sqrt(1 / (1 - decay)) = 10, so none shrinks by more than 10 / max_rms;
      never stuck.

    Edge cases: the first step has RMS 1 and passes, to rounding. Elements far below ``eps`` count less. A NaN or an
      infinity makes the steps of its own leaf NaN, leaves its memory untouched, and reaches ``inner``.

    Departures: none; v' is bias-corrected and holds the current gradient, as in the authors' code.

    References: Wortsman et al., "Stable and low-precision training for large-scale vision-language models", NeurIPS
      2023, arXiv:2304.13013, Algorithm 2.

    Example:
      >>> tx = stable_adamw_clip(optax.adamw(2e-3, b2=0.99, weight_decay=0.2))
    """
    measure = measure or leaf_rms
    _checks.check_transformation("stable_adamw_clip", "inner", inner)
    _checks.check_callable("stable_adamw_clip", measure=measure)
    _checks.check_limits("stable_adamw_clip", "max_rms", max_rms)
    _checks.check_fraction("stable_adamw_clip", "decay", decay)
    _checks.check_positive("stable_adamw_clip", "eps", eps)
    rule = fixed(max_rms)
    inner = takes_extra_args(inner)

    def init(params: Any) -> StableAdamWState:
        clip: Any = clip_by(measure, rule, record=record).init(params)
        return StableAdamWState(clip, _elementwise.counts(params), _elementwise.zeros(params), inner.init(params))

    def update(updates: Any, state: StableAdamWState, params: Any = None, **extra: Any) -> tuple[Any, StableAdamWState]:
        leaves, treedef = jax.tree.flatten(updates)
        fine = _elementwise.finite(leaves)
        count = state.entered + fine.astype(jnp.int32)
        rows = zip(leaves, treedef.flatten_up_to(state.rms), count, fine, strict=True)
        pairs = [_one(*row, decay, eps) for row in rows]
        ratios, rms = (treedef.unflatten([pair[i] for pair in pairs]) for i in range(2))
        steps, inner_state = inner.update(updates, state.inner, params, **extra)
        clipper: Any = clip_by(lambda _: measure(ratios), rule, record=record)
        steps, clip = clipper.update(steps, state.clip, params, **extra)
        return steps, StableAdamWState(clip, count, cast_tree(rms, state.rms), inner_state)

    return transformation(init, update, StableAdamWState)


def _one(g: Any, rms: jax.Array, count: jax.Array, fine: jax.Array, decay: float, eps: float) -> tuple[Any, jax.Array]:
    if not _numerics.is_gradient(g):
        return g, rms
    size = jnp.abs(jnp.asarray(g)).astype(rms.dtype)
    moment = _elementwise.root_mean(decay, rms, size)
    root = moment / jnp.sqrt(mass(decay, jnp.maximum(count, 1), rms.dtype))
    ratio = jnp.where(fine, size / jnp.maximum(root, eps), jnp.nan)
    return ratio, jnp.where(fine, moment, rms)
