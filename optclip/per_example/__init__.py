"""Clipping before the mean: every example's gradient bounded by itself, at close to the price of an ordinary gradient.

    (loss, per_example), grads = clipped_value_and_grad(loss_fn, max_norm=1.0)(params, batch)
    losses, norms = value_and_norms(loss_fn)(params, batch)

    print(explain(loss_fn)(params, batch))        # which rule each parameter got, and what it costs
    check(loss_fn)(params, batch)                 # raises if the loss couples examples

``loss_fn`` is any function that ``jax.grad`` accepts, from any framework, unchanged. `clipped_value_and_grad` stands in
for ``jax.value_and_grad(loss_fn, has_aux=True)``; its second output `PerExample` holds losses, norms, coefficients.

* rules, ``(norm, limit) -> coefficient``: `hard`, `normalize`, ``automatic(gamma)``, ``psac(r)``
* limits: a float, a traced scalar (from a schedule or from optimizer state), or a prefix tree of them, one per group
* an adaptive limit: ``adapt_limit(limit, unclipped_fraction(per_example))`` from one step to the next
* for private training: `add_gaussian_noise` as an Optax transformation, `split_budget` for a limit per layer

What is guaranteed
------------------
Let g_i be the gradient of example i and c_i its coefficient. For every rule of this package ``c_i |g_i| <=
max_norm``, for every input, finite or not, with ``drop_nonfinite``: then adding or removing one example changes
``sum_i c_i g_i`` by at most ``max_norm`` (per group, where there are groups). This holds up to rounding. Two things
round: the sum itself, in the dtype of the parameters, and a norm found from products of positions (*gram* below),
whose square is off by a few float32 ulps of ``(sum_t |x_t| |g_t|)^2``: that matters only for an example whose
positions cancel almost entirely. What squares out of the range of float32 may have lost is added to a squared norm:
there a norm comes out too large, never too small.

No privacy accounting is done or promised here: this package bounds the sensitivity of the sum; noise, sampling and the
(epsilon, delta) that follows from them are the caller's (for instance with the dp_accounting library).

How it works
------------
The gradient of the loss of *one* example is traced to a program, and the program is run under ``vmap``, with one
difference. An equation whose result is a gradient of a parameter and nothing else is not executed. What it would
multiply is kept, as a sum over positions t of products of an activation and a cotangent::

    G_i = sum_t x_it (x) g_it         dense layer, attention projection, expert, convolution (t: places in the image),
                                      recurrent weight (t: steps), embedding (x: one-hot rows, held as ids)

Transposes, reshapes, slices and the like on the way to the parameter move indices (`_structure`, `_labels`); a
parameter used several times has a sum of such terms. Two things are wanted of G_i, and neither needs a gradient per
example::

    |G_i|^2       = sum_ts <x_it, x_is> <g_it, g_is>    if G_i is larger than its factors, else G_i is formed
    sum_i c_i G_i = sum_it (c_i x_it) (x) g_it          one product, as in an ordinary gradient

(`_norms`, `_batch.contract`.) So there are two passes (`_engine`), of which the second is only these products: there is
no second backward pass. Loops, conditionals and checkpoint regions are programs inside equations; their factors are
carried out of them, or, for checkpoint regions, which exist in order not to hold such things, the region runs again
(`_regions`, `_again`).

Everything not recognised is executed as it stands, under ``vmap``: exact, at the price of one gradient per example for
that leaf. Recognition makes a result cheap and never makes it right, so nothing depends on a list of layers.

* values: `_terms`; crossing a ``vmap`` or a loop: `_batch`
* equations that make gradients: `_gradients`, `_convolution` (one function and one row each)
* the program, what in it is a gradient, its execution: `_block`; versions of jax: `_jax`
* what the caller sees: `_front`, `_limits`, `_rules`, `_clipping`, `_explain`
* the definition, to compare with: `_reference`

Goodfellow, Efficient per-example gradient computations, 2015 (arXiv 1510.01799); Li et al., Large language models can
be strong differentially private learners, ICLR 2022 (arXiv 2110.05679); Bu et al., Differentially private
optimization on large model at small cost, ICML 2023 (arXiv 2210.00038).
"""

from optclip.per_example._clipping import PerExample, clipped_value_and_grad, unclipped_fraction, value_and_norms
from optclip.per_example._explain import Checked, Explained, LeafCost, check, explain
from optclip.per_example._noise import (
    GaussianNoiseState,
    adapt_limit,
    add_gaussian_noise,
    split_budget,
    split_budget_by_size,
)
from optclip.per_example._rules import automatic, hard, normalize, psac

__all__ = [
    "Checked",
    "Explained",
    "GaussianNoiseState",
    "LeafCost",
    "PerExample",
    "adapt_limit",
    "add_gaussian_noise",
    "automatic",
    "check",
    "clipped_value_and_grad",
    "explain",
    "hard",
    "normalize",
    "psac",
    "split_budget",
    "split_budget_by_size",
    "unclipped_fraction",
    "value_and_norms",
]
