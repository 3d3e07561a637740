"""What then? The shelf of responses: each maps an update, its size and its limit to the new update.

A response is a function ``(update, size, limit) -> update`` of arrays that broadcast against each other. `clip_by`
hands it updates in float32 (float64, complex64) and casts the result back to the dtype of the leaf. All but `clamp`
turn an update whose size is not finite into NaN: loud, and the same for NaN and infinity. All but `clamp` and `press`
keep the direction.

With s = size and c = limit, the new size is

=============== ============================== ================================================
response        new size                       grows
=============== ============================== ================================================
`rescale`       min(s, c)                      to c, with a kink
`smooth`        s / (1 + s / c)                to c, slowest
`square_root`   s / sqrt(1 + (s / c)^2)        to c
`tanh`          c * tanh(s / c)                to c, fastest
`arsinh`        c * arsinh(s / c)              as the logarithm of s, beyond c
`log1p`         c * log(1 + s / c)             as the logarithm of s, beyond c
`floored`       max(min(s, c), delta * s)      as delta * s, beyond c
`normalize`     c                              not: small updates are raised to c as well
`zero`          s up to c, else 0              not
=============== ============================== ================================================

`clamp` and `press` go by element: the first brings each to [-c, c], the second shrinks those beyond c by c / s.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optclip import _checks

Response = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

__all__ = [
    "Response",
    "arsinh",
    "clamp",
    "floored",
    "log1p",
    "normalize",
    "press",
    "rescale",
    "smooth",
    "square_root",
    "tanh",
    "zero",
]


def _where(which: jax.Array, yes: Any, no: Any) -> jax.Array:
    """`jnp.where`, which leaves a call in the program each time: 0.1 s for GPT-2's 148 leaves."""
    dtype = jnp.result_type(yes, no)
    which, yes, no = jnp.asarray(which), jnp.asarray(yes, dtype), jnp.asarray(no, dtype)
    if which.ndim == 0:
        return lax.select(which, *jnp.broadcast_arrays(yes, no))
    return lax.select(*jnp.broadcast_arrays(which, yes, no))


def _loud(size: jax.Array, limit: jax.Array) -> jax.Array:
    """The limit; NaN where the size is not finite or the limit negative, so that what is made from it is NaN too."""
    return _where(jnp.isfinite(size) & ~(limit < 0), limit, jnp.nan)


