"""Noise beside the clip: its size, independence and state; the limit that follows a quantile; shares of a budget."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optclip
from optclip import per_example
from optclip.per_example import adapt_limit, add_gaussian_noise, split_budget, split_budget_by_size
from tests.meshes import devices

ZEROS = {"w": jnp.zeros((200, 100)), "half": jnp.zeros(20_000, jnp.bfloat16), "b": jnp.zeros(20_000)}


def draws(tx, steps, tree=ZEROS):
    step = lambda state, _: tx.update(tree, state)[::-1]
    return jax.jit(lambda state: jax.lax.scan(step, state, length=steps))(tx.init(tree))


def flat(tree):
    return [np.asarray(x, np.float64).reshape(x.shape[0], -1) for x in jax.tree.leaves(tree)]


def test_size_and_independence():
    """Against the normal distribution: variance within 6 standard errors, no correlation between leaves or steps."""
    state, noise = draws(add_gaussian_noise(2.0, max_norm=3.0, batch_size=8, key=0), 3)
    want = 2.0 * 3.0 / 8
    samples = [row for leaf in flat(noise) for row in leaf]
    for x in samples:
        n = x.size
        assert abs(x.mean()) < 6 * want / n**0.5
        assert abs(x.var() / want**2 - 1) < 6 * (2 / n) ** 0.5
        assert abs(np.mean(x**4) / want**4 - 3) < 6 * (96 / n) ** 0.5  # kurtosis: it is normal
    correlation = np.corrcoef(samples)
    assert np.abs(correlation - np.eye(len(samples))).max() < 6 / samples[0].size ** 0.5
    assert int(state.count) == 3


def test_adds_to_the_gradient_in_its_dtype():
    tree = {"w": jnp.full(10_000, 5.0), "half": jnp.full(10_000, 5.0, jnp.float16), "n": jnp.arange(3), "none": None}
    tx = add_gaussian_noise(1.0, 1.0, 10, key=1)
    out, state = tx.update(tree, tx.init(tree), None, value=1.0)
    assert jax.tree.map(jnp.result_type, out) == jax.tree.map(jnp.result_type, tree)
    assert np.mean(out["w"]) == pytest.approx(5, abs=0.01) and np.std(out["half"]) == pytest.approx(0.1, rel=0.05)
    np.testing.assert_array_equal(out["n"], tree["n"])
    with jax.numpy_dtype_promotion("strict"):
        tx.update(tree, state)


def test_key_advances_and_is_all_the_randomness():
    tx = add_gaussian_noise(1.0, 1.0, 1, key=jax.random.key(7))
    first, state = tx.update(ZEROS, tx.init(ZEROS))
    second, _ = tx.update(ZEROS, state)
    again, _ = tx.update(ZEROS, tx.init(ZEROS))
    assert not np.array_equal(first["w"], second["w"])
    jax.tree.map(np.testing.assert_array_equal, first, again)
    raw = add_gaussian_noise(1.0, 1.0, 1, key=jax.random.PRNGKey(7))
    np.testing.assert_array_equal(raw.update(ZEROS, raw.init(ZEROS))[0]["w"], first["w"])


def test_nothing_recompiles_and_no_noise_is_bit_equal():
    tree = {"w": jnp.array([1e-30, -0.0, 3.0]), "half": jnp.array([300.0], jnp.float16)}
    update = jax.jit(lambda m, c, g, s: add_gaussian_noise(m, c, 1, key=0).update(g, s))
    state = add_gaussian_noise(1.0, 1.0, 1, key=0).init(tree)
    out, _ = update(0.0, 1.0, tree, state)
    jax.tree.map(np.testing.assert_array_equal, out, tree)
    update(2.0, 3.0, tree, state)
    assert update._cache_size() == 1


def std(tx, steps=1, **extra):
    state = tx.init(ZEROS)
    for _ in range(steps):
        out, state = tx.update(ZEROS, state, None, **extra)
    return float(np.std(np.asarray(out["w"])))


def test_limits_of_groups_schedules_and_sensitivity():
    limits = {"w": 3.0, "half": 4.0, "b": 12.0}
    assert std(add_gaussian_noise(1.0, limits, 1, key=0)) == pytest.approx(13, rel=0.03)
    schedule = lambda count: jnp.where(count < 1, 1.0, 5.0)
    assert std(add_gaussian_noise(1.0, schedule, 1, key=0)) == pytest.approx(1, rel=0.03)
    assert std(add_gaussian_noise(1.0, schedule, 1, key=0), steps=2) == pytest.approx(5, rel=0.03)
    assert std(add_gaussian_noise(schedule, 1.0, 1, key=0), steps=2) == pytest.approx(5, rel=0.03)
    for limit in (jnp.float32(6), {"a": 6 * 0.6, "b": jnp.float32(6 * 0.8)}):
        assert std(add_gaussian_noise(2.0, 1.0, 4, key=0), sensitivity=limit) == pytest.approx(3, rel=0.03)


def test_same_numbers_with_sharded_arrays():
    mesh = Mesh(np.array(devices(2)), ("x",))
    tx = add_gaussian_noise(1.0, 1.0, 1, key=0)
    sharded = jax.device_put(ZEROS, NamedSharding(mesh, PartitionSpec("x")))
    want, _ = jax.jit(tx.update)(ZEROS, tx.init(ZEROS))
    got, _ = jax.jit(tx.update)(sharded, tx.init(ZEROS))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("check", [True, False])
def test_under_shard_map_shards_differ_and_replicas_agree(check):
    mesh = Mesh(np.array(devices(2)), ("x",))
    specs = {"w": PartitionSpec("x"), "half": PartitionSpec(), "b": PartitionSpec("x")}
    tx = add_gaussian_noise(1.0, 1.0, 1, key=0, axis_name=None if check else {"w": "x", "half": None, "b": "x"})

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, PartitionSpec()), out_specs=(specs, PartitionSpec("x")),
             check_vma=check)  # fmt: skip
    def step(tree, state):
        out, _ = tx.update(tree, state)
        return out, out["half"][None] if not check else jax.lax.pcast(out["half"][None], "x", to="varying")

    out, halves = jax.jit(step)(ZEROS, tx.init(ZEROS))
    w = np.asarray(out["w"])
    assert abs(np.corrcoef(w[:100].ravel(), w[100:].ravel())[0, 1]) < 0.06
    np.testing.assert_array_equal(halves[0], halves[1])


def test_dp_sgd_step_by_hand():
    """The mean of clipped gradients plus the noise of the next key, through the whole chain."""
    loss_fn = lambda w, batch: jnp.mean((batch @ w) ** 2)
    w, batch = jnp.ones(3), jnp.array(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    _, grads = per_example.clipped_value_and_grad(loss_fn, 1.0, drop_nonfinite=True)(w, batch)
    tx = optax.chain(add_gaussian_noise(0.5, 1.0, 4, key=3), optax.sgd(0.1))
    updates, _ = tx.update(grads, tx.init(w), w)
    noise = jax.random.normal(jax.random.split(jax.random.key(3), 2)[1], (3,)) * 0.125
    np.testing.assert_allclose(updates, -0.1 * (grads + noise), rtol=1e-6)


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.9])
def test_adaptive_limit_finds_its_quantile(quantile):
    norms = np.exp(np.random.default_rng(0).normal(size=(600, 256)))
    step = lambda limit, row: (adapt_limit(limit, jnp.mean(row <= limit), quantile), limit)
    limit, _ = jax.lax.scan(step, jnp.float32(100.0), jnp.asarray(norms, jnp.float32))
    assert np.mean(norms <= float(limit)) == pytest.approx(quantile, abs=0.04)


def test_adaptive_limit_is_the_papers():
    for limit, b, gamma, eta in ((0.1, 0.7, 0.5, 0.2), (3.0, 0.0, 0.9, 0.1)):
        assert float(adapt_limit(limit, b, gamma, eta)) == pytest.approx(limit * np.exp(-eta * (b - gamma)))
    groups = adapt_limit({"a": 1.0, "b": 2.0}, {"a": 1.5, "b": -0.5})  # a noisy fraction is clamped to [0, 1]
    assert float(groups["a"]) == pytest.approx(np.exp(-0.1)) and float(groups["b"]) == pytest.approx(2 * np.exp(0.1))


def test_budgets_add_up():
    params = {"a": jnp.zeros((3, 4)), "b": {"c": jnp.zeros(5), "d": jnp.zeros(1)}}
    for budget in (split_budget(2.0, params), split_budget_by_size(2.0, params), split_budget(2.0, {"a": 0, "b": 0})):
        assert sum(x**2 for x in jax.tree.leaves(budget)) == pytest.approx(4.0)
    assert len(set(jax.tree.leaves(split_budget(2.0, params)))) == 1
    assert split_budget_by_size(2.0, params)["a"] == pytest.approx(2 * (12 / 18) ** 0.5)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("noise_multiplier", -1), ("noise_multiplier", np.nan), ("max_norm", 0.0), ("max_norm", None), ("batch_size", 0)],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=rf"add_gaussian_noise\({argument}="):
        add_gaussian_noise(**{"noise_multiplier": 1.0, "max_norm": 1.0, "batch_size": 1, "key": 0, argument: value})


@pytest.mark.parametrize("seed", [np.int64(3), jnp.int32(3), jax.random.key(3)])
def test_any_integer_makes_a_key(seed):
    made, plain = (add_gaussian_noise(1.0, 1.0, 1.0, key).init({}).key for key in (seed, 3))
    np.testing.assert_array_equal(jax.random.key_data(made), jax.random.key_data(plain))


def test_patterns_are_to_be_made_a_tree():
    limits = optclip.by_path({"bias": 0.1}, 1.0)
    for make in (
        lambda: per_example.add_gaussian_noise(1.0, limits, 1, key=0),
        lambda: per_example.clipped_value_and_grad(lambda p, b: 0.0, limits),
    ):
        with pytest.raises(TypeError, match=r"max_norm must be a tree here: pass by_path\(...\)\(params\)"):
            make()
