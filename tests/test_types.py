"""What a type checker says of a user's code."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import torch
from guessopt import GuessGradOptimizer

net = torch.nn.Linear(2, 2)
GuessGradOptimizer(net.parameters(), memory="strea")
GuessGradOptimizer(net.parameters(), base=42)
opt = GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, "w_perp", lr=0.1)
loss: torch.Tensor = opt.step(lambda: net(torch.ones(3, 2)).sum())
reveal_type(opt.guesses)
"""


@pytest.mark.slow
def test_wrong_options_are_type_errors(tmp_path: Path) -> None:
    file = tmp_path / "user.py"
    file.write_text(CODE)
    run = subprocess.run([sys.executable, "-m", "mypy", "--strict", str(file)], capture_output=True, text=True)
    errors = [line for line in run.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 2, run.stdout + run.stderr
    assert 'Argument "memory"' in errors[0] and 'Argument "base"' in errors[1]
    assert 'Revealed type is "int"' in run.stdout or 'Revealed type is "builtins.int"' in run.stdout
