"""How Optax is told about a transformation whose state is a tuple with names."""

from collections.abc import Callable
from typing import Any, cast

import optax


def transformation(
    init: Callable[[Any], Any], update: Callable[..., tuple[Any, Any]]
) -> optax.GradientTransformationExtraArgs:
    """The Optax transformation of two functions; Optax's own types take no state but trees of arrays."""
    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, update))
