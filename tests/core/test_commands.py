"""The commands beside the product, as people call them before anything is set up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
WITHOUT_OPTIONS = ("environment.py", "provide.py", "stand_in.py", "test.py")
COMMANDS = [file for folder in ("benchmarks", "demo_model", "scripts") for file in (REPOSITORY / folder).glob("*.py")
            if '__name__ == "__main__"' in file.read_text(encoding="utf-8") and file.name not in WITHOUT_OPTIONS]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.stem)
def test_a_command_says_what_it_does_where_nothing_is_installed(command, tmp_path):
    nowhere = {**os.environ, "COMFYUI_PATH": str(tmp_path)}  # so that one that does not stop to say it ends at once
    said = subprocess.run([sys.executable, "-S", command, "--help"], capture_output=True, text=True, env=nowhere)
    assert said.stdout.startswith("usage: "), said.stderr


def test_a_training_of_the_demonstration_ends_after_its_minutes_as_if_it_were_told_to():
    code = ["import sys, time", f"sys.path.insert(0, {str(REPOSITORY / 'demo_model')!r})", "import make",
            "make.end_after(0.01)", "try:", "    while True:", "        time.sleep(0.1)",
            "finally:", "    print('kept')"]
    ended = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (143, "kept\n"), ended.stderr
