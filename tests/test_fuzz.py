"""Mutations of everything that a user feeds the scripts; see fuzz.py, whose command line runs thousands."""

import subprocess
import sys
from pathlib import Path

COUNT = 300


def test_mutations_end_in_a_result_or_in_one_line():
    command = [sys.executable, Path(__file__).with_name("fuzz.py"), "--count", str(COUNT)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout
    assert f"{COUNT} mutations" in done.stdout
