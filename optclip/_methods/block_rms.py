"""Update clipping by the root mean square of a block, as in Adafactor."""

from functools import partial
from typing import Any

import optax

from optclip._clip import clip_by
from optclip._rules import fixed
from optclip.measures import leaf_rms


def clip_by_block_rms(
    threshold: Any, *, stack_axis: Any = None, axis_name: Any = None, record: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf down so that its root mean square never exceeds ``threshold``.

    u_i <- u_i / max(1, RMS(u_i) / threshold)

    When to use: behind a preconditioner (Adafactor, Adam), whose updates have a root mean square near 1.

    Args:
      threshold: > 0, in units of the update (Adafactor: d = 1.0): a number, a traced scalar, a schedule, or a prefix
        tree.
      stack_axis: the axis along which leaves stack layers (``nn.scan``), each clipped on its own.
      axis_name: mesh axes to sum over inside ``shard_map(check_vma=False)`` and ``pmap``.
      record: whether the state keeps sizes and limits.

    State: `ClipState`; ``stats.sizes`` is the tree of the updates with a float32 scalar at each leaf.

    Guarantees: as `clip_by_global_norm`, for the root mean square of each leaf.

    Edge cases: an empty leaf has size 0. A NaN or an infinity makes the updates of its own leaf NaN,
      and so does a norm of the leaf beyond 3.4e38.

    Departures: none; optax takes a stacked leaf as one block.

    References: Shazeer, Stern, "Adafactor", ICML 2018, arXiv:1804.04235, Section 6.

    Example:
      >>> tx = optax.chain(optax.scale_by_adam(), clip_by_block_rms(1.0), optax.scale(-1e-3))
    """
    rule = fixed(threshold, call="clip_by_block_rms", name="threshold")
    return clip_by(partial(leaf_rms, stack_axis=stack_axis, axis_name=axis_name), rule, record=record)
