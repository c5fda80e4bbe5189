"""A part of the fuzzer: `python -m tests.fuzz` has all of it."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_damaged_files_and_strange_command_lines_end_in_one_line_and_touch_nothing_else():
    command = [sys.executable, "-m", "tests.fuzz", "--files=150", "--commands=150", "--processes=6", "--seed=2"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
