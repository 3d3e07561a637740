"""Gradients brought to a given norm."""

from typing import Any

import optax

from optclip._clip import clip_by
from optclip._rules import fixed
from optclip.measures import Measure, global_norm
from optclip.responses import normalize


def normalize_by_update_norm(
    scale_factor: Any = 1.0, *, measure: Measure | None = None
) -> optax.GradientTransformationExtraArgs:
    """Brings the norm of the gradient to ``scale_factor``, from above and from below (normalized gradient descent).

    g <- scale_factor * g / ||g||

    When to use: when only the direction is to count. Small gradients are raised as much as large ones are shrunk, so
    let the learning rate or ``scale_factor`` fall; `responses.smooth` and its kin leave small ones as they are.

    Args:
      scale_factor: > 0, the norm of the result: a number, a traced scalar, a schedule, or a prefix tree of these.
      measure: the scope, see `optclip.measures`; ``leaf_norm`` normalizes each leaf; None for `global_norm`.

    State: `ClipState`; ``stats.sizes`` is the norm before.

    Guarantees: the norm of the result is ``scale_factor`` to rounding, unless the gradient is zero.

    Edge cases: a zero gradient stays zero, with derivative 0. A NaN or an infinity makes the updates of its scope NaN.

    Departures: optax adds ``eps`` to the norm, which shrinks small gradients; here no norm is too small to divide by.

    References: Hazan, Levy, Shalev-Shwartz, "Beyond convexity: stochastic quasi-convex optimization", NeurIPS 2015,
      arXiv:1507.02030, Algorithm 1.

    Example:
      >>> tx = optax.chain(optax.trace(0.9), normalize_by_update_norm(), optax.scale(-0.01))
    """
    measure = measure or global_norm
    rule = fixed(scale_factor, call="normalize_by_update_norm", name="scale_factor")
    return clip_by(measure, rule, normalize)
