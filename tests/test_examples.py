"""The main job, at a small size: it runs, and its table, picture and numbers come out."""

import json
import pathlib
import subprocess
import sys

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def run(script: str, *args: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / script, *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_quickstart(tmp_path):
    said = run("quickstart.py", "--steps", "12", "--rates", "0.003", "0.1", "--out", str(tmp_path))
    assert "| clipnorm |" in said and "| AGC |" in said
    result = json.loads((tmp_path / "quickstart.json").read_text())
    assert len(result["runs"]) == 8 and all(0 <= r["accuracy"] <= 1 for r in result["runs"])
    assert (tmp_path / "quickstart.png").stat().st_size > 20_000


def test_advise(tmp_path):
    said = run("advise.py", "--steps", "60", "--out", str(tmp_path))
    assert all(x in said for x in ("Gradient norm over 60 steps", "Suggestion: optclip.", "Trained from the same"))
    assert (tmp_path / "advise.png").stat().st_size > 20_000


def test_noisy_labels(tmp_path):
    said = run("noisy_labels.py", "--epochs", "3", "--seeds", "1", "--out", str(tmp_path))
    assert "ordinary gradient" in said and "per-example clip" in said
    assert (tmp_path / "noisy_labels.png").stat().st_size > 20_000


def test_dp_sgd():
    rows = run("dp_sgd.py", "--epochs", "8", "--noise", "0", "8").splitlines()
    quiet, loud = (float(row.split()[1]) for row in rows[1:3])
    assert quiet > 0.8 > loud and "sampling rate 0.1, 80 steps" in rows[3]


def test_sharded():
    said = run("sharded.py", "--steps", "12")
    assert "norm on 4 devices" in said and "steps skipped: 1 and 1" in said and "the numbers are the same" in said
