"""Runs every benchmark on this machine, one after the other, each in a process of its own.

python -m benchmarks.run_all            # a quarter of an hour on two cores
python -m benchmarks.run_all --quick    # does everything run?
"""

import subprocess
import sys

ALL = ["floor", "step", "leaves", "methods", "mesh", "per_example"]


def main() -> None:
    for name in ALL:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
