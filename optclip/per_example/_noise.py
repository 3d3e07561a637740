"""Beside the clip: Gaussian noise of the size of the limit, a limit that follows a quantile, and shares of a budget."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _mesh, _numerics
from optclip._rules import resolve
from optclip._transformation import transformation
from optclip.per_example._limits import check_no_pattern

__all__ = ["GaussianNoiseState", "adapt_limit", "add_gaussian_noise", "split_budget", "split_budget_by_size"]


class GaussianNoiseState(NamedTuple):
    """The state of `add_gaussian_noise`.

    Attributes:
      key: the random key of the next step.
      count: int32, steps taken.
    """

    key: jax.Array
    count: jax.Array


def add_gaussian_noise(
    noise_multiplier: Any, max_norm: Any, batch_size: Any, key: Any, *, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Adds Gaussian noise in proportion to what one example can do to the gradient.

    g <- g + N(0, s^2 I),  s = noise_multiplier * max_norm / batch_size

    When to use: after `clipped_value_and_grad` with ``drop_nonfinite=True``, in front of the optimizer, for
    differentially private training.

    Args:
      noise_multiplier: >= 0, the standard deviation in units of the limit (0.5 to 2 are common): a number, a traced
        scalar, or a schedule from the step count.
      max_norm: > 0, the limit each example was clipped to: a number, a traced scalar, a schedule, or the tree of limits
        given to `clipped_value_and_grad`; the noise is then made for sqrt(sum of their squares), the norm of the whole.
      batch_size: > 0, what the *sum* was divided by: the expected number of examples, or 1 if by nothing. Not for
        ``reduction="mean"`` of batches that vary, which divides by how many there were: what one example can do is
        then more in a small batch.
      key: a random key, or an integer to make one from. It is the secret of the whole run.
      axis_name: inside ``shard_map(check_vma=False)`` and ``pmap``, the mesh axes over which leaves are sharded, as in
        `measures.global_norm`.

    State: `GaussianNoiseState`: a key and a count.

    Extra args: ``update(..., sensitivity=c)`` stands in for ``max_norm`` at this step, likewise a number or a tree: for
      a limit that adapts.

    Guarantees: every element of every leaf gets its own draw, a new one each step; on a mesh, replicated leaves get one
      draw for all devices, sharded leaves one per shard. Noise is drawn and added in float32 (float64 where a leaf is)
      and cast back. ``noise_multiplier=0`` leaves the updates as they are, bit for bit.

    Not promised: privacy. There is no accounting here (use the dp_accounting library: its epsilon needs the sampling
      rate, the number of steps, and Poisson sampling or a bound for the sampling you use); the generator is not
      cryptographic; Gaussian noise in floating point leaks in ways that theory leaves out (Mironov 2012).

    Edge cases: NaN and infinity stay. Integer, float0 and None leaves pass untouched.

    Departures: none.

    References: Abadi et al., "Deep learning with differential privacy", 2016, arXiv:1607.00133, algorithm 1, with the
      expected in place of the actual batch size, as usual. Mironov, "On significance of the least significant bits",
      CCS 2012.

    Example:
      >>> tx = optax.chain(per_example.add_gaussian_noise(1.0, max_norm=1.0, batch_size=256, key=0), optax.sgd(0.1))
    """
    _checks.check_nonnegative("add_gaussian_noise", "noise_multiplier", noise_multiplier)
    check_no_pattern("add_gaussian_noise", max_norm)
    _checks.check_limits("add_gaussian_noise", "max_norm", max_norm)
    _checks.check_positive("add_gaussian_noise", "batch_size", batch_size)

    def init(params: Any) -> GaussianNoiseState:
        del params
        seed = jnp.ndim(key) == 0 and not jnp.issubdtype(jnp.result_type(key), jax.dtypes.extended)
        start = jax.random.key(key) if seed else jnp.array(key)  # a copy: states may be donated
        return GaussianNoiseState(start, jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: GaussianNoiseState, params: Any = None, *, sensitivity: Any = None, **extra: Any
    ) -> tuple[Any, GaussianNoiseState]:
        del params, extra
        limits = jax.tree.leaves(max_norm if sensitivity is None else sensitivity)
        limits = [_float32(resolve(x, state.count)) for x in limits]
        whole = limits[0] if len(limits) == 1 else jnp.sqrt(sum(map(jnp.square, limits)))
        multiplier = _float32(resolve(noise_multiplier, state.count))
        scale = multiplier * whole / _float32(batch_size)
        leaves, treedef = jax.tree.flatten(updates)
        axes = _mesh.sum_axes(updates, axis_name)
        after, *keys = jax.random.split(state.key, len(leaves) + 1)
        noisy = [_with_noise(x, k, a, scale) for x, k, a in zip(leaves, keys, axes, strict=True)]
        return treedef.unflatten(noisy), GaussianNoiseState(after, jnp.asarray(optax.safe_increment(state.count)))

    return transformation(init, update, GaussianNoiseState)


