"""In front of and behind every optimizer of Optax, and inside linen, nnx and filtered trees."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import optclip
from tests import oracles
from tests.cases import GRADS, PARAMS
from tests.harness import assert_close, avals, finite

METHODS = {
    "clip": lambda: optclip.clip(0.1),
    "clip_by_global_norm": lambda: optclip.clip_by_global_norm(0.5),
    "clip_by_leaf_norm": lambda: optclip.clip_by_leaf_norm(0.3),
    "clip_by_group_norm": lambda: optclip.clip_by_group_norm({"dense": 0.3, "head": 0.2}),
    "clip_by_block_rms": lambda: optclip.clip_by_block_rms(0.1),
    "clip_by_unit_norm": lambda: optclip.clip_by_unit_norm(0.2),
    "adaptive_grad_clip": lambda: optclip.adaptive_grad_clip(0.1),
}
BEHIND = {
    "clip": (1e-4, oracles.magnitude),
    "clip_by_block_rms": (1e-4, oracles.leaf_rms),
    "clip_by_global_norm": (1e-3, oracles.global_norm),
    "clip_by_unit_norm": (1e-3, oracles.unit_norm),
}
NO_PLAIN_GRADIENTS = {
    "lbfgs",  # a line search over the loss
    "polyak_sgd", "momo", "momo_adam",  # the loss
    "dpsgd",  # gradients of each example
    "sophia",  # a Hessian from the loss
    "sam", "mechanize", "schedule_free", "split_real_and_imaginary", "reduce_on_plateau",  # wrap another optimizer
    "noisy_sgd", "optimistic_adam",  # a key; a deprecated name
    "sm3",  # fails on scalars
}  # fmt: skip


def optimizers():
    """Every public optimizer that takes a learning rate, or nothing, and plain gradients."""
    found = {}
    for home in (optax, optax.contrib):
        for name, value in vars(home).items():
            helper = name.startswith(("_", "scale", "add_", "inject"))
            if not inspect.isfunction(value) or helper or name in NO_PLAIN_GRADIENTS:
                continue
            given = inspect.signature(value).parameters
            needed = [n for n, p in given.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
            if "learning_rate" in given and set(needed) <= {"learning_rate"}:
                found[name] = value
    return found


OPTIMIZERS = optimizers()


def test_the_optimizers_are_all_of_them():
    known = "adam adamw sgd lion lamb lars adafactor rmsprop yogi novograd adan adopt muon prodigy dog cocob"
    assert set(known.split()) <= set(OPTIMIZERS)
    assert len(OPTIMIZERS) >= 30


def make(name):
    return OPTIMIZERS[name](learning_rate=1e-2)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_types_in_front_of_and_behind_every_optimizer(name):
    alone = jax.eval_shape(make(name).init, PARAMS)
    _, alone = jax.eval_shape(make(name).update, GRADS[0], alone, PARAMS)  # some change their own weak types
    for clipper in METHODS.values():
        for place in (0, 1):
            both = (clipper(), make(name)) if place == 0 else (make(name), clipper())
            tx = optax.chain(*both)
            state = jax.eval_shape(tx.init, PARAMS)
            update, after = jax.eval_shape(tx.update, GRADS[0], state, PARAMS)
            assert avals(update) == avals(GRADS[0])
            assert avals(after[place]) == avals(state[place]) and avals(after[1 - place]) == avals(alone)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_numbers_in_front_of_every_optimizer(name):
    """Every method: what the optimizer makes of the clipped gradients."""
    optimizer = make(name)
    state = optimizer.init(PARAMS)
    for method, clipper in METHODS.items():
        chained, alone = optax.chain(clipper(), optimizer), clipper()
        got, _ = chained.update(GRADS[0], chained.init(PARAMS), PARAMS)
        clipped, _ = alone.update(GRADS[0], alone.init(PARAMS), PARAMS)
        want, _ = optimizer.update(clipped, state, PARAMS)
        assert finite(got), method
        assert_close(got, want, rtol=1e-4, where=f"{method} in front: ")


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_numbers_behind_every_optimizer(name):
    """Every measure: each size of the update becomes the smaller of what it was and the limit."""
    optimizer = make(name)
    update, _ = optimizer.update(GRADS[0], optimizer.init(PARAMS), PARAMS)
    for method, (limit, size) in BEHIND.items():
        chained = optax.chain(optimizer, getattr(optclip, method)(limit))
        got, _ = chained.update(GRADS[0], chained.init(PARAMS), PARAMS)
        for before, after in zip(jax.tree.leaves(size(update)), jax.tree.leaves(size(got)), strict=True):
            assert_close(after, np.minimum(before, limit), rtol=1e-4, where=f"{method} behind: ")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(3)(x)))


def test_in_a_linen_train_state():
    net, x = Net(), jnp.ones((5, 4))
    params = net.init(jax.random.key(0), x)["params"]
    for method, clipper in METHODS.items():
        layers = {"Dense_0": 0.1, "Dense_1": 0.2}
        clipper = clipper() if method != "clip_by_group_norm" else optclip.clip_by_group_norm(layers)
        state = TrainState.create(apply_fn=net.apply, params=params, tx=optax.chain(clipper, optax.sgd(1.0)))
        grads = jax.grad(lambda p: jnp.sum(net.apply({"params": p}, x) ** 2))(params)
        after = jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, grads)
        clipped, _ = clipper.update(grads, clipper.init(params), params)
        assert_close(after.params, jax.tree.map(lambda p, u: p - u, params, clipped), rtol=1e-5, where=method)


def test_in_an_nnx_optimizer():
    x = jnp.ones((5, 4))
    for method, clipper in METHODS.items():
        if method == "clip_by_group_norm":
            continue  # labels of its own tree, below
        model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        optimizer = nnx.Optimizer(model, optax.chain(clipper(), optax.sgd(1.0)), wrt=nnx.Param)
        grads = nnx.grad(lambda m: jnp.sum(m(x) ** 2))(model)
        pure = nnx.to_pure_dict(grads)
        nnx.jit(lambda m, o, g: o.update(m, g))(model, optimizer, grads)
        clipped, _ = clipper().update(pure, clipper().init(before), before)
        want = jax.tree.map(lambda p, u: p - u, before, clipped)
        assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), want, rtol=1e-5, where=method)


def test_in_a_filtered_tree_with_none_where_nothing_is_trained():
    params = {**PARAMS, "activation": None, "frozen": {"a": None}}
    grads = {**GRADS[0], "activation": None, "frozen": {"a": None}}
    for method, clipper in METHODS.items():
        if method == "clip_by_group_norm":
            clipper = lambda: optclip.clip_by_group_norm(0.3, {"dense": 0, "head": 1, "activation": None, "frozen": 2})
        tx = optax.chain(clipper(), optax.adam(1e-3))
        update, state = jax.jit(tx.update)(grads, tx.init(params), params)
        assert update["activation"] is None and update["frozen"] == {"a": None}
        assert avals(state) == avals(tx.init(params))
        assert finite(optax.apply_updates(params, update))
