"""The contract, items 4 and 5: zeros and their derivatives; NaN and infinity loud in their scope, and then gone."""

import jax
import jax.numpy as jnp
import numpy as np

import optclip
from tests.cases import GRADS, PARAMS
from tests.harness import assert_bits, assert_close, cases, each_case, finite, has_nan, run, scaled, standard_run, total

ZERO = jax.tree.map(np.zeros_like, PARAMS)


@each_case
def test_zero_stays_zero_with_a_finite_derivative(case):
    tx = case.make()

    def two_steps(grad, state, params):
        first, state = tx.update(grad, state, params)
        second, state = tx.update(grad, state, params)
        return total(first) + total(second), (first, second, state)

    step = jax.jit(jax.value_and_grad(two_steps, has_aux=True))
    for params in (PARAMS, ZERO):
        (_, (*updates, state)), slope = step(ZERO, tx.init(params), params)
        assert_bits(updates, [ZERO, ZERO])
        assert finite(slope)
    (_, (*updates, _)), slope = step(GRADS[0], state, ZERO)  # wakes up, on parameters that are zero
    assert finite(updates) and finite(slope)


@cases(limit=lambda name: name is not None, history=False, scope="tree")
def test_the_derivative_at_the_limit_is_finite_and_shrinks_beyond_it(case):
    size = case.measure(GRADS[0])
    tx = case.make(**{case.limit: size})
    slope = jax.grad(lambda grad: total(tx.update(grad, tx.init(PARAMS), PARAMS)[0]))(GRADS[0])
    assert finite(slope)


@each_case
def test_a_leaf_that_is_always_zero_changes_nothing_for_the_others(case):
    dead = [{**g, "head": {**g["head"], "scale": np.zeros((), np.float32)}} for g in GRADS]
    updates, _ = run(case.make(), dead)
    assert all(map(finite, updates))
    assert all(u["head"]["scale"] == 0 for u in updates)


def poison(tree, value):
    """One bad entry: in the second unit of the dense kernel."""
    kernel = np.array(tree["dense"]["kernel"])
    kernel[1, 1] = value
    return {**tree, "dense": {**tree["dense"], "kernel": kernel}}


def inside(scope):
    """Which entries share a scope with the poisoned one."""
    mark = lambda value: jax.tree.map(lambda x: np.full(x.shape, value), PARAMS)
    where = mark(scope == "tree")
    if scope == "group":
        where["dense"] = mark(True)["dense"]
    elif scope != "tree":
        rows, columns = {"leaf": (slice(None),) * 2, "unit": (slice(None), 1), "element": (1, 1)}[scope]
        where["dense"]["kernel"][rows, columns] = True
    return where


@each_case
def test_bad_numbers_are_loud_in_their_scope_and_leave_no_trace(case):
    tx = case.make()
    step = jax.jit(lambda grad, state: tx.update(grad, state, PARAMS))
    clean, states = standard_run(case)
    where, before = inside(case.scope), states[2]
    mine = lambda tree: jax.tree.map(lambda x, w: np.where(w, x, 0), tree, where)
    for value in (np.nan, np.inf, -np.inf):
        bad, after = step(poison(GRADS[3], value), before)
        poisoned = bad["dense"]["kernel"][1, 1]
        if case.nonfinite == "survives":
            assert finite(bad)
        elif case.nonfinite == "clamps":
            assert np.isnan(poisoned) if np.isnan(value) else np.sign(poisoned) == np.sign(value)
        else:
            assert all(np.all(np.isnan(u[w])) for u, w in zip(*map(jax.tree.leaves, (bad, where)), strict=True))
        assert finite(jax.tree.map(lambda x, w: np.where(w, 0, x), bad, where)), "loud in its scope only"
        following, _ = step(GRADS[3], after)
        assert_close(mine(following), mine(clean[3]), rtol=2e-6, where=f"after {value}: ")
        assert finite(following)


@each_case
def test_a_gradient_of_nothing_but_nan_leaves_no_trace(case):
    tx = case.make()
    step = jax.jit(lambda grad, state: tx.update(grad, state, PARAMS))
    clean, states = standard_run(case)
    nowhere = jax.tree.map(lambda x: np.full_like(x, np.nan), PARAMS)
    for start, want in ((tx.init(PARAMS), clean[0]), (states[2], clean[3])):
        grad = GRADS[0] if want is clean[0] else GRADS[3]
        bad, after = step(nowhere, start)
        assert finite(bad) if case.nonfinite == "survives" else has_nan(bad)
        following, _ = step(grad, step(nowhere, after)[1])
        assert_close(following, want, rtol=2e-6)


@each_case
def test_finite_gradients_of_any_size_are_not_bad(case):
    tx = case.make()
    step = jax.jit(lambda grad: tx.update(grad, tx.init(PARAMS), PARAMS)[0])
    for factor in (1e-30, 1e15, 1e30):
        assert finite(step(scaled(GRADS[0], factor))), factor


@cases(limit=lambda name: name is not None, wrapper=False)
def test_a_limit_that_is_nan_or_negative_is_loud(case):
    for bad in (np.nan, -1.0):
        tx = getattr(optclip, case.public)(**{**case.kwargs, case.limit: lambda count, bad=bad: jnp.float32(bad)})
        state, seen, step = tx.init(PARAMS), [], jax.jit(tx.update)
        for grad in GRADS:
            update, state = step(grad, state, PARAMS)
            seen += map(np.asarray, jax.tree.leaves(update))
        if np.isnan(bad) or not case.history:
            assert any(np.isnan(x).any() for x in seen)
