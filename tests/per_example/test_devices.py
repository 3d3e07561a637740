"""Sharded over four devices: the same numbers, and no more reductions than an ordinary gradient needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optclip import per_example as pe
from tests.meshes import devices

from . import oracle

random = np.random.RandomState(0)
PARAMS = {
    "in": jnp.asarray(random.randn(5, 8), jnp.float32),
    "bias": jnp.zeros(8),
    "stack": jnp.asarray(random.randn(3, 8, 8), jnp.float32),
}
BATCH = jnp.asarray(random.randn(8, 4, 5), jnp.float32)


def loss_fn(params, x):
    h = jnp.tanh(x @ params["in"] + params["bias"])
    h, _ = jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), h, params["stack"])
    return jnp.mean(h**2)


f = pe.clipped_value_and_grad(loss_fn, 0.3)
(LOSS, SEEN), GRADS = f(PARAMS, BATCH)


def mesh(kind):
    return jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=devices(4))


def reductions(compiled):
    return sum(" all-reduce(" in line or " all-gather(" in line for line in compiled.as_text().splitlines())


def test_jit_with_a_sharded_batch():
    places = NamedSharding(mesh(AxisType.Auto), P()), NamedSharding(mesh(AxisType.Auto), P("data"))
    compiled = jax.jit(f, in_shardings=places).lower(PARAMS, BATCH).compile()
    plain = jax.jit(jax.value_and_grad(loss_fn), in_shardings=places).lower(PARAMS, BATCH).compile()
    (_, seen), grads = compiled(*jax.device_put((PARAMS, BATCH), places))
    assert oracle.distance([grads, seen.norms], [GRADS, SEEN.norms]) < 1e-5
    assert reductions(compiled) <= reductions(plain)


def test_sharded_parameters():
    here = mesh(AxisType.Auto)
    params = jax.device_put(
        PARAMS,
        {
            "in": NamedSharding(here, P(None, "data")),
            "bias": NamedSharding(here, P()),
            "stack": NamedSharding(here, P(None, "data")),
        },
    )
    (_, seen), grads = jax.jit(f)(params, jax.device_put(BATCH, NamedSharding(here, P("data"))))
    assert oracle.distance([grads, seen.norms], [GRADS, SEEN.norms]) < 1e-5


def test_explicit_axes():
    here = mesh(AxisType.Explicit)
    with jax.set_mesh(here):
        params, batch = (
            jax.device_put(PARAMS, NamedSharding(here, P())),
            jax.device_put(BATCH, NamedSharding(here, P("data"))),
        )
        (_, seen), grads = jax.jit(f)(params, batch)
    assert oracle.distance([grads, seen.norms], [GRADS, SEEN.norms]) < 1e-5


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("microbatch", [None, 1])
def test_shard_map(check_vma, microbatch):
    """The norms are of examples, not of their sums over devices."""
    local = pe.clipped_value_and_grad(loss_fn, 0.3, microbatch=microbatch)

    def step(params, batch):
        (_, seen), grads = local(params, batch)
        return seen.norms, jax.lax.pmean(grads, "data")

    specs = {"in_specs": (P(), P("data")), "out_specs": (P("data"), P())}
    mapped = jax.jit(jax.shard_map(step, mesh=mesh(AxisType.Auto), check_vma=check_vma, **specs))
    norms, grads = mapped(PARAMS, BATCH)
    assert oracle.distance([grads, norms], [GRADS, SEEN.norms]) < 1e-5
