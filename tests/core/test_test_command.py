"""scripts/test.py, its checks replaced by a program that always succeeds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).resolve().parent.parent.parent / "scripts" / "test.py"
ALWAYS_SUCCEEDS = shutil.which("true")


@pytest.mark.parametrize("there", [True, False])
def test_the_last_line_says_that_the_browser_tests_were_skipped_only_where_there_is_no_chromium(tmp_path, there):
    (tmp_path / "main.py").touch()  # as a ComfyUI has
    if there:
        (tmp_path / "chromium").symlink_to(ALWAYS_SUCCEEDS)
    done = subprocess.run([sys.executable, COMMAND], capture_output=True, text=True, check=True, env={
        **os.environ, "PATH": str(tmp_path), "CONTROLNEXT_CACHE": str(tmp_path / "cache"),
        "COMFYUI_PATH": str(tmp_path), "COMFYUI_PYTHON": ALWAYS_SUCCEEDS})
    assert ("apt-get install chromium" in done.stdout.splitlines()[-1]) is not there
