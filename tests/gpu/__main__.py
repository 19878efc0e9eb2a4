"""Runs all parts, or one of them in this process."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
# Also where this is `python tests/gpu`.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != TESTS / "gpu"]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "core")]

if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        from gpu.part import main
    else:
        from gpu.driver import main
    sys.exit(main())
