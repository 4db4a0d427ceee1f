"""The helpers beside the tests of the core."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
