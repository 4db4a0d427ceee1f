"""npm packages, which drawings come in."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path


def fetched(package: str, folder: Path) -> Path:
    """The folder with a package's files below `folder`, unpacked there on the first call."""
    unpacked = folder / "package"
    if not unpacked.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.PIPE)
        with tarfile.open(folder / packed.stdout.decode().split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return unpacked
