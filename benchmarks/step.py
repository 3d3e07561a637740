"""What does a clipper add to a real training step, in time, in compile time and in memory?

A transformer, a convolutional and a recurrent network of Flax, with adamw, one jitted step with donated state; each
with every clipper and without.

Typical answer: nothing that can be told from the noise.

    python -m benchmarks.step
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import optclip
from benchmarks._harness import ON_CPU, arguments, build, interleave, save, show


class Transformer(nn.Module):
    width: int = 128
    layers: int = 4

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(512, self.width)(tokens)
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(10)(x.mean(1))


class Convolutional(nn.Module):
    width: int = 32

    @nn.compact
    def __call__(self, x):
        for scale in (1, 2, 4):
            x = nn.relu(nn.GroupNorm(num_groups=4)(nn.Conv(scale * self.width, (3, 3), strides=2)(x)))
        return nn.Dense(10)(x.mean((1, 2)))


class Recurrent(nn.Module):
    width: int = 128

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.RNN(nn.LSTMCell(self.width))(x)[:, -1])


def models(quick: bool):
    """Networks and inputs; on a GPU wide enough that it has something to do."""
    n, length = (2, 64) if quick else (16, 64) if ON_CPU else (64, 256)
    nets = Transformer(), Convolutional(), Recurrent()
    if quick:
        nets = Transformer(16, 1), Convolutional(4), Recurrent(8)
    elif not ON_CPU:
        nets = Transformer(768, 6), Convolutional(128), Recurrent(512)
    key = jax.random.key(0)
    inputs = (
        jax.random.randint(key, (n, length), 0, 512),
        jax.random.normal(key, (n, 32, 32, 3)),
        jax.random.normal(key, (n, 64, 16)),
    )
    names = "transformer", "convolutional", "recurrent"
    return {name: pair for name, *pair in zip(names, nets, inputs, strict=True)}


CLIPPERS = {
    "none": optax.identity,
    "optax clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "optclip clip_by_global_norm": lambda: optclip.clip_by_global_norm(1.0),
    "optclip clip": lambda: optclip.clip(0.01),
    "optax adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.01),
    "optclip adaptive_grad_clip": lambda: optclip.adaptive_grad_clip(0.01),
    "optclip zclip": optclip.zclip,
    "optclip adagc": optclip.adagc,
    "optclip autoclip": optclip.autoclip,
}


def measure(model, x, rounds):
    params = jax.jit(model.init)(jax.random.key(1), x)
    labels = jnp.arange(x.shape[0]) % 10
    calls, compiler = {}, {}
    for name, make in CLIPPERS.items():
        tx = optax.chain(make(), optax.adamw(1e-4))

        def step(params, state, tx=tx):
            def loss(p):
                return optax.softmax_cross_entropy_with_integer_labels(model.apply(p, x), labels).mean()

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        program, compiler[name] = build(step, params, state, donate=(0, 1), carry=2)
        carried = [jax.tree.map(jnp.array, params), state]

        def call(program=program, carried=carried):
            carried[:] = program(*carried)
            return carried

        calls[name] = call
    rows = interleave(calls, "none", rounds)
    base = compiler["none"]
    for name, numbers in compiler.items():
        rows[name] |= numbers
        rows[name]["compile ratio"] = numbers["trace + compile s"] / base["trace + compile s"]
        rows[name]["temp ratio"] = numbers["temp bytes"] / base["temp bytes"]
    return rows


def main() -> None:
    args = arguments(__doc__)
    result = {}
    for title, (model, x) in models(args.quick).items():
        result[title] = measure(model, x, args.rounds)
        show(title, result[title], ["ms", "ratio", "compile ratio", "temp ratio", "fusions"])
        save("step", result, args)  # what there is so far


if __name__ == "__main__":
    main()
