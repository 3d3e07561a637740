"""Two real processes train as one does: bit for bit, data-parallel and tensor-parallel, and skip the same steps."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.two_processes import BAD_ELEMENT, BAD_ROW, STEPS

SCRIPT = Path(__file__).with_name("two_processes.py")


def start(out: Path, *options: object) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), str(out), *map(str, options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(runs: list[subprocess.Popen], timeout: float = 300) -> list[str]:
    """The outputs of the runs that failed."""
    try:
        outputs = [run.communicate(timeout=timeout)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    return [text for run, text in zip(runs, outputs, strict=True) if run.returncode]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, np.ndarray], ...]:
    """What one process saw, and each of two."""
    files = [tmp_path_factory.mktemp("runs") / f"{name}.npz" for name in ("one", "first", "second")]
    assert not finish([start(files[0])])
    for attempt in range(3):
        port = free_port()  # another program may take it before the coordinator does
        pair = [start(files[1 + i], "--processes", 2, "--index", i, "--port", port) for i in range(2)]
        failed = finish(pair)
        if not failed:
            break
        in_use = any("already in use" in text for text in failed)
        assert in_use and attempt < 2, "\n".join(failed)
    return tuple(dict(np.load(f)) for f in files)


@pytest.mark.parametrize("across", ["data", "model"])
def test_two_processes_train_as_one(runs: tuple[dict[str, np.ndarray], ...], across: str):
    one, *two = runs
    mine = [name for name in one if name.startswith(across)]
    assert len(mine) == 6
    for name in mine:
        assert np.all(np.isfinite(one[name])) or name.endswith("norms")
        for other in two:
            np.testing.assert_array_equal(other[name], one[name])


@pytest.mark.parametrize("across", ["data", "model"])
def test_a_nan_on_one_process_makes_both_skip(runs: tuple[dict[str, np.ndarray], ...], across: str):
    expected = [(i >= BAD_ROW) + (i >= BAD_ELEMENT) for i in range(STEPS)]
    for run in runs:
        np.testing.assert_array_equal(run[f"{across}/skipped"], expected)
        assert np.isnan(run[f"{across}/norms"]).sum() == 2
        assert np.nanmax(run[f"{across}/norms"]) > 0.5  # the limit: some steps are clipped
