"""ACClip: adaptive clipping of each coordinate of the momentum (Zhang et al., 2020)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _elementwise, _numerics
from optclip._clip import ClipState, cast_tree
from optclip._transformation import transformation


class Coordinates(NamedTuple):
    """The memory of `acclip`.

    Attributes:
      momentum: the tree of the updates, float32 (m).
      limit: likewise, the alpha-moment of each element to the power 1 / alpha (tau).
    """

    momentum: Any
    limit: Any


def acclip(
    b1: float = 0.9, b2: float = 0.99, *, alpha: float | None = None, eps: float = 1e-5
) -> optax.GradientTransformationExtraArgs:
    """Clips each element of the momentum to a moving average of its own magnitude (ACClip).

    m <- b1 * m + (1 - b1) * g,  tau^alpha <- b2 * tau^alpha + (1 - b2) * |g|^alpha
    u = m * min(1, tau / (|m| + eps)),  for each element

    When to use: gradients with heavy tails in single elements (attention models), in place of Adam; the result is the
    momentum, so put a plain learning rate behind it. Its size is that of the gradient, unlike Adam's.

    Args:
      b1: in [0, 1), of the momentum (0.9), per step.
      b2: in [0, 1), of the limit (0.99), per step.
      alpha: in [1, 2], the moment, fixed for good; None for 1, the paper's.
      eps: >= 0, added to the magnitude of the momentum (1e-5).

    State: `ClipState` without statistics; ``rule`` is a `Coordinates`: two float32 arrays per leaf, as many as Adam's.

    Guarantees: |u_j| <= tau_j. Never stuck, for raw magnitudes enter the limit: after a lasting shift of the level it
      is within 10% of the new one in ln(10 * shift) / (1 - b2) steps (460 for a shift of 10).

    Edge cases: the momentum of a gradient that has become zero decays. A NaN or an infinity makes the updates of its
      leaf NaN, and leaves the memory of that leaf untouched.

    Departures: none from the equations; b1, b2 and eps are those that ports use.

    References: Zhang, Karimireddy, Veit, Kim, Reddi, Kumar, Sra, "Why are adaptive methods good for attention models?",
      NeurIPS 2020, arXiv:1912.03194, Algorithm 2.

    Example:
      >>> tx = optax.chain(acclip(), optax.scale(-1e-2))
    """
    _checks.check_fraction("acclip", "b1", b1)
    _checks.check_fraction("acclip", "b2", b2)
    alpha = 1.0 if alpha is None else alpha
    _checks.check("acclip", "alpha", alpha, lambda a: (a >= 1) & (a <= 2), "in [1, 2]")
    _checks.check_nonnegative("acclip", "eps", eps)

    def init(params: Any) -> ClipState:
        return ClipState(Coordinates(_elementwise.zeros(params, complex=True), _elementwise.zeros(params)), None)

    def one(g: Any, m: jax.Array, tau: jax.Array, fine: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        if not _numerics.is_gradient(g):
            return g, m, tau
        wide = _elementwise.widen(g)
        moment = b1 * m + (1 - b1) * wide
        bound = _moment(b2, alpha, tau, jnp.abs(wide))
        size = jnp.abs(moment) + eps
        update = moment * jnp.where(size <= bound, 1, bound / jnp.where(size == 0, 1, size))
        update = _numerics.cast_like(jnp.where(fine, update, jnp.nan), g)
        return update, jnp.where(fine, moment, m), jnp.where(fine, bound, tau)

    def update(updates: Any, state: ClipState, params: Any = None, **extra: Any) -> tuple[Any, ClipState]:
        del params, extra
        leaves, treedef = jax.tree.flatten(updates)
        fine = _elementwise.finite(leaves)
        momentum, limit = (treedef.flatten_up_to(field) for field in state.rule)
        rows = [one(*row) for row in zip(leaves, momentum, limit, fine, strict=True)]
        out, momentum, limit = (treedef.unflatten([row[i] for row in rows]) for i in range(3))
        return out, ClipState(cast_tree(Coordinates(momentum, limit), state.rule), None)

    return transformation(init, update, ClipState)


def _moment(decay: float, alpha: float, tau: jax.Array, size: jax.Array) -> jax.Array:
    """(decay * tau^alpha + (1 - decay) * size^alpha)^(1 / alpha), out of range only where the result is."""
    if alpha == 1:
        return decay * tau + (1 - decay) * size
    if alpha == 2:
        return _elementwise.root_mean(decay, tau, size)
    largest = jnp.maximum(tau, size)
    still = largest == 0
    safe = jnp.where(still, 1, largest)
    part = lambda x: jnp.where(x == 0, 0, jnp.where(x == 0, 1, x / safe) ** alpha)
    mean = decay * part(tau) + (1 - decay) * part(size)
    return jnp.where(still, 0, largest * jnp.where(still, 1, mean) ** (1 / alpha))
