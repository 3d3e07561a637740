"""Around a whole optimizer or a clipper: what to do with a step that is bad, and with what a clip cuts off.

================== ======================================================================== ====================
wrapper            what it does                                                              goes around
================== ======================================================================== ====================
`skip_nonfinite`   a step with NaN or infinity changes nothing                               the whole optimizer
`skip_spikes`      a step whose norm or loss is an outlier changes nothing                   the whole optimizer
`zero_nonfinite`   single elements that are not finite become zero                           (stands in the chain)
`u_clip`           what a clip cuts off is carried over to the next step                     a clipper
`clip21`           the difference to a running estimate is clipped, the estimate emitted     a clipper
`track_median`     the same with a fixed limit: a running median of the gradients            (stands in the chain)
================== ======================================================================== ====================

From the outside in: ``skip_nonfinite(skip_spikes(chain(clip, optimizer)))``. Unscale a scaled loss before all of it.

**Turning a clipper off and on.** ``max_norm=jnp.inf`` measures and clips nothing, with the same state: a checkpoint
written with either restores into the other. Within one run give the limit from outside, as a traced scalar or by
``optax.inject_hyperparams(clip_by_global_norm)(max_norm=1.0)``, and set ``state.hyperparams["max_norm"]``. It takes
every method; a ``window``, an ``axis``, and functions you pass yourself, belong into its ``static_args``.

**Replacing a clipper.** Name the parts of the chain, restore the old state with the old transformation, and carry over
all parts but the one that is new::

    old = optax.named_chain(("clip", clip_by_global_norm(1.0)), ("adam", optax.adamw(1e-3)))
    new = optax.named_chain(("clip", clip_by_ema(2.0)), ("adam", optax.adamw(1e-3)))
    state = new.init(params)
    state["adam"] = restored["adam"]

In a plain ``optax.chain`` the state is a tuple in the order of the chain: ``(new.init(params)[0], *restored[1:])``; in
front of a chain that had no clipper, ``(new.init(params)[0], *restored)``; inside a guard,
``new.init(params)._replace(inner_state=...)``. Orbax and ``pickle`` take any of these states; ``flax.serialization``
does not know the ``OrderedDict`` of a named chain: give it ``dict(state)``.
"""

from optclip._wrappers.feedback import FeedbackState, clip21, track_median, u_clip
from optclip._wrappers.nonfinite import SkipState, skip_nonfinite
from optclip._wrappers.spikes import SpikeState, skip_spikes
from optclip._wrappers.zero import ZeroState, zero_nonfinite

__all__ = [
    "FeedbackState",
    "SkipState",
    "SpikeState",
    "ZeroState",
    "clip21",
    "skip_nonfinite",
    "skip_spikes",
    "track_median",
    "u_clip",
    "zero_nonfinite",
]
