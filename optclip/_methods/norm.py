"""Fixed limits on a norm: of the whole gradient, of groups, of leaves, of units."""

from functools import partial
from typing import Any

import jax
import optax

from optclip import _checks
from optclip._clip import clip_by
from optclip._rules import fixed
from optclip.measures import global_norm, group_norm, leaf_norm, unit_norm


def clip_by_global_norm(
    max_norm: Any, ord: float | None = None, *, axis_name: Any = None, record: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Scales the whole gradient down so that its norm never exceeds ``max_norm`` ("clipnorm").

    g <- g * min(1, max_norm / ||g||_p)

    When to use: the default for every network; 1.0 is the common choice for language models. The direction is kept.

    Args:
      max_norm: > 0, in units of the gradient norm: a number, a traced scalar, a schedule, or a prefix tree of these
        (``inf`` for leaves that count in the norm but are not to be scaled). ``inf`` alone only measures.
      ord: p > 0, or infinity; None for 2 (no number, so that ``optax.inject_hyperparams`` does not trace it).
      axis_name: mesh axes to sum over inside ``shard_map(check_vma=False)`` and ``pmap``, see `measures.global_norm`.
      record: whether the state keeps the norm and the limit.

    State: `ClipState`; ``stats.sizes`` is the pre-clip norm, a float32 scalar.

    Guarantees: the norm of the result is at most ``max_norm`` to rounding in the dtypes of the leaves; below it the
      updates are bit-equal to the input. float16 and bfloat16 leaves are measured in float32.

    Edge cases: a zero gradient stays zero, with derivative 0. A NaN or an infinity anywhere makes every update NaN:
      use `skip_nonfinite` to survive it. A norm beyond 3.4e38 counts as infinite.

    Departures: optax takes the norm in the dtype of the leaves; here a bfloat16 tree is measured right.

    References: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML 2013,
      arXiv:1211.5063, Algorithm 1.

    Example:
      >>> tx = optax.chain(clip_by_global_norm(1.0), optax.adamw(1e-3))
    """
    rule = fixed(max_norm, call="clip_by_global_norm", name="max_norm")
    ord = 2.0 if ord is None else _checks.check_ord("clip_by_global_norm", ord)
    return clip_by(partial(global_norm, ord=ord, axis_name=axis_name), rule, record=record)


def clip_by_leaf_norm(
    max_norm: Any, ord: float | None = None, *, stack_axis: Any = None, axis_name: Any = None, record: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf down so that its own norm never exceeds ``max_norm`` (Keras ``clipnorm``).

    g_i <- g_i * min(1, max_norm / ||g_i||_p)

    When to use: when one layer's spikes must not shrink the steps of all others. The direction of the whole gradient
    changes.

    Args:
      max_norm: > 0, in units of the gradient norm of a leaf: a number, a traced scalar, a schedule, or a prefix tree.
      ord: p > 0, or infinity; None for 2 (no number, so that ``optax.inject_hyperparams`` does not trace it).
      stack_axis: the axis along which leaves stack layers, each clipped on its own, see `measures.leaf_norm`.
      axis_name: see `clip_by_global_norm`.
      record: whether the state keeps norms and limits.

    State: `ClipState`; ``stats.sizes`` is the tree of the updates with a float32 scalar at each leaf.

    Guarantees: as `clip_by_global_norm`, for each leaf.

    Edge cases: a NaN or an infinity makes the updates of its own leaf NaN.

    Departures: none.

    References: Keras, ``Optimizer(clipnorm=...)``; Paddle, ``ClipGradByNorm``.

    Example:
      >>> tx = optax.chain(clip_by_leaf_norm(1.0), optax.sgd(0.1))
    """
    rule = fixed(max_norm, call="clip_by_leaf_norm", name="max_norm")
    ord = 2.0 if ord is None else _checks.check_ord("clip_by_leaf_norm", ord)
    return clip_by(partial(leaf_norm, ord=ord, stack_axis=stack_axis, axis_name=axis_name), rule, record=record)


def clip_by_group_norm(
    max_norm: Any, groups: Any = None, ord: float | None = None, *, axis_name: Any = None, record: bool = True
) -> optax.GradientTransformationExtraArgs:
    """One norm and one limit per group of leaves.

    g_G <- g_G * min(1, max_norm_G / ||g_G||_p) for each group G

    When to use: parts of a network with gradients of different scale (encoder and head, generator and critic, dense
    layers and experts).

    Args:
      max_norm: > 0: a prefix tree of numbers or schedules with one limit per group, or one limit for all groups.
      groups: a prefix tree of labels, as `optax.partition` takes them, or a function from the updates to one; equal
        labels share a norm. None takes each leaf of the tree ``max_norm`` as a group of its own.
      ord: p > 0, or infinity; None for 2 (no number, so that ``optax.inject_hyperparams`` does not trace it).
      axis_name: see `clip_by_global_norm`.
      record: whether the state keeps norms and limits.

    State: `ClipState`; ``stats.sizes`` has the structure of ``groups`` with a float32 scalar at each label.

    Guarantees: as `clip_by_global_norm`, for each group.

    Edge cases: a group without leaves has norm 0. A NaN or an infinity makes the updates of its own group NaN.

    Departures: none.

    References: PyTorch users write one ``clip_grad_norm_`` per parameter group.

    Example:
      >>> tx = clip_by_group_norm({"encoder": 1.0, "head": 0.1})
    """
    rule = fixed(max_norm, call="clip_by_group_norm", name="max_norm")
    ord = 2.0 if ord is None else _checks.check_ord("clip_by_group_norm", ord)
    if groups is None:
        limits, treedef = jax.tree.flatten(max_norm)
        groups = treedef.unflatten(range(len(limits)))
    return clip_by(partial(group_norm, groups=groups, ord=ord, axis_name=axis_name), rule, record=record)


def clip_by_unit_norm(
    max_norm: Any,
    axis: Any = None,
    ord: float | None = None,
    *,
    stack_axis: Any = None,
    axis_name: Any = None,
    record: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Scales the gradient of each unit (output neuron or filter) down to ``max_norm``.

    g_u <- g_u * min(1, max_norm / ||g_u||_p) for each unit u

    When to use: when single neurons spike; `adaptive_grad_clip` is its relative form.

    Args:
      max_norm: > 0, in units of the gradient norm of a unit: a number, a traced scalar, a schedule, or a prefix tree.
      axis: the axes that make up a unit, see `measures.unit_norm`; None counts fan-in per rank as NFNets do.
      ord: p > 0, or infinity; None for 2 (no number, so that ``optax.inject_hyperparams`` does not trace it).
      stack_axis: axes along which leaves stack layers.
      axis_name: the mesh axes over which the reduced dimensions are sharded, see `measures.unit_norm`.
      record: whether the state keeps norms and limits; off, for they are as many as units.

    State: `ClipState`; if recorded, ``stats.sizes`` holds ``keepdims`` arrays.

    Guarantees: as `clip_by_global_norm`, for each unit.

    Edge cases: a NaN or an infinity makes the updates of its own unit NaN.

    Departures: none.

    References: Keras, ``constraints.UnitNorm`` and ``MaxNorm`` define units alike.

    Example:
      >>> tx = optax.chain(clip_by_unit_norm(0.1), optax.sgd(0.1))
    """
    rule = fixed(max_norm, call="clip_by_unit_norm", name="max_norm")
    ord = 2.0 if ord is None else _checks.check_ord("clip_by_unit_norm", ord)
    measure = partial(unit_norm, axis=axis, ord=ord, stack_axis=stack_axis, axis_name=axis_name)
    return clip_by(measure, rule, record=record)
