"""Does clipping give the same numbers on a mesh as on one device?

A small transformer learns to continue sequences, first on one device and then on a mesh of data x model devices: the
batch is split along the first axis, attention heads and hidden units along the second. Nothing about the optimizer
changes; the clipper and the guard see whole arrays.

Typical answer: yes; over 30 steps the two columns of gradient norms agree to 5e-6, which is the rounding of sums in
another order, and both runs skip the one broken batch.

    python examples/sharded.py                  # half a minute on a laptop, whose CPU plays 4 devices (2 x 2)
    python examples/sharded.py --model 2        # on a machine with 8 GPUs: 4 x 2 of them
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"  # CPU only

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import optclip

WORDS, WIDTH, HEADS, LENGTH = 64, 64, 4, 32
BROKEN = 10  # the step whose batch holds a NaN


def split(*axes: str | None) -> Any:
    """Says along which mesh axes a kernel is sharded."""
    return nn.with_partitioning(nn.initializers.lecun_normal(), axes)


class Block(nn.Module):
    """Attention and a perceptron, each split over the model axis in its middle."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm()(x)
        into = {"features": (HEADS, WIDTH // HEADS), "kernel_init": split(None, "model", None)}
        y = jax.nn.dot_product_attention(*(nn.DenseGeneral(**into, name=n)(y) for n in "qkv"), is_causal=True)
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), kernel_init=split("model", None, None), name="attention_out")(y)
        y = nn.gelu(nn.Dense(4 * WIDTH, kernel_init=split(None, "model"))(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, kernel_init=split("model", None))(y)


class Transformer(nn.Module):
    """Two blocks between an embedding and its transpose."""

    @nn.compact
    def __call__(self, words: jax.Array, scale: jax.Array) -> jax.Array:
        embed = nn.Embed(WORDS, WIDTH, embedding_init=split(None, "model"))
        x = embed(words) * scale
        for _ in range(2):
            x = Block()(x)
        return embed.attend(nn.LayerNorm()(x))


def batch(step: int) -> np.ndarray:
    """Sequences that count on by a step of their own."""
    start, stride = np.random.default_rng(step).integers(1, WORDS, (2, 32, 1))
    return ((start + stride * np.arange(LENGTH + 1)) % WORDS).astype(np.int32)


def train(mesh: Mesh, steps: int) -> tuple[np.ndarray, int]:
    """The gradient norm of each step, and how many were skipped."""
    model = Transformer()
    tx = optclip.skip_nonfinite(optax.chain(optclip.clip_by_global_norm(1.0), optax.adamw(3e-3)))

    def start() -> Any:
        params = model.init(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32), jnp.ones(()))
        return params, tx.init(params)

    specs = nn.get_partition_spec(jax.eval_shape(start))
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)

    @partial(jax.jit, out_shardings=(*shardings, None))
    def step(params: Any, state: Any, words: jax.Array, scale: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = model.apply(params, words[:, :-1], scale)
            return optax.softmax_cross_entropy_with_integer_labels(logits, words[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state = jax.jit(start, out_shardings=shardings)()
    norms = []
    with tqdm(range(steps), desc=f"{mesh.size} device(s)") as bar:
        for i in bar:
            words = jax.device_put(batch(i), NamedSharding(mesh, P("data")))
            params, state, value = step(params, state, words, np.float32(np.nan if i == BROKEN else 1))
            said = optclip.summary(state)
            norms.append(float(said["clip/preclip_norm"]))
            bar.set_postfix(loss=f"{float(value):.3f}", norm=f"{norms[-1]:.3f}")
    return np.array(norms), int(state.total)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--model", type=int, default=2, help="devices along the model axis; the others split the batch")
    args = parser.parse_args(argv)
    devices = np.array(jax.devices())
    auto = {"axis_names": ("data", "model"), "axis_types": (AxisType.Auto, AxisType.Auto)}
    single, skipped = train(Mesh(devices[:1].reshape(1, 1), **auto), args.steps)
    sharded, skipped_too = train(Mesh(devices.reshape(-1, args.model), **auto), args.steps)
    print(f"\n step   norm on 1 device   norm on {devices.size} devices")
    for i in range(0, args.steps, max(args.steps // 10, 1)):
        print(f"{i:5d} {single[i]:18.6f} {sharded[i]:19.6f}")
    difference = np.nanmax(np.abs(sharded / single - 1))
    same = difference < 1e-3 and skipped == skipped_too and np.array_equal(np.isnan(single), np.isnan(sharded))
    print(f"\nlargest relative difference of the norms: {difference:.1e}; steps skipped: {skipped} and {skipped_too}")
    print("the numbers are the same" if same else "THE NUMBERS DIFFER")


if __name__ == "__main__":
    main()
