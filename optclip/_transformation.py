"""How Optax is told about a transformation whose state is a tuple with names."""

import inspect
from collections.abc import Callable
from typing import Any, cast

import optax


def transformation(
    init: Callable[[Any], Any], update: Callable[..., tuple[Any, Any]], state_type: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The Optax transformation of two functions; Optax's own types take no state but trees of arrays.

    With ``state_type``, a tuple with names, ``update`` raises TypeError for a state without those.
    """

    def checked(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if not all(hasattr(state, name) for name in state_type._fields):
            raise TypeError(f"update needs the {state_type.__name__} that init returned, got a {type(state).__name__}")
        return update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, checked if state_type else update))


def takes_extra_args(tx: Any) -> optax.GradientTransformationExtraArgs:
    """``tx``, with an update that may be given extra arguments.

    Optax itself passes them on to its own type alone; here the ``**`` in the signature of ``update`` decides, which
    ``optax.MultiSteps`` has.
    """
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(tx.update).parameters.values()):
        return transformation(tx.init, tx.update)
    return optax.with_extra_args_support(tx)
