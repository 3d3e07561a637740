"""What the README shows runs as written, and its commands are those that continuous integration runs."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippet_runs(index, capsys):
    exec(compile(SNIPPETS[index], f"README snippet {index}", "exec"), {})
    capsys.readouterr()


def test_snippets_are_there():
    assert len(SNIPPETS) >= 3


def test_ci_runs_the_test_command():
    (command,) = [c for c in re.findall(r"```bash\n(.*?)\n```", README, flags=re.S) if "pytest" in c]
    assert command.replace("pip install", "pip install -q") in (ROOT / ".ci" / "run").read_text()


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
