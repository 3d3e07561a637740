"""The contract, item 1: structures never change, one trace serves many steps and any limit, every transform works."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tests.cases import GRADS, PARAMS
from tests.harness import (
    assert_bits,
    assert_close,
    avals,
    cases,
    each_case,
    finite,
    limit_value,
    some_of_the_cases,
    standard_run,
    total,
)

STACK = jax.tree.map(lambda *x: np.stack(x), *GRADS)


@each_case
def test_structure_shapes_dtypes_and_weak_types_never_change(case):
    updates, states = standard_run(case)
    start = case.make().init(PARAMS)
    for update, state in zip(updates, states, strict=True):
        assert avals(update) == avals(GRADS[0])
        assert avals(state) == avals(start)


@each_case
def test_low_precision_and_mixed_trees_keep_their_dtypes(case):
    dtypes = (jnp.bfloat16, jnp.float32, jnp.float16, jnp.float32)
    mixed = lambda tree: dict(enumerate(map(jnp.asarray, jax.tree.leaves(tree), dtypes)))
    params, grad = mixed(PARAMS), mixed(GRADS[0])
    tx = case.make()
    state = tx.init(params)
    update, after = jax.eval_shape(tx.update, grad, state, params)
    assert avals(update) == avals(grad)
    assert avals(after) == avals(state)
    wide = [x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(x.dtype == jnp.float32 for x in wide), "sizes, limits and memory are float32"


@each_case
def test_scan_is_a_loop_of_one_trace(case):
    tx = case.make()
    body = lambda state, grad: tx.update(grad, state, PARAMS)[::-1]
    state, stacked = jax.jit(lambda start: jax.lax.scan(body, start, STACK))(tx.init(PARAMS))
    updates, states = standard_run(case)
    assert_close(stacked, jax.tree.map(lambda *x: np.stack(x), *updates), rtol=2e-6)
    assert_close(state, states[-1], rtol=1e-5)


@cases(limit=lambda name: name is not None)
def test_one_trace_for_any_limit(case):
    value = limit_value(case)

    def steps(limit):
        tx = case.make(**{case.limit: limit})
        return jax.lax.scan(lambda s, g: tx.update(g, s, PARAMS)[::-1], tx.init(PARAMS), STACK)[1]

    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(steps, n=1))
    static = jax.tree.map(lambda *x: np.stack(x), *standard_run(case)[0])
    assert_close(traced(value), static, rtol=2e-6)
    halved = traced(value / 2)
    assert finite(halved)
    scheduled = jax.jit(lambda: steps(lambda count: jnp.where(count < 4, value, value / 2)))()
    part = lambda tree, steps: jax.tree.map(lambda x: x[steps], tree)
    assert_close(part(scheduled, slice(4)), part(static, slice(4)), rtol=2e-6)
    if not case.history:
        assert_close(part(scheduled, slice(4, None)), part(halved, slice(4, None)), rtol=2e-6)


@each_case
def test_vmap_is_a_loop(case):
    tx = case.make()
    _, states = standard_run(case)
    pair = lambda a, b: jax.tree.map(lambda x, y: jnp.stack([x, y]), a, b)
    update = jax.jit(jax.vmap(tx.update, in_axes=(0, 0, None)))
    updates, after = update(pair(GRADS[3], GRADS[5]), pair(states[2], states[4]), PARAMS)
    for i, step in enumerate((3, 5)):
        assert_close(jax.tree.map(lambda x, i=i: x[i], updates), standard_run(case)[0][step], rtol=2e-6)
        assert_close(jax.tree.map(lambda x, i=i: x[i], after), states[step], rtol=1e-5)


@some_of_the_cases(1)
def test_cond_checkpoint_and_gradients_in_a_donated_program(case):
    tx = case.make()

    def step(grad, state, params):
        taken = lambda: tx.update(grad, state, params)
        update, after = jax.lax.cond(jnp.any(params["dense"]["bias"] != 0), taken, lambda: (grad, state))
        return total(update), (update, after)

    through = jax.value_and_grad(jax.checkpoint(step), has_aux=True)
    donated = jax.jit(through, donate_argnums=(0, 1))
    with jax.numpy_rank_promotion("raise"):
        (_, (update, state)), slope = donated(jax.tree.map(jnp.array, GRADS[0]), tx.init(PARAMS), PARAMS)
    updates, states = standard_run(case)
    assert_close(update, updates[0], rtol=2e-6)
    assert_bits(jax.tree.map(jnp.shape, state), jax.tree.map(jnp.shape, states[0]))
    assert finite(slope)
