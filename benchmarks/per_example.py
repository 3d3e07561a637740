"""What does clipping every example's gradient before the mean cost, in time and in memory, over an ordinary gradient?

Networks of Flax at batch sizes 16 to 256: `per_example.clipped_value_and_grad` and `value_and_norms` beside a plain
``jax.value_and_grad``, ``vmap(grad)`` with a clip by hand, optax's `per_example_global_norm_clip` and, where it is
installed, jax_privacy's ``clipped_grad``. "memory" is arguments, results and scratch space of the compiled program.
Methods that would write more than 2 GiB of per-example gradients are left out, and named. Where torch and Opacus are
installed, "opacus ghost / torch backward" is Opacus's ghost clipping over torch's backward of the same network in
torch; all other ratios are to JAX's plain gradient.

Typical answer: see ``results/``; on a CPU, ``vmap(grad)`` costs far more on networks with many parameters per example,
and about as much on small convolutional ones.

    python -m benchmarks.per_example
"""

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks._harness import arguments, build, interleave, save, show
from optclip import per_example

GIB = 2.0  # of per-example gradients, at most
BATCHES, QUICK_BATCHES = (16, 64, 256), (4,)


class Dense(nn.Module):
    width: int = 1024

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


class Convolutional(nn.Module):
    width: int = 32

    @nn.compact
    def __call__(self, x):
        for scale, stride in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 1)):
            x = nn.Conv(scale * self.width, (3, 3), strides=stride)(x)
            x = nn.relu(nn.GroupNorm(num_groups=4)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class Residual(nn.Module):
    width: int = 32

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3))(x)
        for scale in (1, 2, 4):
            y = nn.relu(nn.GroupNorm(num_groups=4)(x))
            y = nn.Conv(scale * self.width, (3, 3), strides=scale)(y)
            y = nn.Conv(scale * self.width, (3, 3))(nn.relu(nn.GroupNorm(num_groups=4)(y)))
            x = nn.Conv(scale * self.width, (1, 1), strides=scale)(x) + y
        return nn.Dense(10)(x.mean((1, 2)))


class Recurrent(nn.Module):
    width: int = 256

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.RNN(nn.LSTMCell(self.width))(x)[:, -1])


class Block(nn.Module):
    heads: int = 4

    @nn.compact
    def __call__(self, x, _=None):
        width = x.shape[-1]
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))), None


class Language(nn.Module):
    """A transformer; ``stack`` says how its layers are laid out, ``tied`` whether the head is the embedding."""

    width: int = 256
    layers: int = 4
    vocabulary: int = 4096
    tied: bool = False
    stack: str = "plain"

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(self.vocabulary, self.width)
        x = embed(ids)
        if self.stack == "plain":
            for _ in range(self.layers):
                x, _ = Block()(x)
        else:
            block = nn.remat(Block, prevent_cse=False) if self.stack == "checkpointed" else Block
            scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
            x, _ = scanned()(x, None)
        x = nn.LayerNorm()(x)
        return embed.attend(x) if self.tied else nn.Dense(self.vocabulary, use_bias=False)(x)


def models(quick: bool) -> dict[str, tuple[nn.Module, Callable[[int], jax.Array]]]:
    """Networks, and their inputs for a batch size."""
    key = jax.random.key(0)
    normal = lambda *shape: lambda n: jax.random.normal(key, (n, *shape))
    tokens = lambda length, size: lambda n: jax.random.randint(key, (n, length), 0, size)
    if quick:
        language, words = partial(Language, 16, 2, 32), tokens(8, 32)
        return {
            "MLP": (Dense(16), normal(8)), "CNN": (Convolutional(4), normal(8, 8, 3)),
            "ResNet": (Residual(4), normal(8, 8, 3)), "LSTM": (Recurrent(8), normal(6, 4)),
            "transformer": (language(), words), "transformer, tied": (language(tied=True), words),
            "transformer, scanned": (language(stack="scanned"), words),
            "transformer, checkpointed": (language(stack="checkpointed"), words),
        }  # fmt: skip
    words = tokens(64, 4096)
    return {
        "MLP": (Dense(), normal(784)),
        "CNN": (Convolutional(), normal(32, 32, 3)),
        "ResNet": (Residual(), normal(32, 32, 3)),
        "LSTM": (Recurrent(), normal(64, 64)),
        "transformer": (Language(), words),
        "transformer, tied": (Language(tied=True), words),
        "transformer, scanned": (Language(stack="scanned"), words),
        "transformer, checkpointed": (Language(stack="checkpointed"), words),
    }