@partial(jax.jit, inline=True)  # traced once
def factors(factor: jax.Array, one: Any = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `multiplied` takes: whether the factor of `_quotient` is exactly 1 (``one``), and the two it is made of."""
    return factor == one, factor, _where(factor > 0, 1, factor)


def multiplied(update: jax.Array, same: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """``update`` times both factors; the same to the bit, subnormal numbers included, where that is said."""
    return _where(same, update, update * second * first)


def _quotient(where: jax.Array, size: jax.Array, target: jax.Array) -> jax.Array:
    """The factor target / size where true, else exactly 1.

    target / size may leave the range of float32 where an update times it does not. Then the factor is minus its square
    root, to be multiplied by twice. So all that the pass over an update reads is one number per size. What is not
    selected is made harmless first: an infinity there would be NaN in the derivative.
    """
    size, target = _where(where, size, 1), _where(where, target, 1)
    least = 2 * float(jnp.finfo(size.dtype).tiny)
    far = (target > 0) & ((size * least > target) | (target * least > size))
    root = lambda x: jnp.sqrt(_where(far, x, 1))
    return _where(far, -root(target), target) / _where(far, root(size), size)


def _scaling(factor: Callable[[jax.Array, jax.Array], jax.Array]) -> Response:
    """The response that scales by ``factor(size, limit)``, from which many factors can be had at once."""

    def response(update: jax.Array, size: jax.Array, limit: jax.Array) -> jax.Array:
        return multiplied(update, *factors(factor(size, limit)))

    response.__name__, response.__qualname__, response.__doc__ = factor.__name__, factor.__name__, factor.__doc__
    response.factor = factor  # pyright: ignore[reportFunctionMemberAccess]
    return response


def _no_more_than(size: jax.Array, limit: jax.Array) -> jax.Array:
    limit = _loud(size, limit)
    return _quotient(~(size <= limit), size, limit)


@_scaling
def rescale(size: jax.Array, limit: jax.Array) -> jax.Array:
    """Scales the update down to its limit: u * min(1, limit / size). Unchanged, bit for bit, up to the limit.

    Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML 2013.
    """
    return _no_more_than(size, limit)


def clamp(update: jax.Array, size: jax.Array, limit: jax.Array) -> jax.Array:
    """Clamps each element to [-limit, limit], whatever its size; infinities land on the bound, NaN stays NaN."""
    del size
    within = (update >= -limit) & (update <= limit)
    bounded = _where(limit >= 0, jnp.clip(update, -limit, limit), jnp.nan)
    return _where(within, update, bounded)  # selected, for min and max flush denormals


@_scaling
def smooth(size: jax.Array, limit: jax.Array) -> jax.Array:
    """u * limit / (size + limit): always shorter than the limit, slope 1 at zero, no kink.

    Source: the AUTO-S form of Bu et al., "Automatic Clipping", NeurIPS 2023, with gamma = limit.
    """
    limit = _loud(size, limit)
    changed = (size != 0) & (limit != jnp.inf)
    return _quotient(changed, size / 2 + limit / 2, limit / 2)


def zero(update: jax.Array, size: jax.Array, limit: jax.Array) -> jax.Array:
    """Drops an update whose size is beyond its limit: 0 there, unchanged up to the limit."""
    limit = _loud(size, limit)
    known = (size <= limit) | (size > limit)
    return _where(size <= limit, update, _where(known, jnp.zeros_like(update), jnp.nan))


@_scaling
def normalize(size: jax.Array, limit: jax.Array) -> jax.Array:
    """Brings every update to its limit, up or down: u * limit / size. Zero stays, and so does all with limit inf."""
    limit = _loud(size, limit)
    return _quotient((size != 0) & (limit != jnp.inf), size, limit)


@_scaling
def square_root(size: jax.Array, limit: jax.Array) -> jax.Array:
    """u / sqrt(1 + (size / limit)^2): shorter than the limit, slope 1 at zero, no kink.

    Source: the map of singular values in Jiang, Semenov, Stich, "Spectral Clipping", ICML 2026, for a norm.
    """

    def shape(x: jax.Array) -> jax.Array:
        low, high = jnp.minimum(x, 1), jnp.maximum(x, 1)
        return _where(x > 1, 1 / jnp.sqrt(1 + jnp.square(1 / high)), low / jnp.sqrt(1 + jnp.square(low)))

    return _soft(size, limit, shape)


@_scaling
def tanh(size: jax.Array, limit: jax.Array) -> jax.Array:
    """u * tanh(size / limit) / (size / limit): never longer than the limit, slope 1 at zero, no kink."""
    return _soft(size, limit, jnp.tanh)


@_scaling
def arsinh(size: jax.Array, limit: jax.Array) -> jax.Array:
    """u * arsinh(size / limit) / (size / limit): grows as the logarithm of the size, without bound.

    Source: Oikonomidis, Quan, Laude, Patrinos, "Nonlinearly preconditioned gradient methods", ICML 2025.
    """
    return _soft(size, limit, jnp.arcsinh)


@_scaling
def log1p(size: jax.Array, limit: jax.Array) -> jax.Array:
    """u * log(1 + size / limit) / (size / limit): grows as the logarithm of the size, without bound."""
    return _soft(size, limit, jnp.log1p)


def floored(delta: float) -> Response:
    """The response u * min(1, max(delta, limit / size)): `rescale`, but never by less than ``delta``.

    Args:
      delta: in [0, 1]; 0 is `rescale`.

    Source: Tucat, Mukherjee, Sen, Sun, Rivasplata, "Regularized gradient clipping provably trains wide and deep neural
    networks", TMLR 2025, arXiv:2404.08624.
    """
    _checks.check("floored", "delta", delta, lambda x: (x >= 0) & (x <= 1), "in [0, 1]")

    @_scaling
    def response(size: jax.Array, limit: jax.Array) -> jax.Array:
        least = jnp.asarray(delta, size.dtype) * size
        return _no_more_than(size, _where((limit >= 0) & (limit < least), least, limit))

    return response


def press(update: jax.Array, size: jax.Array, limit: jax.Array) -> jax.Array:
    """Shrinks the elements beyond the limit by limit / size, so that with size their largest none is beyond it.

    Source: the AdaClip of Huang et al., "Stable-SPAM", 2025.
    """
    limit = _loud(size, limit)
    return multiplied(update, *factors(_quotient(~(jnp.abs(update) <= limit), size, limit)))


def _soft(size: jax.Array, limit: jax.Array, shape: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The factor shape(x) / x with x = size / limit, for a shape with slope 1 at 0."""
    limit = _loud(size, limit)
    info = jnp.finfo(size.dtype)
    bounded = limit != jnp.inf
    x = jnp.minimum(size / _where(bounded, limit, 1), info.max)
    # Below eps^2, shape(x) is x to the last bit, and limit * shape(x) may underflow.
    changed = (size != 0) & bounded & ~(x < info.eps**2)
    return _quotient(changed, size, limit * shape(_where(changed, x, 1)))
