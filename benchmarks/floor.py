"""How far is each clipper from its physical floor, one read of the gradient?

On the shapes of GPT-2 (148 leaves), with donated buffers: the standalone clip against optax's (and torch's, where it is
installed), and a clip in front of adamw against adamw alone plus one read of the gradient.

Typical answer on a CPU: the clip in front of adamw costs its floor; standalone it is as fast as optax's.

    python -m benchmarks.floor
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip
from benchmarks._harness import arguments, build, device_name, gpt2_shapes, interleave, random_tree, save, show


class Loop:
    """A program whose donated results are its next arguments."""

    def __init__(self, program, *state):
        self.program, self.state = program, state

    def __call__(self, *args):
        self.state = self.program(*self.state, *args)
        return self.state


def one_read(tree):
    """A program that reads as many bytes as the gradient has, in one array, and the array."""
    flat = jnp.full(sum(x.size for x in tree), 1e-3, tree[0].dtype)
    return build(lambda x: jnp.sum(jnp.square(x.astype(jnp.float32))), flat)[0], flat


def reads(tree, rounds):
    """The speed of memory: one read, and one read and write."""
    read, flat = one_read(tree)
    # A product with 0.999 would be none in bfloat16, and compiled away.
    write, _ = build(lambda x: (-x,), flat, donate=(0,))
    loop = Loop(write, jnp.array(flat))
    return interleave({"read": lambda: read(flat), "read and write": loop}, "read", rounds)


def clippers():
    return {
        "optax clip_by_global_norm": (optax.clip_by_global_norm, False),
        "optclip clip_by_global_norm": (optclip.clip_by_global_norm, False),
        "optclip clip_by_leaf_norm": (optclip.clip_by_leaf_norm, False),
        "optclip clip_by_block_rms": (optclip.clip_by_block_rms, False),
        "optclip max-norm (ord=inf)": (lambda c: optclip.clip_by_global_norm(c, jnp.inf), False),
        "optax clip": (optax.clip, False),
        "optclip clip": (optclip.clip, False),
        "optax adaptive_grad_clip": (optax.adaptive_grad_clip, True),
        "optclip adaptive_grad_clip": (optclip.adaptive_grad_clip, True),
    }


def standalone(shapes, dtype, rounds):
    """Each clipper alone: donated gradients in, clipped ones out, always clipping a little."""
    tree, params = random_tree(shapes, dtype), random_tree(shapes, dtype, seed=1)
    calls, compiler = {}, {}
    for name, (make, relative) in clippers().items():
        state = make(1.0).init(params)

        def clip(g, s, limit, params, make=make, peer=name.startswith("optax")):
            # optax takes a limit in the dtype of the leaves only
            updates, s = make(limit.astype(dtype) if peer else limit).update(g, s, params)
            return updates, s, limit * 0.999  # the limit falls with every call, so every call clips

        start = 0.5 if relative else 1e-4 if name.endswith(" clip") or "inf" in name or "rms" in name else 0.5
        limit = jnp.float32(start)
        program, compiler[name] = build(clip, tree, state, limit, params, donate=(0, 1))
        calls[name] = Loop(
            lambda g, s, c, program=program: program(g, s, c, params),
            [jnp.array(x) for x in tree],
            jax.tree.map(jnp.array, state),
            limit,
        )
    torch_clip = torch_foreach(shapes) if dtype == jnp.float32 else None
    if torch_clip is not None:
        calls["torch clip_grad_norm_ (foreach)"] = torch_clip
    norms = {
        "norm, ord=2": build(lambda g: optclip.global_norm(g), tree)[0],
        "norm, ord=inf": build(lambda g: optclip.global_norm(g, jnp.inf), tree)[0],
    }
    calls |= {name: (lambda p=program: p(tree)) for name, program in norms.items()}
    rows = interleave(calls, "optax clip_by_global_norm", rounds)
    for name, numbers in compiler.items():
        rows[name] |= numbers | {"temp / gradient": numbers["temp bytes"] / sum(x.nbytes for x in tree)}
    return rows


def torch_foreach(shapes):
    """torch's clip on the same shapes, or None where torch is not installed."""
    try:
        import torch
    except ImportError:
        return None
    parameters = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape) * 1e-3
    limit = [0.5]

    def call():
        limit[0] *= 0.999
        torch.nn.utils.clip_grad_norm_(parameters, limit[0], foreach=True)
        return np.zeros(())

    return call


def with_adamw(shapes, dtype, rounds):
    """One jitted step with donated parameters and state: adamw alone, and behind each clip."""
    tree = random_tree(shapes, dtype)
    calls, compiler = {}, {}
    heads = {
        "adamw": optax.identity(),
        "optax clip_by_global_norm + adamw": optax.clip_by_global_norm(0.5),
        "optclip clip_by_global_norm + adamw": optclip.clip_by_global_norm(0.5),
        "optclip adaptive_grad_clip + adamw": optclip.adaptive_grad_clip(0.01),
        "optax adaptive_grad_clip + adamw": optax.adaptive_grad_clip(0.01),
    }
    for name, head in heads.items():
        tx = optax.chain(head, optax.adamw(1e-5))
        params = random_tree(shapes, dtype, seed=1)

        def step(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        program, compiler[name] = build(step, params, tx.init(params), tree, donate=(0, 1))
        calls[name] = Loop(lambda p, s, program=program: program(p, s, tree), params, tx.init(params))
    read, flat = one_read(tree)
    calls["one read"] = lambda: read(flat)
    rows = interleave(calls, "adamw", rounds)
    rounds_of = lambda name: np.array(rows[name]["ms by round"])
    floor = rounds_of("adamw") + rounds_of("one read")
    for name, numbers in compiler.items():
        rows[name] |= numbers | {"of floor": float(np.median(rounds_of(name) / floor))}
    return rows


def main() -> None:
    args = arguments(__doc__)
    small = gpt2_shapes(32, 2, 64, 16)
    sizes = {"GPT-2 124M": small if args.quick else gpt2_shapes()}
    if device_name() != "cpu" and not args.quick:
        sizes["GPT-2 1.5B"] = gpt2_shapes(1600, 48)
    result = {}
    for title, shapes in sizes.items():
        for dtype in (jnp.float32, jnp.bfloat16):
            key = f"{title}, {jnp.dtype(dtype).name}"
            result[key] = {
                "memory": reads(random_tree(shapes, dtype), args.rounds),
                "standalone": standalone(shapes, dtype, args.rounds),
                "with adamw": with_adamw(shapes, dtype, args.rounds),
            }
            show(f"{key}: memory", result[key]["memory"], ["ms", "ratio"])
            show(
                f"{key}: standalone",
                result[key]["standalone"],
                ["ms", "ratio", "bytes", "fusions", "compile s", "temp / gradient"],
            )
            show(f"{key}: with adamw", result[key]["with adamw"], ["ms", "ratio", "of floor", "compile s"])
    save("floor", result, args)


if __name__ == "__main__":
    main()
