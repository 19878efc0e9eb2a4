"""Forks of a prepared parent are like programs that start anew."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from prepared import PreparedPopen, run

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they do start anew")
PRINT = "import os, sys; print(__name__, sys.argv[1:], os.environ['A'], os.getcwd(), sys.stdin.read()); sys.exit(3)"


@pytest.mark.parametrize("by", [[], ["env"]])
def test_arguments_streams_environment_and_exit_code(by: list[str], tmp_path: object) -> None:
    environment = {**os.environ, "A": "b"}
    done = run(
        [*by, sys.executable, "-c", PRINT, "x", "y z"],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == f"__main__ ['x', 'y z'] b {tmp_path} \n"


@pytest.mark.parametrize("by", [[], ["env"]])
@pytest.mark.parametrize(
    ("code", "returned", "said"),
    [
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import sys; sys.exit('no')", 1, "no\n"),
        ("import atexit, sys; atexit.register(print, 'bye', file=sys.stderr)", 0, "bye\n"),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM, ""),
        ("import os; os.kill(os.getpid(), 2)", -signal.SIGINT, "KeyboardInterrupt\n"),
    ],
)
def test_ends(by: list[str], code: str, returned: int, said: str) -> None:
    done = run([*by, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == returned
    assert done.stderr.endswith(said)
    assert "prepared.py" not in done.stderr


@linux
def test_it_is_a_child_that_has_imported_everything() -> None:
    code = "import os, sys; print('torch' in sys.modules, os.getpid(), flush=True); sys.stdin.read()"
    with PreparedPopen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == f"True {child.pid}\n"
        assert psutil.Process(child.pid).ppid() == os.getpid()
