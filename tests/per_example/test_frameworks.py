"""Models of every framework, as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optclip import per_example as pe

from .test_exact import compare

IDS = jnp.asarray(np.random.RandomState(0).randint(0, 50, (4, 6)))
IMAGES = jnp.asarray(np.random.RandomState(0).randn(4, 8, 8, 3), jnp.float32)


def cross_entropy(logits, ids):
    return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, ids[..., None], -1)[..., 0])


@pytest.mark.parametrize(
    "scan, remat, tied", [(False, False, False), (True, True, True), (True, False, False), (False, True, True)]
)
def test_linen_transformer(scan, remat, tied):
    import flax.linen as nn

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(2)(h, mask=nn.make_causal_mask(jnp.ones(x.shape[:2])))
            return x + nn.Dense(8)(nn.gelu(nn.Dense(24)(nn.RMSNorm()(x)))), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(50, 8)
            x, layer = embed(ids), Layer
            if remat:
                layer = nn.remat(layer, prevent_cse=not scan)
            if scan:
                stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
                x, _ = stack()(x, None)
            else:
                x, _ = layer()(layer()(x, None)[0], None)
            return embed.attend(x) if tied else nn.Dense(50)(x)

    model = Model()
    params = model.init(jax.random.key(0), IDS)
    compare(lambda p, ids: cross_entropy(model.apply(p, ids), ids), params, IDS, 2e-5)


@pytest.mark.slow
def test_linen_convolutions_and_dropout():
    import flax.linen as nn

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.GroupNorm(2)(nn.Conv(8, (3, 3), strides=2)(x)))
            x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=4)(x))
            x = nn.Dropout(0.5, deterministic=not train)(nn.avg_pool(x, (2, 2)))
            return nn.Dense(5)(x.reshape(x.shape[0], -1))

    model = Model()
    params = model.init(jax.random.key(0), IMAGES, False)
    compare(lambda p, x: jnp.mean(model.apply(p, x, False) ** 2), params, IMAGES, 1e-5)

    def loss(p, x, key):
        return jnp.mean(model.apply(p, x, True, rngs={"dropout": key}) ** 2)

    (_, seen), _ = pe.clipped_value_and_grad(loss, 1.0, key_argnums=2)(
        params, IMAGES[:1].repeat(4, 0), jax.random.key(0)
    )
    assert len(np.unique(seen.losses)) == 4  # the same image, four masks


@pytest.mark.slow
def test_linen_lstm():
    import flax.linen as nn

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.RNN(nn.OptimizedLSTMCell(8))(nn.Embed(50, 6)(ids))
            return nn.Dense(50)(nn.RNN(nn.GRUCell(8))(x))

    model = Model()
    params = model.init(jax.random.key(0), IDS)
    compare(lambda p, ids: cross_entropy(model.apply(p, ids), ids), params, IDS, 1e-5)


def test_nnx():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.last = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.norm(self.first(x))).mean((1, 2)))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    compare(lambda p, x: jnp.mean(nnx.merge(graph, p, rest)(x) ** 2), params, IMAGES, 1e-5)


def test_equinox():
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 3)
    model = {
        "mlp": eqx.nn.MLP(3, 4, 8, 2, key=keys[0]),
        "attention": eqx.nn.MultiheadAttention(2, 4, key=keys[1]),
        "norm": eqx.nn.LayerNorm(4),
    }
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x):
        model = eqx.combine(params, static)

        def one(x):
            h = jax.vmap(model["norm"])(jax.vmap(model["mlp"])(x.reshape(-1, 3)))
            return model["attention"](h, h, h)

        return jnp.mean(jax.vmap(one)(x) ** 2)

    compare(loss, params, IMAGES[:, :2], 1e-5)


def test_haiku():
    import haiku as hk

    def forward(ids):
        h = hk.Embed(50, 8)(ids)
        h = hk.MultiHeadAttention(2, 4, model_size=8, w_init=hk.initializers.VarianceScaling(1.0))(h, h, h)
        return hk.Linear(50)(hk.LayerNorm(-1, True, True)(h))

    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), IDS)
    compare(lambda p, ids: cross_entropy(model.apply(p, ids), ids), params, IDS, 1e-5)