@cache
def peer(module: str) -> Any:
    """An optional peer, or None: what it lacks is said, once."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(f"left out, {error.name} is not installed: {module}")
        return None


def methods(loss_fn: Callable) -> dict[str, Callable]:
    """Each maps (params, batch) to a gradient, or to norms."""
    single = lambda params, example: loss_fn(params, jax.tree.map(lambda x: x[None], example))
    each = jax.vmap(jax.value_and_grad(single), (None, 0))

    def by_hand(params, batch):
        losses, grads = each(params, batch)
        squares = sum(jnp.sum(jnp.square(g), range(1, g.ndim)) for g in jax.tree.leaves(grads))
        coefs = jnp.minimum(1, 1 / jnp.sqrt(squares)) / losses.size
        return losses, jax.tree.map(lambda g: jnp.tensordot(coefs, g, 1), grads)

    def by_optax(params, batch):
        losses, grads = each(params, batch)
        leaves, treedef = jax.tree.flatten(grads)
        return losses, treedef.unflatten(optax.per_example_global_norm_clip(leaves, 1.0)[0])

    out = {
        "plain gradient": jax.value_and_grad(loss_fn),
        "optclip": per_example.clipped_value_and_grad(loss_fn, 1.0),
        "optclip, norms only": per_example.value_and_norms(loss_fn),
        "vmap(grad)": by_hand,
        "optax": by_optax,
    }
    privacy = peer("jax_privacy.clipping")
    if privacy is None:
        return out

    def by_privacy(params, batch, **options):  # it sums, and keeps losses to itself, unless told otherwise
        n = len(jax.tree.leaves(batch)[0])
        options |= {"l2_clip_norm": 1.0, "normalize_by": n, "return_values": True}
        return privacy.clipped_grad(loss_fn, **options)(params, batch)

    out["jax_privacy"] = by_privacy
    out["jax_privacy, microbatches of 4"] = partial(by_privacy, microbatch_size=4)
    return out


def measure(model: nn.Module, inputs: jax.Array, rounds: int) -> dict[str, dict[str, float]]:
    batch = inputs, jnp.arange(len(inputs)) % 10
    params = jax.jit(model.init)(jax.random.key(1), inputs[:1])

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        logits = model.apply(params, x)
        if logits.ndim == 3:
            logits, y = logits[:, :-1], x[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    gradients = len(inputs) * sum(x.nbytes for x in jax.tree.leaves(params)) / 2**30
    calls, rows, skipped = {}, {}, []
    for name, method in methods(loss_fn).items():
        if gradients > GIB and name in ("vmap(grad)", "optax", "jax_privacy"):
            skipped.append(name)
            continue
        program, compiler = build(method, params, batch)
        memory = program.memory_analysis()
        total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        rows[name] = compiler | {"total bytes": float(total), "flops": float(program.cost_analysis()["flops"])}
        calls[name] = partial(program, params, batch)
    if skipped:
        print(f"left out, {gradients:.1f} GiB of per-example gradients: {', '.join(skipped)}")
    base = rows["plain gradient"]
    for name, times in interleave(calls, "plain gradient", rounds).items():
        rows[name] |= times
        for ratio, of in (("memory", "total bytes"), ("temp", "temp bytes"), ("FLOPs", "flops")):
            rows[name][f"{ratio} ratio"] = rows[name][of] / base[of]
        rows[name]["compile ratio"] = rows[name]["trace + compile s"] / base["trace + compile s"]
    return rows


def main() -> None:
    args = arguments(__doc__, batches=BATCHES)
    result: dict[str, Any] = {}
    torch = peer("benchmarks._torch_per_example")
    for title, (model, inputs) in models(args.quick).items():
        for n in QUICK_BATCHES if args.quick else args.batches:
            name = f"{title}, batch {n}"
            result[name] = measure(model, inputs(n), args.rounds)
            result[name] |= torch.measure(title, model, inputs(n), args.rounds) if torch else {}
            show(name, result[name], ["ratio", "ratio 25%", "ratio 75%", "memory ratio", "FLOPs ratio"])
        save("per_example", result, args, peers=("flax", "jax_privacy", "torch", "opacus"))  # what there is so far


if __name__ == "__main__":
    main()