def adapt_limit(limit: Any, unclipped: Any, quantile: Any = 0.5, rate: Any = 0.2) -> Any:
    """The limit of the next step, on its way to a quantile of the example norms.

    C <- C * exp(-rate * (b - quantile)), b the fraction of examples left unclipped

    Carry the limit in your training state, hand it to `clipped_value_and_grad` (and to `add_gaussian_noise` as
    ``sensitivity``), and adapt it after each step.

    Args:
      limit: > 0, a float32 scalar, or a tree of them, one per group.
      unclipped: in [0, 1], of the same structure: `unclipped_fraction`, with noise of its own if the limit is to be
        private (its sensitivity is 1 / expected batch size).
      quantile: in [0, 1], the target (gamma; paper: 0.5).
      rate: > 0, per step (eta_C; paper: 0.2).

    References: Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private learning with adaptive clipping", NeurIPS
      2021, arXiv:1905.03871, the geometric update of section 2.2.

    Example:
      >>> float(per_example.adapt_limit(jnp.float32(1.0), unclipped=jnp.float32(0.5)))
      1.0
    """
    _checks.check_limits("adapt_limit", "limit", limit)
    return jax.tree.map(lambda c, b: c * jnp.exp(-rate * (jnp.clip(b, 0, 1) - quantile)), limit, unclipped)


def split_budget(max_norm: Any, groups: Any) -> Any:
    """Limits for groups that together allow ``max_norm``: max_norm / sqrt(number of groups) for each.

    Args:
      max_norm: > 0, the limit of the whole gradient.
      groups: a tree with one leaf per group, a prefix of the parameters; its entries are not read. The parameters
        themselves give a limit per leaf.

    Returns:
      The tree with a limit at each leaf. The norm of a gradient clipped by it is at most ``max_norm``.

    Example:
      >>> per_example.split_budget(1.0, {"encoder": ..., "head": ..., "body": ..., "embed": ...})["head"]
      0.5
    """
    _checks.check_positive("split_budget", "max_norm", max_norm)
    leaves, treedef = jax.tree.flatten(groups)
    return treedef.unflatten([max_norm / len(leaves) ** 0.5] * len(leaves))


def split_budget_by_size(max_norm: Any, params: Any) -> Any:
    """A limit for each leaf in proportion to the square root of its size: max_norm * sqrt(d_i / d).

    Gradients whose elements are alike in size everywhere are then clipped alike. References: McMahan et al., "A general
    approach to adding differential privacy to iterative training procedures", 2018, arXiv:1812.06210, section 2.

    Example:
      >>> per_example.split_budget_by_size(1.0, {"a": jnp.ones(12), "b": jnp.ones(4)})["b"]
      0.5
    """
    _checks.check_positive("split_budget_by_size", "max_norm", max_norm)
    total = sum(jnp.size(x) for x in jax.tree.leaves(params))
    return jax.tree.map(lambda x: max_norm * (jnp.size(x) / total) ** 0.5, params)


def _float32(x: Any) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float32)


def _with_noise(x: Any, key: jax.Array, axes: tuple[str, ...], scale: jax.Array) -> Any:
    if not _numerics.is_gradient(x):
        return x
    for axis in axes:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    wide = _numerics.widen(jnp.asarray(x), _numerics.accumulator(x))
    unit = 2**0.5 if jnp.iscomplexobj(wide) else 1.0  # a complex draw has variance 1 in both parts together
    noise = jax.random.normal(key, wide.shape, wide.dtype) * (unit * scale).astype(wide.dtype)
    return _numerics.cast_like(jnp.where(scale == 0, wide, wide + noise), x)
