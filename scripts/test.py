"""Runs all checks, each in a process of its own, and exits with 1 if any fails.

    python scripts/test.py [arguments for pytest]

Sets up ComfyUI and its Python environment on the first call (environment.py). Then come ruff, all tests on the newest
supported ComfyUI, and beside them the tests marked `versions` on the older ones. When COMFYUI_PATH names a ComfyUI, the
tests run only on that one. With arguments, pytest runs once, with them. The last lines sum up, and say so when the
browser tests were skipped for want of a Chromium; nothing else is skipped on what is set up here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import environment

OLDER_VERSIONS = {"0.24.0": "versions", "0.16.3": "versions and not curve_editor"}  # {version: the tests that it runs}
WORKERS = 3  # each with a real ComfyUI, one of them often waiting for a server; with the older ones' up to 18 GB


def main() -> int:
    python, comfyui = environment.set_up()
    environment.get_chromium(python)

    pytest = [python, "-m", "pytest"]
    checks, behind = [(f"pytest on {comfyui}", comfyui, [*pytest, *sys.argv[1:]])], []
    if not sys.argv[1:]:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
        # Whole files go to a worker, so that what a file makes once is made once, in the order of pyproject.toml.
        shared = ["-n", str(WORKERS), "--dist", "loadfile", "--no-loadscope-reorder"]
        checks = [("ruff", comfyui, [python, "-m", "ruff", "check", "."]),
                  (f"pytest on {comfyui}", comfyui, [*pytest, *shared])]
        if not os.environ.get("COMFYUI_PATH"):
            behind = [(f"pytest on ComfyUI {version}", environment.older_comfyui(version, python),
                       [*pytest, "-q", "-m", tests, "tests/comfy"]) for version, tests in OLDER_VERSIONS.items()]

    with ThreadPoolExecutor() as lanes:
        others = lanes.submit(run, behind, shown=False)
        summary = [*run(checks), *others.result()]
    if not environment.chromium():
        summary.append(f"skipped: {environment.NO_CHROMIUM}.")
    print("\n".join(["== Summary", *summary]))
    return int(any(line.startswith("FAILED") for line in summary))


def run(checks: list[tuple], shown: bool = True) -> list[str]:
    """Run (name, ComfyUI, command) one after the other; returns a line of the summary for each.

    Args:
        shown: print what they print as it comes, or whole at their end.
    """
    summary = []

    for name, tree, command in checks:
        if shown:
            print(f"== {name}", flush=True)
        start = time.monotonic()
        done = subprocess.run(command, cwd=environment.REPOSITORY, env={**os.environ, "COMFYUI_PATH": str(tree)},
                              stdout=None if shown else subprocess.PIPE, stderr=None if shown else subprocess.STDOUT)
        if not shown:
            print(f"\n== {name}\n{done.stdout.decode(errors='replace')}", flush=True)
        result = "passed" if done.returncode == 0 else "FAILED"
        summary.append(f"{result}  {time.monotonic() - start:5.0f} s  {name}")
    return summary


if __name__ == "__main__":
    try:
        sys.exit(main())
    except environment.SetupError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
