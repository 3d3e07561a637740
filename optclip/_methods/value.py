"""Value clipping: each component clamped to a bound."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _numerics
from optclip._clip import ClipState, cast_tree, own_state, respond
from optclip._rules import Threshold, scheduled
from optclip._transformation import transformation
from optclip.selection import PerLeaf


def clip(max_delta: Any = None, *, lower: Any = None, upper: Any = None) -> optax.GradientTransformationExtraArgs:
    """Clamps each component of the gradient to a bound ("clipvalue").

    g_j <- min(max(g_j, lower), upper), by default with lower = -max_delta and upper = max_delta

    When to use: against single wild components. It changes the direction, and the right bound depends on scale and
    batch size; prefer a norm for whole-gradient spikes.

    Args:
      max_delta: > 0, the symmetric bound: a number, a traced scalar, a schedule, or a prefix tree of these, which
        `by_path` can make.
      lower: <= 0, given together with ``upper`` instead of ``max_delta``; -inf for none.
      upper: >= 0, likewise; inf for none.

    State: `ClipState` without statistics: counting clamped components would cost a pass over the gradient.

    Guarantees: every component of the result lies within the bounds, to rounding in the dtype of the leaf; components
      within them are bit-equal to the input.

    Edge cases: infinities land on the bound, NaN stays NaN (the one method that does not spread it). Complex leaves
      have no order and raise TypeError.

    Departures: optax has the symmetric bound only.

    References: Graves, "Generating sequences with recurrent neural networks", 2013, arXiv:1308.0850.

    Example:
      >>> tx = optax.chain(clip(0.5), optax.sgd(0.1))
    """
    if (max_delta is None) == (lower is None and upper is None):
        raise ValueError("clip: give either max_delta, or lower and upper")
    if max_delta is not None:
        _checks.check_limits("clip", "max_delta", max_delta)
        bounds = (max_delta,)
    else:
        if lower is None or upper is None:
            raise ValueError("clip: lower and upper go together; use -inf or inf for a side without a bound")
        _checks.check("clip", "lower", lower, lambda x: x <= 0, "<= 0, so that a zero gradient stays zero", tree=True)
        _checks.check("clip", "upper", upper, lambda x: x >= 0, ">= 0, so that a zero gradient stays zero", tree=True)
        bounds = (lower, upper)

    of_tree = any(isinstance(bound, PerLeaf) for bound in bounds)

    def rule_for(updates: Any) -> Threshold:
        return scheduled([x(updates) if isinstance(x, PerLeaf) else x for x in bounds], counted=of_tree)

    def init(params: Any) -> ClipState:
        return ClipState(rule_for(params).init(params), None)

    def update(updates: Any, state: ClipState, params: Any = None, **extra: Any) -> tuple[Any, ClipState]:
        del params, extra
        dtype = _numerics.accumulator(*filter(_numerics.is_gradient, jax.tree.leaves(updates)))
        rule = rule_for(updates)
        own = own_state(state, lambda: rule.init(updates))
        now, memory = rule.update(jnp.zeros((), dtype), own.rule)
        low = now[0] if len(now) == 2 else jax.tree.map(jnp.negative, now[0])
        clamped = respond(_between, updates, low, now[-1])
        return clamped, ClipState(cast_tree(memory, own.rule), None) if own is state else state

    return transformation(init, update)


def _between(update: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(update):
        raise TypeError("clip: complex numbers have no order; clip their norm instead, with clip_by_leaf_norm")
    within = (update >= low) & (update <= high)
    bounded = jnp.where(low <= high, jnp.clip(update, low, high), jnp.nan)
    return jnp.where(within, update, bounded)  # selected, for min and max flush denormals
