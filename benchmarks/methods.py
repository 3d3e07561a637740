"""What does each method cost, against the static global norm?

Every public transformation of the table of cases that takes a plain gradient, on a transformer-like tree, jitted.

Typical answer on a CPU: one size for all leaves costs what the static clip costs; a size per leaf up to 1.4 times that;
a memory per element reads and writes that memory besides.

    python -m benchmarks.methods
"""

from functools import partial

import jax

from benchmarks._harness import arguments, build, build_all, gpt2_shapes, interleave, random_tree, save, show
from tests.cases import CASES


def main() -> None:
    args = arguments(__doc__)
    tree = random_tree(gpt2_shapes(32, 2, 64, 16) if args.quick else gpt2_shapes(256, 6, 8192, 256))
    makers, states = {}, {}
    for case in CASES:
        tx = case.make()
        states[case.name] = tx.init(tree)

        def update(s, g, tx=tx):
            return tx.update(g, s, g, value=0.0)[::-1]

        makers[case.name] = partial(build, update, states[case.name], tree, donate=(0,), carry=1)
    built, calls = build_all(makers), {}
    for name, (program, _) in built.items():
        carried = [jax.tree.map(lambda x: x.copy() if hasattr(x, "copy") else x, states[name])]

        def call(program=program, carried=carried):
            carried[0], updates = program(carried[0], tree)
            return updates

        calls[name] = call
    rows = interleave(calls, "clip_by_global_norm", args.rounds)
    for name, (_, numbers) in built.items():
        rows[name] |= numbers | {"bytes ratio": numbers["bytes"] / built["clip_by_global_norm"][1]["bytes"]}
    show("every method", rows, ["ms", "ratio", "bytes ratio", "fusions", "compile s"])
    save("methods", {"every method": rows}, args)


if __name__ == "__main__":
    main()
