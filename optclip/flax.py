"""For ``flax.linen``: a train state that hands the loss to the optimizer and tells what was clipped and skipped.

Import it by itself, ``from optclip.flax import TrainState``; ``import optclip`` does not need Flax. For ``nnx`` there
is nothing to do: ``nnx.Optimizer.update(model, grads, value=loss)`` forwards extra arguments, and `optclip.summary`
reads ``optimizer.opt_state``.
"""

from collections.abc import Mapping
from typing import Any, Self

import optax
from flax.training import train_state

from optclip._transformation import takes_extra_args
from optclip.stats import summary

__all__ = ["TrainState"]


class TrainState(train_state.TrainState):
    """``flax.training.train_state.TrainState``, with extra arguments for the optimizer.

    When to use: with transformations that look at more than the gradient and the parameters, such as
    ``skip_spikes(..., loss_rule=...)``, and to log what clippers and guards did. Otherwise it is the train state of
    Flax, fields and checkpoints included.

    Example:
      >>> from optclip.flax import TrainState
      >>> tx = optclip.skip_spikes(optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1)), loss_rule=10.0)
      >>> state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
      >>> state = state.apply_gradients(grads={"w": jnp.array([3.0, 4.0])}, extra_args={"value": jnp.float32(0.5)})
      >>> float(state.summary()["clip/preclip_norm"]), int(state.step)
      (5.0, 1)
    """

    def apply_gradients(self, *, grads: Any, extra_args: Mapping[str, Any] | None = None, **kwargs: Any) -> Self:
        """One step of the optimizer.

        Args:
          grads: gradients in the structure of ``params``.
          extra_args: what ``tx.update`` is given by name beyond the parameters, for example ``{"value": loss}``.
          **kwargs: fields to replace, as in Flax.

        Returns:
          The new state.
        """
        extra, tx = dict(extra_args or {}), takes_extra_args(self.tx)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            return tx.update(updates, state, params, **extra)

        # Flax does the rest, parameters it overwrites with their gradients (fp8) included.
        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        after: Any = train_state.TrainState.apply_gradients(bound, grads=grads, **kwargs)
        return after.replace(tx=self.tx)

    def summary(self, *, per_leaf: bool = False) -> dict[str, Any]:
        """What clippers and guards did in the last step: `optclip.summary` of the optimizer state."""
        return summary(self.opt_state, per_leaf=per_leaf)
