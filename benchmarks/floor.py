"""How far is each clipper from its physical floor, one read of the gradient?

On the shapes of GPT-2 (148 leaves), with donated buffers: the standalone clip against optax's (and torch's, where it is
installed), and a clip in front of adamw against adamw alone plus one read of the gradient.

Typical answer: the clip in front of adamw costs its floor; standalone it is as fast as optax's on a CPU, and twice as
fast on a GPU, where it is a tenth of the kernels.

    python -m benchmarks.floor
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip
from benchmarks._harness import (
    ON_CPU,
    STEPS,
    arguments,
    build,
    build_all,
    gpt2_shapes,
    interleave,
    random_tree,
    save,
    show,
)


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
    write, _ = build(lambda x: (-x,), flat, donate=(0,), carry=1)
    loop = Loop(write, jnp.array(flat))
    return interleave({"read": lambda: read(flat), "read and write": loop}, "read", rounds)


def clippers(few: bool):
    found = {
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
    return dict(list(found.items())[:2]) if few else found


def standalone(shapes, dtype, rounds, few=False):
    """Each clipper alone: donated gradients in, clipped ones out, always clipping a little."""
    tree, params = random_tree(shapes, dtype), random_tree(shapes, dtype, seed=1)
    makers, starts = {}, {}
    for name, (make, relative) in clippers(few).items():
        state = make(1.0).init(params)

        def clip(g, s, limit, params, make=make, peer=name.startswith("optax")):
            # optax takes a limit in the dtype of the leaves only
            updates, s = make(limit.astype(dtype) if peer else limit).update(g, s, params)
            return updates, s, limit * 0.999  # the limit falls with every call, so every call clips

        start = 0.5 if relative else 1e-4 if name.endswith(" clip") or "inf" in name or "rms" in name else 0.5
        limit = jnp.float32(start)
        makers[name] = partial(build, clip, tree, state, limit, params, donate=(0, 1), carry=3)
        starts[name] = state, limit
    norms = {
        "norm, ord=2": partial(build, lambda g: optclip.global_norm(g), tree),
        "norm, ord=inf": partial(build, lambda g: optclip.global_norm(g, jnp.inf), tree),
        "optax global_norm": partial(build, lambda g: optax.tree.norm(g), tree),
    }
    built = build_all(makers | norms)
    calls = {name: (lambda p=built[name][0]: p(tree)) for name in norms}
    for name, (state, limit) in starts.items():
        program = built[name][0]
        calls[name] = Loop(
            lambda g, s, c, program=program: program(g, s, c, params),
            [jnp.array(x) for x in tree],
            jax.tree.map(jnp.array, state),
            limit,
        )
    torch_clip = torch_foreach(shapes) if dtype == jnp.float32 else None
    if torch_clip is not None:
        calls["torch clip_grad_norm_ (foreach)"] = torch_clip
    rows = interleave(calls, "optax clip_by_global_norm", rounds)
    for name, (_, numbers) in built.items():
        rows[name] |= numbers | {"temp / gradient": numbers["temp bytes"] / sum(x.nbytes for x in tree)}
    return rows


def torch_foreach(shapes):
    """torch's clip on the same shapes, or None where torch is not installed or cannot use the device."""
    try:
        import torch
    except ImportError:
        return None
    device = "cpu" if ON_CPU else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        return None
    parameters = [torch.nn.Parameter(torch.zeros(s, device=device)) for s in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-3
    limit = [0.5]

    def call():
        for _ in range(STEPS):
            limit[0] *= 0.999
            torch.nn.utils.clip_grad_norm_(parameters, limit[0], foreach=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return np.zeros(())

    return call


def with_adamw(shapes, dtype, rounds, few=False):
    """One jitted step with donated parameters and state: adamw alone, and behind each clip."""
    tree = random_tree(shapes, dtype)
    makers, starts = {}, {}
    heads = {
        "adamw": optax.identity(),
        "optax clip_by_global_norm + adamw": optax.clip_by_global_norm(0.5),
        "optclip clip_by_global_norm + adamw": optclip.clip_by_global_norm(0.5),
        "optclip adaptive_grad_clip + adamw": optclip.adaptive_grad_clip(0.01),
        "optax adaptive_grad_clip + adamw": optax.adaptive_grad_clip(0.01),
    }
    for name, head in list(heads.items())[: 3 if few else None]:
        tx = optax.chain(head, optax.adamw(1e-5))
        params = random_tree(shapes, dtype, seed=1)
        starts[name] = params, tx.init(params)

        def step(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        makers[name] = partial(build, step, *starts[name], tree, donate=(0, 1), carry=2)
    built, calls = build_all(makers), {}
    for name, (program, _) in built.items():
        calls[name] = Loop(lambda p, s, program=program: program(p, s, tree), *starts.pop(name))
    read, flat = one_read(tree)
    calls["one read"] = lambda: read(flat)
    rows = interleave(calls, "adamw", rounds)
    rounds_of = lambda name: np.array(rows[name]["ms by round"])
    floor = rounds_of("adamw") + rounds_of("one read")
    for name, (_, numbers) in built.items():
        rows[name] |= numbers | {"of floor": float(np.median(rounds_of(name) / floor))}
    return rows


def main() -> None:
    args = arguments(__doc__)
    small = gpt2_shapes(32, 2, 64, 16)
    sizes = {"GPT-2 124M": small if args.quick else gpt2_shapes()}
    if not ON_CPU and not args.quick:
        sizes["GPT-2 1.5B"] = gpt2_shapes(1600, 48)
    result = {}
    for title, shapes in sizes.items():
        few = title == "GPT-2 1.5B"  # the global norm in float32 only: 580 leaves take long to compile
        for dtype in (jnp.float32,) if few else (jnp.float32, jnp.bfloat16):
            key = f"{title}, {jnp.dtype(dtype).name}"
            result[key] = {
                "memory": reads(random_tree(shapes, dtype), args.rounds),
                "standalone": standalone(shapes, dtype, args.rounds, few),
                "with adamw": with_adamw(shapes, dtype, args.rounds, few),
            }
            show(f"{key}: memory", result[key]["memory"], ["ms", "ratio"])
            show(
                f"{key}: standalone",
                result[key]["standalone"],
                ["ms", "ratio", "bytes", "fusions", "compile s", "temp / gradient"],
            )
            show(f"{key}: with adamw", result[key]["with adamw"], ["ms", "ratio", "of floor", "compile s"])
            save("floor", result, args)  # what there is so far


if __name__ == "__main__":
    main()
