"""What a clipper recorded in its last step: trees to read, vectors to keep.

A size and a limit for each of a thousand leaves are two thousand buffers to hand over at every step, which take XLA:CPU
as long as the clip itself (9.9 ms instead of 5.0 ms for AdaGC); a checkpoint has as many entries.
"""

import copyreg
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optclip import _mesh
from optclip._checks import check_fits
from optclip._finite import kept, meant
from optclip._vectors import stack
from optclip.measures import Sizes


class _Parts(NamedTuple):
    numbers: Any
    arrays: tuple[Any, ...]


class _Structured(type):
    """The type of types that know a structure."""


class Packed(_Parts, metaclass=_Structured):
    """A tree with its scalars as one vector, which is the last axis also of states stacked along the first.

    Each structure has a type of its own, for JAX, Optax and Flax make a named tuple anew of its type and its fields.
    As a field, the structure of a thousand leaves would be walked at every step, which takes 0.7 ms.
    """

    __slots__ = ()
    treedef: Any
    single: tuple[bool, ...]  # which leaves are scalars


_TYPES: dict[Any, Any] = {}
_NUMBERS = itertools.count()


def _type_for(treedef: Any, single: tuple[bool, ...]) -> Any:
    key = treedef, single
    if key not in _TYPES:
        name = f"Packed_{next(_NUMBERS)}"
        new = _Structured(name, (Packed,), {"__slots__": (), "treedef": treedef, "single": single})
        if _TYPES.setdefault(key, new) is new:  # the same one for every thread
            globals()[name] = new  # else cloudpickle takes it to pieces
    return _TYPES[key]


def _type_like(tree: Any, single: tuple[bool, ...]) -> Any:
    return _type_for(jax.tree.structure(tree), single)


def _by_structure(kind: Any) -> Any:
    """How a type is pickled: in another process it has another name."""
    if kind is Packed:
        return "Packed"
    return _type_like, (kind.treedef.unflatten(range(len(kind.single))), kind.single)  # not all treedefs can be pickled


copyreg.pickle(_Structured, _by_structure)


class ClipStats(NamedTuple):
    """What the last step measured and allowed, before the clip.

    Attributes:
      sizes: the pre-clip sizes, a prefix tree of the updates, float32 (float64).
      limits: their limits, likewise; infinity before the first step.
      kept_sizes: the sizes as the state keeps them: several scalars are one leaf, a vector.
      kept_limits: likewise, the largest float for infinity.
    """

    kept_sizes: Any
    kept_limits: Any

    @property
    def sizes(self) -> Sizes:
        return _unpack(self.kept_sizes)

    @property
    def limits(self) -> Any:
        return meant(_unpack(self.kept_limits))


def stats_of(sizes: Sizes, limits: Any) -> ClipStats:
    return ClipStats(_pack(plain(sizes)), kept(_pack(plain(limits))))


def check_sizes(sizes: Sizes, before: ClipStats) -> None:
    """Raises unless the sizes have the structure and shapes of those recorded before."""
    check_fits("updates", plain(sizes), _shapes(before.kept_sizes))


def stats_after(sizes: Sizes, limits: Any, before: ClipStats | None) -> ClipStats | None:
    """What is recorded, in the dtypes of what was before, and packed if that is, which states of a vmap may not be."""
    if before is None:
        return None
    new = []
    for tree, old in zip((sizes, limits), before, strict=True):
        tree = cast_tree(plain(tree), _shapes(old))
        new.append(_pack(tree, always=True) if isinstance(old, Packed) else tree)
    return ClipStats(new[0], kept(new[1]))


def cast_tree(new: Any, old: Any, what: str = "updates") -> Any:
    """``new`` in the dtypes of ``old``: a state keeps its dtypes whatever the updates were."""
    check_fits(what, new, old)

    def one(n: Any, o: Any) -> Any:
        dtype = jnp.result_type(o)
        if jnp.issubdtype(jnp.result_type(n), jnp.inexact) and not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(f"the memory of a rule was {dtype} and would become {jnp.result_type(n)}: init it as that")
        return n if jnp.issubdtype(dtype, jax.dtypes.extended) else jnp.asarray(n).astype(dtype)

    return jax.tree.map(one, new, old)


def _shapes(old: Any) -> Any:
    """The tree that a state keeps, or, where it is packed, its shapes: nothing is taken apart."""
    if not isinstance(old, Packed):
        return old
    return _unpack(old._replace(numbers=jax.ShapeDtypeStruct(old.numbers.shape, old.numbers.dtype)))


def plain(tree: Any) -> Any:
    """The tree with what Flax wraps around arrays, variables (``nnx``) and boxes (``linen``), taken off.

    They carry the mesh axes of a parameter, and a size does not lie on those.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_wrapped)
    return treedef.unflatten([_bare(x) if _is_wrapped(x) else x for x in leaves])


def _is_wrapped(x: Any) -> bool:
    return hasattr(x, "get_value") or hasattr(x, "replace_boxed")


def _bare(x: Any) -> Any:
    if hasattr(x, "get_value"):
        return x.get_value()
    (value,) = jax.tree.leaves(x, is_leaf=lambda y: y is not x)  # ``unbox`` would lay it on those axes
    return plain(value)


def _pack(tree: Any, always: bool = False) -> Any:
    """The tree with its scalars in one vector, if there are several of one type, or ``always``."""
    leaves, treedef = jax.tree.flatten(tree)
    single = tuple(getattr(x, "ndim", None) == 0 for x in leaves)
    scalars = [x for x, alone in zip(leaves, single, strict=True) if alone]
    if not always and (len(scalars) < 2 or len({(x.dtype, _axes(x)) for x in scalars}) > 1):
        return tree
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in scalars):
        numbers = jax.ShapeDtypeStruct((len(scalars),), scalars[0].dtype)
    else:
        numbers = stack(scalars) if any(isinstance(x, jax.Array) for x in scalars) else np.stack(scalars)
    arrays = tuple(x for x, alone in zip(leaves, single, strict=True) if not alone)
    return _type_for(treedef, single)(numbers, arrays)


def _axes(x: Any) -> tuple[str, ...]:
    return _mesh.varying_axes(x) if isinstance(x, jax.Array) else ()


def _unpack(tree: Any) -> Any:
    if not isinstance(tree, Packed):
        return tree
    scalars, arrays = iter(_apart(tree.numbers, sum(tree.single))), iter(tree.arrays)
    return tree.treedef.unflatten([next(scalars if alone else arrays) for alone in tree.single])


def _apart(numbers: Any, n: int) -> list[Any]:
    """One for each scalar: its number or shape; what stands for all of them, such as a sharding, as it is."""
    if not getattr(numbers, "ndim", 0):
        return [numbers] * n
    if numbers.shape[-1] != n:
        raise ValueError(f"the last axis of a state holds {n} statistics, got one of shape {numbers.shape}")
    if isinstance(numbers, jax.ShapeDtypeStruct):
        return [jax.ShapeDtypeStruct(numbers.shape[:-1], numbers.dtype)] * n
    return list((np if isinstance(numbers, np.ndarray) else jnp).moveaxis(numbers, -1, 0))
