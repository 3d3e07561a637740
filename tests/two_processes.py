"""One of the processes that `test_two_processes.py` starts: trains a small Flax model and saves what it saw.

    python two_processes.py OUT.npz --processes 2 --index 0 --port 1234

With one process it has all four devices; with two, each has two of them.
"""

import argparse
import os

STEPS = 20
BAD_ROW, BAD_ELEMENT = 7, 12  # steps in which one process alone holds a NaN: in its data, in its part of the gradient


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // args.processes}"

    import jax

    jax.config.update("jax_threefry_partitionable", True)
    if args.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{args.port}", args.processes, args.index, initialization_timeout=60)
    import numpy as np

    found = {}
    for layout in ("data", "model"):
        found |= {f"{layout}/{k}": v for k, v in train(layout).items()}
    np.savez(args.out, **found)
    if args.processes > 1:
        jax.distributed.shutdown()


def train(across: str) -> dict:
    """Trains on a mesh of 2 x 2 devices whose axis ``across`` lies across the processes."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import optclip

    devices = np.array(jax.devices()).reshape(2, 2)
    mesh = Mesh(devices if across == "data" else devices.T, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.tanh(nn.Dense(16, kernel_init=split(None, "model"), bias_init=split("model", init=zeros))(x))
            return nn.Dense(4, kernel_init=split("model", None))(h)

    init, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros
    split = lambda *names, init=init: nn.with_partitioning(init, names)
    tx = optclip.skip_spikes(
        optax.chain(optclip.clip_by_global_norm(0.5), optax.adam(0.05)), optclip.thresholds.fixed(50.0)
    )

    def start():
        variables = Model().init(jax.random.key(0), jnp.ones((1, 8)))
        return variables, tx.init(variables)

    specs = nn.get_partition_spec(jax.eval_shape(start))
    params, state = jax.jit(start, out_shardings=jax.tree.map(lambda s: NamedSharding(mesh, s), specs))()

    @jax.jit
    def step(params, state, x, y, poison):
        grads = jax.grad(lambda p: jnp.mean((Model().apply(p, x) - y) ** 2))(params)
        grads = jax.tree.map(lambda g: g.at[(0,) * g.ndim].add(poison), grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    batch = NamedSharding(mesh, P("data"))
    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, 4)).astype(np.float32)
    norms, skipped = [], []
    for i in range(STEPS):
        x = rng.normal(size=(16, 8)).astype(np.float32)
        y = np.sin(x @ w)
        if i == BAD_ROW:
            y[0, 0] = np.nan
        shard = lambda a: jax.make_array_from_callback(a.shape, batch, lambda index, a=a: a[index])
        poison = np.float32(np.nan if i == BAD_ELEMENT else 0)
        params, state = step(params, state, shard(x), shard(y), poison)
        norms.append(local(state.norm.stats.sizes))
        skipped.append(local(state.total))
    whole = jax.jit(lambda t: t, out_shardings=NamedSharding(mesh, P()))(nn.unbox(params))
    leaves = {jax.tree_util.keystr(p): local(x) for p, x in jax.tree.leaves_with_path(whole)}
    return {"norms": np.array(norms), "skipped": np.array(skipped), **leaves}


def local(x):
    """The value of a replicated array, from this process's own copy."""
    import numpy as np

    return np.asarray(x.addressable_data(0))


if __name__ == "__main__":
    main()
