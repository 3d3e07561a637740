"""How many collectives does a global norm cost on a mesh, and how long does it take?

Sharded gradients on four devices (host devices on a CPU), under jit with NamedSharding and under shard_map.

Typical answer: one all-reduce, however many leaves.

    python -m benchmarks.mesh
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip
from benchmarks._harness import arguments, build, interleave, random_tree, save, show


def main() -> None:
    args = arguments(__doc__)
    n = min(4, jax.device_count())
    mesh = jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    result = {}
    for count in (4, 10) if args.quick else (10, 100, 1000):
        tree = random_tree([(64, 32)] * count)
        sharded = jax.device_put(tree, NamedSharding(mesh, P("data")))
        ours, peer = optclip.clip_by_global_norm(1e-3), optax.clip_by_global_norm(1e-3)
        local = jax.shard_map(
            lambda g: ours.update(g, ours.init(g))[0], mesh=mesh, in_specs=P("data"), out_specs=P("data")
        )
        functions = {
            "optax, jit": lambda g: peer.update(g, peer.init(g))[0],
            "optclip, jit": lambda g: ours.update(g, ours.init(g))[0],
            "optclip, shard_map": local,
        }
        with jax.set_mesh(mesh):
            built = {name: build(f, sharded) for name, f in functions.items()}
            calls = {name: lambda p=program: p(sharded) for name, (program, _) in built.items()}
            rows = interleave(calls, "optax, jit", args.rounds)
        for name, (_, numbers) in built.items():
            rows[name] |= numbers
        result[f"{count} leaves on {n} devices"] = rows
        show(f"{count} leaves on {n} devices", rows, ["ms", "ratio", "all-reduces", "compile s"])
    save("mesh", result, args)


if __name__ == "__main__":
    main()
