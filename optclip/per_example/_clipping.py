"""The two front doors: `clipped_value_and_grad` and `value_and_norms`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optclip.per_example import _engine
from optclip.per_example._front import Call, Signature, prepare
from optclip.per_example._jax import placed_as, zeros
from optclip.per_example._limits import Limits, Weights, check_norms, resolve, weigh
from optclip.per_example._rules import Rule, hard

__all__ = ["PerExample", "clipped_value_and_grad", "unclipped_fraction", "value_and_norms"]


class PerExample(NamedTuple):
    """What was measured, example by example. B is the number of examples; *tree* is the structure of ``max_norm``.

    Attributes:
      losses: [B].
      norms: tree of [B], gradient norms before clipping, padding included.
      coefs: tree of [B], what each gradient was multiplied by; 0 for padding and dropped examples.
      aux: the loss function's aux with a leading [B]; None without ``has_aux``.
      num_examples: int32, examples that are not padding.
      num_nonfinite: int32, those of them whose loss or gradient norm is not finite.
      clipped_fraction: tree of scalars, the share of the num_examples whose coefficient is below 1.
    """

    losses: jax.Array
    norms: Any
    coefs: Any
    aux: Any
    num_examples: jax.Array
    num_nonfinite: jax.Array
    clipped_fraction: Any


def clipped_value_and_grad(
    loss_fn: Callable,
    max_norm: Any,
    rule: Rule = hard,
    *,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    key_argnums: int | Sequence[int] = (),
    has_aux: bool = False,
    keep_batch_dim: bool = True,
    reduction: Literal["mean", "sum"] = "mean",
    microbatch: int | None = None,
    drop_nonfinite: bool = False,
) -> Callable[..., tuple[tuple[jax.Array, PerExample], Any]]:
    """``jax.value_and_grad`` with every example's gradient clipped before the mean.

    ::

        g = 1/B sum_i c_i grad(loss_i),    c_i = rule(|grad(loss_i)|, max_norm),    hard rule: c_i = min(1, C / |.|)

    Use it for differentially private training, against wrong labels and poisoned examples, and wherever one
    example should not be able to move the model by more than a stated amount.

    Args:
      loss_fn: ``loss_fn(params, batch, ...)`` -> scalar, or ``(scalar, aux)`` with ``has_aux``. It is called with one
        example at a time. Any function that ``jax.grad`` accepts.
      max_norm: the limit C, > 0, in the unit of a gradient norm. A float, a traced scalar, or a tree of these that is a
        prefix of the parameters: then every entry limits the joint norm of the leaves below it, by itself.
        ``inf`` leaves a group unclipped.
      rule: ``(norm, limit) -> coefficient``: `hard`, `normalize`, ``automatic(gamma)``, ``psac(r)`` or your own.
      argnums: the argument, or arguments, to differentiate: trees of real floating arrays.
      batch_argnums: the arguments whose every leaf has a leading example axis. All others are shared.
      key_argnums: arguments that hold one random key; every example gets its own, split from it.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      keep_batch_dim: show ``loss_fn`` a batch of one, ``[1, ...]`` (the usual batched loss works unchanged); otherwise
        one example, without the axis.
      reduction: ``"mean"`` over the examples that are not padding, or ``"sum"``. For privacy take the sum and
        divide by the *expected* batch size: the actual number of examples is private.
      microbatch: process so many examples at a time in a loop; memory then depends on this number, not on B.
      drop_nonfinite: leave out examples whose loss or gradient is not finite, and count them. Otherwise one such
        example makes the whole gradient NaN, on purpose.

    Returns:
      ``f(*args, example_mask=None, **kwargs) -> ((loss, per_example), grads)``, as
      ``jax.value_and_grad(..., has_aux=True)`` would. ``loss`` is reduced over the examples that count; ``per_example``
      is a `PerExample`; ``grads`` has the structure and dtypes of the differentiated arguments. ``example_mask`` is
      bool[B], False for padding. Call it under ``jax.jit``. Donation, ``jax.lax.scan`` and ``shard_map`` around it
      work.

    Guarantees:
      For every input, finite or not, the contribution of an example to the *sum* has norm at most ``max_norm`` (per
      group; a limit of 1e-12 or more), up to rounding in the dtype and the precision of products it is formed in, and
      with ``drop_nonfinite`` adding or removing one example changes the sum by at most ``max_norm``. The rules of this
      package keep ``coefficient * norm <= limit``. A GPU rounds factors of float32 products to 10 bits by default (an
      H200 exceeded a limit by 8e-5 of it); for more, ask for ``jax.default_matmul_precision("highest")``.

    Edge cases:
      A zero gradient has coefficient 1 under `hard` and contributes zero under every rule. Squares are formed in
      float32: a gradient with a norm, or of a layer with an activation or cotangent, above 1.8e19 counts as non-finite;
      norms below 1e-10, or of activations of 1e10, may come out too large, so that less than the limit is kept, and
      norms below 1e-18 may be 0. A batch of padding only gives zeros.
      Losses that couple examples (batch normalisation in training mode, contrastive losses) are evaluated on a batch
      of one, which is another function: use `check`.

    Errors:
      ValueError for a wrong argument number, an empty batch or leading axes that differ; TypeError for integer, complex
      or non-array parameters and for a loss that is not a real scalar. Each names the leaf.

    References:
      Abadi et al., Deep learning with differential privacy, 2016 (arXiv 1607.00133), algorithm 1. Goodfellow, Efficient
      per-example gradient computations, 2015 (arXiv 1510.01799). Bu et al., Book-keeping, ICML 2023 (arXiv 2210.00038).

    >>> import jax.numpy as jnp
    >>> def loss_fn(w, batch):
    ...     x, y = batch
    ...     return jnp.mean((x @ w - y) ** 2)
    >>> batch = jnp.array([[1.0], [1.0]]), jnp.array([1.0, 100.0])
    >>> (loss, per_example), grads = clipped_value_and_grad(loss_fn, max_norm=1.0)(jnp.zeros(1), batch)
    >>> print(per_example.norms, grads)
    [  2. 200.] [-1.]
    """
    name = "clipped_value_and_grad"
    signature = Signature(argnums, batch_argnums, key_argnums, has_aux, keep_batch_dim)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction must be 'mean' or 'sum', not {reduction!r}")
    _check_microbatch(name, microbatch)
    check_norms(name, max_norm)

    def f(*args: Any, example_mask: jax.Array | None = None, **kwargs: Any) -> tuple[tuple[jax.Array, PerExample], Any]:
        call = prepare(name, loss_fn, signature, args, kwargs)
        limits = resolve(name, max_norm, call.params_tree)
        mask = _check_mask(name, example_mask, call.size)
        count = call.size if mask is None else jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1)

        def step(examples: list, mask: jax.Array | None) -> tuple[list, tuple]:
            def weights_of(losses: jax.Array, squares: list) -> Weights:
                return weigh(limits, rule, squares, losses, mask, drop_nonfinite, count if reduction == "mean" else 1)

            losses, aux, weights, sums = _engine.clip(call, examples, weights_of, limits.group)
            return sums, (losses, aux, weights)

        sums, (losses, aux, weights) = _in_microbatches(step, call, mask, microbatch)
        grads = [placed_as(s.astype(p.dtype), p) for s, p in zip(sums, call.params, strict=True)]
        result = _summary(limits, reduction, mask, losses, aux, weights)
        return result, jax.tree.unflatten(call.params_tree, grads)

    return f


def value_and_norms(
    loss_fn: Callable,
    groups: Any = None,
    *,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    key_argnums: int | Sequence[int] = (),
    has_aux: bool = False,
    keep_batch_dim: bool = True,
    microbatch: int | None = None,
) -> Callable[..., tuple[Any, Any]]:
    """Every example's loss and gradient norm, for less than the price of one gradient.

    Use it to find mislabelled, poisoned or hard examples (large norms), to choose ``max_norm``, to watch gradient
    noise.

    Args:
      loss_fn, argnums, batch_argnums, key_argnums, has_aux, keep_batch_dim, microbatch: as in `clipped_value_and_grad`.
      groups: any tree that is a prefix of the parameters: one norm per entry (the entries themselves are not read).
        None: the norm of the whole gradient.

    Returns:
      ``f(*args, **kwargs) -> (losses[B], norms[B])``; with ``has_aux`` ``((losses, aux), norms)``; with ``groups`` the
      norms are a tree of [B]. Norms are float32 (float64 if a parameter is) and not finite where the gradient is not.

    Errors: as `clipped_value_and_grad`.

    >>> import jax.numpy as jnp
    >>> losses, norms = value_and_norms(lambda w, x: jnp.mean((x @ w) ** 2))(jnp.ones(2), jnp.array([[1.0, 0], [3, 4]]))
    >>> print(losses, norms)
    [ 1. 49.] [ 2. 70.]
    """
    name = "value_and_norms"
    signature = Signature(argnums, batch_argnums, key_argnums, has_aux, keep_batch_dim)
    _check_microbatch(name, microbatch)
    prefix = jax.numpy.inf if groups is None else jax.tree.map(lambda _: jax.numpy.inf, groups)

    def f(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        call = prepare(name, loss_fn, signature, args, kwargs)
        limits = resolve(name, prefix, call.params_tree, "groups")

        def step(examples: list, mask: jax.Array | None) -> tuple[list, tuple]:
            losses, aux, squares = _engine.measure_norms(call, examples)
            return [], (losses, aux, weigh(limits, hard, squares, losses))

        _, (losses, aux, weights) = _in_microbatches(step, call, None, microbatch)
        norms = jax.tree.unflatten(limits.tree, weights.norms)
        return ((losses, aux) if has_aux else losses), norms

    return f


def unclipped_fraction(per_example: PerExample) -> Any:
    """The share of examples that were left alone: b in the quantile update ``C <- C exp(-rate (b - quantile))``.

    A tree of scalars of the structure of ``max_norm``; 1 for a batch of padding only, at which to keep the limit:
    ``jnp.where(per_example.num_examples > 0, adapt_limit(...), limit)``. Andrew et al., Differentially private learning
    with adaptive clipping, NeurIPS 2021, algorithm 1 (arXiv 1905.03871). For privacy add noise to ``b * num_examples``
    first, and divide by the expected number of examples: then a batch of padding is one like any other.
    """
    return jax.tree.map(lambda clipped: 1 - clipped, per_example.clipped_fraction)


def _summary(
    limits: Limits, reduction: str, mask: jax.Array | None, losses: jax.Array, aux: Any, weights: Weights
) -> tuple[jax.Array, PerExample]:
    # Counted in float32: over sharded examples the counts then share one reduction with the gradient.
    total = lambda x: jnp.sum(x, dtype=jnp.float32)
    real = jnp.ones(losses.shape, bool) if mask is None else mask
    count = losses.size if mask is None else total(mask)
    kept = real if weights.keep is None else weights.keep
    loss = jnp.sum(jnp.where(kept, losses, 0))
    if reduction == "mean":
        loss = loss / jnp.maximum(losses.size if weights.keep is None else total(kept), 1).astype(loss.dtype)
    clipped = [total(real & (c < 1)) / jnp.maximum(count, 1) for c in weights.coefs]
    return loss, PerExample(
        losses=losses,
        norms=jax.tree.unflatten(limits.tree, weights.norms),
        coefs=jax.tree.unflatten(limits.tree, weights.coefs),
        aux=aux,
        num_examples=jnp.asarray(count, jnp.int32),
        num_nonfinite=total(weights.nonfinite).astype(jnp.int32),
        clipped_fraction=jax.tree.unflatten(limits.tree, clipped),
    )


def _in_microbatches(
    step: Callable[[list, jax.Array | None], tuple[list, Any]],
    call: Call,
    mask: jax.Array | None,
    microbatch: int | None,
) -> tuple[list, Any]:
    """Adds up the first result of ``step`` over chunks of examples and puts the second, per example, back in order."""
    if microbatch is None or microbatch >= call.size:
        return step(call.examples, mask)
    steps = -(-call.size // microbatch)
    missing = steps * microbatch - call.size
    examples = call.examples
    if missing:
        # The last example stands in for the missing ones: real data, so padding brings in no new NaN.
        examples = [jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) for x in examples]
        mask = jnp.concatenate([jnp.ones(call.size, bool) if mask is None else mask, jnp.zeros(missing, bool)])

    # Example i goes to chunk i mod steps: a batch axis sharded over devices stays sharded in every chunk.
    def chunk(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(microbatch, steps, *x.shape[1:]), 0, 1)

    def unchunk(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 0, 1).reshape(steps * microbatch, *x.shape[2:])[: call.size]

    inputs = ([chunk(x) for x in examples], None if mask is None else chunk(mask))
    start = [zeros(s) for s in jax.eval_shape(step, *jax.tree.map(lambda x: x[0], inputs))[0]]

    def body(sums: list, inputs: tuple) -> tuple[list, Any]:
        new, per_example = step(*inputs)
        return [a + b for a, b in zip(sums, new, strict=True)], per_example

    sums, per_example = jax.lax.scan(body, start, inputs)
    return sums, jax.tree.map(unchunk, per_example)


def _check_microbatch(name: str, microbatch: int | None) -> None:
    if microbatch is not None and (not isinstance(microbatch, int) or microbatch < 1):
        raise ValueError(f"{name}: microbatch must be a positive int or None, not {microbatch!r}")


def _check_mask(name: str, mask: Any, size: int) -> jax.Array | None:
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.shape != (size,) or mask.dtype != jnp.bool_:
        raise ValueError(
            f"{name}: example_mask must be bool of shape ({size},), not {mask.dtype} of shape {mask.shape}"
        )
    return mask
