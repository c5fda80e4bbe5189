"""A part of the fuzzer: `python -m tests.fuzz` has all of it."""

import pytest

from tests.fuzz import fuzz


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_damaged_files_and_strange_command_lines_end_in_one_line_and_touch_nothing_else(capfd):
    assert fuzz(files=150, commands=150, processes=6, seed=2) == []
