"""MARS: a variance-corrected gradient, clipped to unit norm per leaf (Yuan et al., 2024)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _elementwise, _numerics
from optclip._clip import ClipState, cast_tree, clip_by
from optclip._rules import fixed, scheduled
from optclip._transformation import transformation
from optclip.measures import Measure, leaf_norm


class MarsState(NamedTuple):
    """The state of `mars_clip`.

    Attributes:
      clip: a `ClipState` with the statistics of the clip.
      step: an int32 step count if gamma is a schedule; else ().
      entered: int32[leaves], gradients that were remembered.
      last: the tree of the updates, float32: the last gradient.
    """

    clip: ClipState
    step: Any
    entered: jax.Array
    last: Any


def mars_clip(
    max_norm: Any = 1.0, gamma: Any = 0.025, b1: float = 0.95, *, measure: Measure | None = None, record: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Adds to the gradient its change since the last step, and clips each leaf to norm 1 (MARS).

    c = g_t + gamma * b1 / (1 - b1) * (g_t - g_{t-1}),  u_i = c_i * min(1, max_norm / ||c_i||)

    When to use: in front of Adam with the same ``b1`` and b2 = 0.99, which makes it MARS-AdamW. For the clip alone,
    take ``clip_by_leaf_norm(1.0)``.

    Args:
      max_norm: > 0 (paper: 1), in units of the gradient norm of a leaf: a number, a traced scalar, a schedule, or a
        prefix tree.
      gamma: >= 0 (paper: 0.025), the strength of the correction: a number, a traced scalar, or a schedule; 0 for
        none.
      b1: in [0, 1), that of the Adam behind (paper: 0.95).
      measure: the scope of the clip, see `optclip.measures`; None for `leaf_norm`.
      record: whether the state keeps sizes and limits.

    State: `MarsState`: one float32 array and one int32 per leaf; ``clip.stats.sizes`` are the norms of the corrected
      gradient.

    Guarantees: ||u_i|| <= max_norm.

    Edge cases: the first gradient is not corrected. A NaN or an infinity makes the updates of its own scope NaN; the
      last gradient of its leaf stays as it was.

    Departures: the authors' code corrects the first gradient as if the one before had been 0; in the paper it is not
      corrected. This is their approximate form: the exact one takes g_{t-1} on the batch of step t. Their default
      leaves out leaves that are not matrices: use ``optax.masked``.

    References: Yuan, Liu, Wu, Zhou, Gu, "MARS: Unleashing the power of variance reduction for training large models",
      ICML 2025, arXiv:2411.10438, Algorithm 2.

    Example:
      >>> tx = optax.chain(mars_clip(), optax.adamw(3e-3, b1=0.95, b2=0.99))
    """
    measure = measure or leaf_norm
    _checks.check_nonnegative("mars_clip", "gamma", gamma)
    _checks.check_fraction("mars_clip", "b1", b1)
    knob = scheduled((gamma,))
    clip: Any = clip_by(measure, fixed(max_norm, call="mars_clip", name="max_norm"), record=record)

    def init(params: Any) -> MarsState:
        last = _elementwise.zeros(params, complex=True)
        return MarsState(clip.init(params), knob.init(params), _elementwise.counts(params), last)

    def update(updates: Any, state: MarsState, params: Any = None, **extra: Any) -> tuple[Any, MarsState]:
        leaves, treedef = jax.tree.flatten(updates)
        (strength,), step = knob.update(list(filter(_numerics.is_gradient, leaves)), state.step)
        last = treedef.flatten_up_to(state.last)
        weights = jnp.where(state.entered > 0, strength * b1 / (1 - b1), 0)
        corrected = treedef.unflatten(map(_correct, leaves, last, weights))
        out, clipped = clip.update(corrected, state.clip, params, **extra)
        fine = _elementwise.finite(leaves)
        last = treedef.unflatten(map(_remember, leaves, last, fine))
        count = state.entered + fine.astype(jnp.int32)
        return _elementwise.cast_back(out, updates), MarsState(clipped, step, count, cast_tree(last, state.last))

    return transformation(init, update, MarsState)


def _correct(g: Any, last: jax.Array, weight: jax.Array) -> Any:
    if not _numerics.is_gradient(g):
        return g
    wide = _elementwise.widen(g)
    return jnp.where(weight == 0, wide, wide + weight.astype(jnp.finfo(last.dtype).dtype) * (wide - last))


def _remember(g: Any, last: jax.Array, fine: jax.Array) -> jax.Array:
    return jnp.where(fine, _elementwise.widen(g), last) if _numerics.is_gradient(g) else last
