"""The scripts that people copy: each runs as it stands, in a folder of its own, with the public names alone."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
#: Words of the last line that a script prints, and the options that make it short.
SCRIPTS = {
    "quickstart.py": ("accuracy", []),
    "finetuning.py": ("test accuracy", []),
    "demo.py": ("activation perturbation", ["--epochs", "1"]),
}


def test_every_script_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)


def test_the_quickstart_is_the_script_of_the_readme() -> None:
    readme = (EXAMPLES.parents[1] / "README.md").read_text()
    assert readme.partition("```python\n")[2].partition("```")[0] in (EXAMPLES / "quickstart.py").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_as_it_stands(name: str, tmp_path: Path) -> None:
    if name == "demo.py" and importlib.util.find_spec("mnist1d") is None:
        pytest.skip("needs mnist1d")
    words, options = SCRIPTS[name]
    script = tmp_path / name
    script.write_text((EXAMPLES / name).read_text())
    path = [str(EXAMPLES.parents[1]), *sys.path]
    command = [sys.executable, str(script), *options]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "GuessWarning" not in done.stderr, done.stderr
    assert words in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_uses_public_names_alone(name: str) -> None:
    import guessopt
    import guessopt.diagnostics

    public = {"guessopt": guessopt.__all__, "guessopt.diagnostics": guessopt.diagnostics.__all__}
    for node in ast.walk(ast.parse((EXAMPLES / name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.module.partition(".")[0] not in ("benchmarks", "tests")
            if node.module.startswith("guessopt"):
                assert {alias.name for alias in node.names} <= set(public[node.module])
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr == "__init__"
