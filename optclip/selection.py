"""Which leaves? Functions from a tree to one value per leaf: labels, masks, limits, mesh axes.

============================================= =======================================================
where                                         what
============================================= =======================================================
``optax.masked(clipper, by_path(...))``       booleans: the leaves to clip; the others pass untouched
``clip_by_group_norm(1.0, by_path(...))``     labels: the leaves that share a norm
``optax.partition(txs, by_path(...))``        labels: the transformation of each leaf
``clip_by_global_norm(by_path(...))``         numbers or schedules: the limit of each leaf
``axis_name=by_path(...)``                    names of mesh axes, None for replicated leaves
============================================= =======================================================
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["by_leaf", "by_path"]


def by_path(patterns: Mapping[str, Any], default: Any) -> Callable[[Any], Any]:
    """Gives each leaf the value of the first regular expression that is found in its path, else ``default``.

    Paths read ``"encoder/layers_0/kernel"``: names and indices joined by slashes, without the ``.value`` that variables
    of nnx and partitioned parameters of linen add.

    Args:
      patterns: regular expressions (`re.search`), each with a value of any kind.
      default: the value of leaves that none matches.

    Returns:
      A function from a tree to the tree of the values. It warns of a pattern that is found in no path at all.

    Example:
      >>> label = by_path({"attn|attention": "attention", "^head/": "head"}, default="rest")
      >>> label({"attn": {"kernel": 1.0}, "head": {"bias": 2.0}, "mlp": {"kernel": 3.0}})
      {'attn': {'kernel': 'attention'}, 'head': {'bias': 'head'}, 'mlp': {'kernel': 'rest'}}
    """
    compiled = [(re.compile(pattern), value) for pattern, value in patterns.items()]
    choose = lambda path, _: next((value for pattern, value in compiled if pattern.search(path)), default)
    return PerLeaf(choose, tuple(pattern for pattern, _ in compiled))


def by_leaf(choose: Callable[[str, Any], Any]) -> Callable[[Any], Any]:
    """Gives each leaf the value that ``choose(path, leaf)`` returns.

    Args:
      choose: a function of the path, as in `by_path`, and the leaf, of which only shape and dtype may be used.

    Returns:
      A function from a tree to the tree of the values.

    Example:
      >>> kind = by_leaf(lambda path, x: "muon" if x.ndim == 2 and "embed" not in path else "adamw")
      >>> kind({"embed": jnp.ones((5, 4)), "kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)})
      {'bias': 'adamw', 'embed': 'adamw', 'kernel': 'muon'}
    """
    return PerLeaf(choose)


@dataclass(frozen=True)
class PerLeaf:
    """What `by_path` and `by_leaf` return: a function from a tree to a value per leaf, which is no schedule."""

    choose: Callable[[str, Any], Any]
    patterns: tuple[re.Pattern[str], ...] = ()

    def __call__(self, tree: Any) -> Any:
        if isinstance(tree, int) or (getattr(tree, "shape", None) == () and jnp.issubdtype(tree.dtype, jnp.integer)):
            raise TypeError(
                "by_path and by_leaf give a value to each leaf of a tree, and no number per step: here is one"
            )
        empty = lambda x: x is None or isinstance(x, optax.MaskedNode)
        places = jax.tree.leaves_with_path(tree, is_leaf=empty)
        names = path_strings([path for path, _ in places])
        leaves = [(name, x) for name, (_, x) in zip(names, places, strict=True) if not empty(x)]
        for pattern in self.patterns if leaves else ():
            if not any(map(pattern.search, names)):
                said = f"{pattern.pattern!r} is found in no path of this tree; they are such as {leaves[0][0]!r}"
                warnings.warn(f"by_path: {said}", stacklevel=2)
        return jax.tree.structure(tree).unflatten(self.choose(name, x) for name, x in leaves)


def path_strings(paths: Sequence[Any]) -> list[str]:
    """The key paths of all leaves of a tree as names joined by slashes.

    Without the attribute ``value`` that wrapped variables add: it has no sibling, as the value of an attention has.
    Siblings are looked for among ``paths``, to which those of places without a leaf belong.
    """
    below = Counter(path[:n] for path in paths for n in range(len(path)))

    def string(path: Any) -> str:
        names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        wrapped = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value") and below[path[:-1]] == 1
        return "/".join(names[:-1] if wrapped else names)

    return list(map(string, paths))
