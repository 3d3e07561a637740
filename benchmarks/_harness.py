"""What the benchmarks share: shapes, interleaved timing, compiler numbers, and the result file.

Every comparison runs in one process, A B A B ..., and is reported as the median of the per-round ratios to a baseline;
absolute times are kept for the record and quoted only from a GPU.

On a GPU one call is STEPS steps in a row, a loop in the program: to hand over and take back a few hundred arrays keeps
the host busy for half a millisecond, longer than the GPU needs for a clip. (In a training loop the host is ahead.) The
steps are all made: XLA:GPU moves nothing out of such a loop.
"""

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip

RESULTS = pathlib.Path(__file__).parent / "results"
ON_CPU = jax.default_backend() == "cpu"
STEPS = 1 if ON_CPU else 20


def arguments(doc: str | None, **lists: tuple[int, ...]) -> argparse.Namespace:
    """The command line; each of ``lists`` is one more flag that takes several numbers."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds: does it run?")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    for name, default in lists.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    args = parser.parse_args()
    if args.quick:
        args.rounds = 2
    return args


def gpt2_shapes(width: int = 768, layers: int = 12, vocabulary: int = 50257, context: int = 1024) -> list[tuple]:
    """The 148 leaves of GPT-2 (124M parameters at the defaults; 1.56B at width 1600 and 48 layers)."""
    d = width
    layer = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(vocabulary, d), (context, d), *(layer * layers), (d,), (d,)]


def random_tree(shapes: list[tuple], dtype: Any = jnp.float32, seed: int = 0) -> list[jax.Array]:
    """Normal numbers of size 1e-3, as gradients are."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    make = jax.jit(lambda key, shape: 1e-3 * jax.random.normal(key, shape, dtype), static_argnums=1)
    return [make(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def build(function: Callable, *args: Any, donate: tuple[int, ...] = (), carry: int = 0) -> tuple[Any, dict[str, float]]:
    """Compiles; returns the program and what the compiler says of it.

    The first ``carry`` results are the first arguments of the next step.
    """
    start = time.perf_counter()
    lowered = jax.jit(function if STEPS == 1 else _steps(function, carry), donate_argnums=donate).lower(*args)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    cost, memory, text = program.cost_analysis() or {}, program.memory_analysis(), program.as_text()
    return program, {
        "trace s": traced - start,
        "compile s": done - traced,
        "trace + compile s": done - start,
        "bytes": float(cost.get("bytes accessed", float("nan"))),
        "temp bytes": float(getattr(memory, "temp_size_in_bytes", float("nan"))),
        "fusions": text.count(" fusion("),
        "all-reduces": text.count(" all-reduce(") + text.count(" all-reduce-start("),
    }


def _steps(function: Callable, carry: int) -> Callable:
    """``function``, STEPS times in a row."""

    def turn(state: Any, rest: Any) -> Any:
        out = function(*state, *rest)
        return (out[:carry], out[carry:]) if carry else ((), out)

    def many(*args: Any) -> Any:
        state, rest = args[:carry], args[carry:]
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(turn, state, rest)[1])
        state, out = jax.lax.fori_loop(0, STEPS, lambda _, c: turn(c[0], rest), (state, start))
        return (*state, *out) if carry else out

    return many


def build_all(makers: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each maker builds; side by side on a GPU's host, where compiling is most of the time."""
    with concurrent.futures.ThreadPoolExecutor(1 if ON_CPU else 8) as pool:
        return dict(zip(makers, pool.map(lambda make: make(), makers.values()), strict=True))


def interleave(
    calls: dict[str, Callable[[], Any]], baseline: str, rounds: int, steps: int = STEPS
) -> dict[str, dict[str, Any]]:
    """Times every call once a round, in an order that turns; medians, quartiles and ratios to ``baseline``, by step.

    A short call follows an untimed one of itself: else whoever comes after a call with the same data finds it in the
    cache.
    """
    short = set()
    for name, call in calls.items():  # warm up: caches, page faults
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        if time.perf_counter() - start < 0.1:
            short.add(name)
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if name in short:
                jax.block_until_ready(calls[name]())
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            times[name].append((time.perf_counter() - start) / steps)
    base = np.array(times[baseline])
    out = {}
    for name, seen in times.items():
        low, middle, high = np.percentile(np.array(seen) / base, [25, 50, 75])
        out[name] = {"ms": 1e3 * float(np.median(seen)), "ratio": middle, "ratio 25%": low, "ratio 75%": high}
        out[name]["ms by round"] = [round(1e3 * t, 4) for t in seen]
    return out


def device_name() -> str:
    """cpu, h200, tpu-v5e: the name of the result file."""
    kind = jax.devices()[0]
    if kind.platform == "cpu":
        return "cpu"
    return kind.device_kind.lower().replace("nvidia", "").strip().replace(" ", "-")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def save(section: str, result: dict[str, Any], args: argparse.Namespace, peers: tuple[str, ...] = ()) -> None:
    """Puts a section into ``results/<device>.json``, with the machine, the versions (``peers``: more) and the date."""
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{device_name()}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[section] = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind if device_name() != "cpu" else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
            "optclip": optclip.__version__,
        }
        | {name: version(name) for name in peers},
        "rounds": args.rounds,
        "quick": args.quick,
        "result": result,
    }
    path.write_text(json.dumps(known, indent=1) + "\n")
    print(f"{section}: written to {path}")


def show(title: str, rows: dict[str, dict[str, float]], columns: list[str]) -> None:
    print(f"\n{title}")
    width = max(len(name) for name in rows)
    print(" " * width, *(f"{c:>12}" for c in columns))
    for name, row in rows.items():
        print(f"{name:{width}}", *(f"{row[c]:12.3g}" if c in row else " " * 12 for c in columns), flush=True)


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
