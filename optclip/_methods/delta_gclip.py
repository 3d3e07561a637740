"""Delta-GClip: a clip that never shrinks below a fraction (Tucat et al., 2025)."""

from typing import Any

import optax

from optclip._clip import clip_by
from optclip._rules import fixed
from optclip.measures import Measure, global_norm
from optclip.responses import floored


def delta_gclip(
    max_norm: Any, delta: float = 1e-3, *, measure: Measure | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales the gradient down to ``max_norm``, but by no factor below ``delta``.

    g <- g * min(1, max(delta, max_norm / ||g||))

    When to use: as `clip_by_global_norm`, where a proof of convergence is wanted (constant step, wide networks) or a
    huge gradient is to count for more than a merely large one.

    Args:
      max_norm: > 0 (gamma), in units of the gradient norm: a number, a traced scalar, a schedule, or a prefix tree.
      delta: in [0, 1], the smallest factor (paper: 1e-3 and smaller in the experiments).
      measure: the scope, see `optclip.measures`; None for `global_norm`.

    State: `ClipState`; ``stats.sizes`` is the norm before.

    Guarantees: the result is at most max(max_norm, delta * ||g||) long; bit-equal to the input up to ``max_norm``.

    Edge cases: a zero gradient stays zero. A NaN or an infinity makes the updates of its scope NaN.

    Departures: in the paper the factor is one of the step; here, before any optimizer, it is one of the gradient.

    References: Tucat, Mukherjee, Sen, Sun, Rivasplata, "Regularized gradient clipping provably trains wide and deep
      neural networks", TMLR 2025, arXiv:2404.08624, equation (2).

    Example:
      >>> tx = optax.chain(delta_gclip(1.0, 0.01), optax.sgd(0.1))
    """
    measure = measure or global_norm
    rule = fixed(max_norm, call="delta_gclip", name="max_norm")
    return clip_by(measure, rule, floored(delta))
