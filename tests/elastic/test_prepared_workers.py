"""Workers that a prepared parent forks are what fresh programs are, and it refuses where they would not be."""

import json
import os
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prepared
import pytest
from elastic_helpers import code_of, run, script

from lightning_scar.elastic.prepared.environment import OF_A_WORKER
from lightning_scar.elastic.prepared.imports import Imports, NotPreparedError
from lightning_scar.elastic.prepared.program import Program
from lightning_scar.elastic.prepared.starter import ProgramParent, Starter

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are programs of their own")

#: Writes down all that a program can see of its process.
PROBE = """
import ctypes, faulthandler, gc, json, locale, logging, os, random, resource, signal, sys, threading, warnings
import multiprocessing
import numpy, torch

def names(path):
    return sorted(os.readlink(f"{path}/{fd}") for fd in ("0", "1") if os.path.exists(f"{path}/{fd}"))

def stream(s):
    return [s.encoding, s.errors, s.line_buffering, s.write_through, s.isatty(), s.fileno(), s.mode, s.name]

def death_signal():
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))
    return number.value

main = sys.modules["__main__"]
SAME = {
    "main": [__name__, __file__, __package__, __cached__, main is not None, vars(main) is globals()],
    "spec": None if __spec__ is None else __spec__.name,
    "builtins": print is __builtins__.print,
    "argv": sys.argv,
    "path": sys.path,
    "orig_argv": sys.orig_argv,
    "flags": list(sys.flags),
    "warnoptions": sys.warnoptions,
    "filters": [str(f) for f in warnings.filters],
    "xoptions": sys._xoptions,
    "environment": dict(os.environ),
    "cwd": os.getcwd(),
    "handlers": [str(signal.getsignal(n)) for n in sorted(signal.valid_signals())],
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "session": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
    "parent": os.getppid(),
    "dies with it": death_signal(),
    "nice": os.nice(0),
    "limits": [resource.getrlimit(n) for n in range(16)],
    "umask": os.umask(0o22),
    "affinity": sorted(os.sched_getaffinity(0)),
    "descriptors": sorted(int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")),
    "streams": [stream(s) for s in (sys.stdin, sys.stdout, sys.stderr)],
    "threads": [threading.active_count(), threading.current_thread().name, len(os.listdir("/proc/self/task"))],
    "is main thread": threading.current_thread() is threading.main_thread(),
    "multiprocessing": [multiprocessing.get_start_method(), multiprocessing.current_process().name],
    "is a child of multiprocessing": multiprocessing.parent_process() is not None,
    "torch threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
    "cuda": [torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork()],
    "faulthandler": faulthandler.is_enabled(),
    "hash": hash("a word"),
    "hooks": [sys.excepthook is sys.__excepthook__, sys.gettrace(), sys.getprofile(), threading.gettrace()],
    "gc": [gc.isenabled(), gc.get_threshold()],
    "locale": locale.setlocale(locale.LC_ALL),
    "logging": [str(h) for h in logging.getLogger().handlers],
    "recursion": sys.getrecursionlimit(),
    "debug": __debug__,
}
OWN = {
    "pid": os.getpid(),
    "random": random.random(),
    "numpy": float(numpy.random.rand()),
    "torch": torch.initial_seed(),
    "key": multiprocessing.current_process().authkey.hex(),
}
if __name__ == "__main__":
    with open(os.environ["PROBE"], "w") as file:
        json.dump({"same": SAME, "own": OWN}, file)
"""


def environment(folder: Path) -> dict[str, str]:
    return {"PROBE": str(folder / "seen"), "RANK": "1", "PYTHONHASHSEED": "3", "OMP_NUM_THREADS": "1"}


def seen_by(starter: Starter, folder: Path) -> dict[str, Any]:
    """What a worker sees that runs :data:`PROBE`."""
    with open(os.devnull, "w") as errors:
        assert code_of(starter.start(environment(folder), errors.fileno()), timeout=60) == 0
    found: dict[str, Any] = json.loads((folder / "seen").read_text())
    return found


@pytest.fixture
def starters() -> Iterator[list[Starter]]:
    made: list[Starter] = []
    yield made
    for starter in made:
        starter.close()


@linux
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(["-u", "probe.py", "a", "-b"], id="script"),
        pytest.param(["-m", "package.probe", "a"], id="module", marks=pytest.mark.slow),
        pytest.param(["-OBWignore", "-Xdev", "probe.py"], id="options", marks=pytest.mark.slow),
    ],
)
def test_forked_workers_see_what_fresh_ones_see(
    how: list[str], tmp_path: Path, starters: list[Starter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONHASHSEED", "3")
    Path("probe.py").write_text(PROBE)
    Path("package").mkdir()
    Path("package/probe.py").write_text(PROBE)
    told: list[str] = []
    command = [sys.executable, *how]
    common = {"OMP_NUM_THREADS": "1"}
    starters += [Starter(command, common, tmp_path / "no", told.append, prepared=how) for how in (False, True)]
    fresh, first, second = (seen_by(starter, tmp_path) for starter in (*starters, starters[1]))
    assert told == []
    for forked in (first, second):
        # More packages are imported, and some of them add filters.
        forked["same"]["filters"] = [name for name in forked["same"]["filters"] if name in fresh["same"]["filters"]]
        assert forked["same"] == fresh["same"]
    for name in fresh["own"]:
        assert len({str(found["own"][name]) for found in (fresh, first, second)}) == 3, name
    assert first["same"]["parent"] == os.getpid()
    assert first["same"]["dies with it"] == signal.SIGKILL
    assert first["same"]["descriptors"] == [0, 1, 2]


def outcome(starter: Starter, folder: Path, **environment: str) -> tuple[int, str]:
    """The exit code and the standard error of a worker."""
    with (folder / "errors").open("w") as errors:
        code = code_of(starter.start(environment, errors.fileno()), timeout=60)
    return code, (folder / "errors").read_text()


ENDS = {
    "an exception": "def f():\n    raise ValueError('x')\nf()",
    "no": "import sys; sys.exit('no')",
    "a code": "import sys; sys.exit(300)",
    "a signal": "import os; os.kill(os.getpid(), 15)",
    "ctrl-c": "import os; os.kill(os.getpid(), 2)",
    "at exit": "import atexit, sys; atexit.register(print, 'bye', file=sys.stderr)",
    "a thread": (
        "import sys, threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print('late', file=sys.stderr))).start()"
    ),
    "a syntax error": "a b",
    "a hook": "import sys; sys.excepthook = lambda *a: print('mine', a[0], file=sys.stderr); 1 / 0",
    "a segmentation fault": "import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)",
    "a crash by hand": "import os; os._exit(9)",
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Starter]]:
    """Starters of fresh and of forked workers that run code."""
    path = tmp_path_factory.mktemp("ends") / "end.py"
    path.write_text("import os\nexec(compile(os.environ['END'], __file__, 'exec'))")
    made = [Starter([sys.executable, str(path)], {}, path / "no", print, prepared=how) for how in (False, True)]
    yield made
    for starter in made:
        starter.close()


@linux
@pytest.mark.parametrize("name", ENDS)
def test_forked_workers_end_as_fresh_ones_do(name: str, tmp_path: Path, ends: list[Starter]) -> None:
    fresh, forked = (outcome(starter, tmp_path, END=ENDS[name]) for starter in ends)
    if name == "a segmentation fault":
        # Then the loaded extension modules are listed, of which there are more.
        fresh, forked = ((code, text.partition("Current thread")[0]) for code, text in (fresh, forked))
    assert forked == fresh
    assert isinstance(ends[1]._parent, ProgramParent)


@linux
def test_a_script_that_is_not_there_ends_as_with_python(tmp_path: Path, starters: list[Starter]) -> None:
    command = [sys.executable, str(tmp_path / "x.py")]
    starters += [Starter(command, {}, tmp_path / "no", print, prepared=how) for how in (False, True)]
    fresh, forked = (outcome(starter, tmp_path) for starter in starters)
    assert forked == fresh


CHILDREN = """
import multiprocessing, sys
import torch
from multiprocessing import shared_memory
from torch.utils.data import DataLoader

def double(x):
    return 2 * x

if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        with context.Pool(2) as pool:
            assert pool.map(double, [1, 2]) == [2, 4], method
    for method in ("fork", "spawn"):
        loader = DataLoader(torch.arange(8), batch_size=4, num_workers=1, multiprocessing_context=method)
        assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]], method
    memory = shared_memory.SharedMemory(create=True, size=16)
    memory.close()
    memory.unlink()
    model = torch.nn.Linear(2, 2)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None
    (torch.randn(512, 512, requires_grad=True) @ torch.randn(512, 512)).sum().backward()
"""


@linux
@pytest.mark.slow
def test_children_threads_and_compilers_of_a_forked_worker_work(tmp_path: Path, starters: list[Starter]) -> None:
    path = tmp_path / "children.py"
    path.write_text(CHILDREN)
    starters.append(Starter([sys.executable, str(path)], {}, tmp_path / "no", print))
    assert outcome(starters[0], tmp_path) == (0, "")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("tool", [["pdb", "-c", "continue", "-c", "quit"], ["coverage", "run"]])
def test_tools_that_run_a_script_run_it_in_a_fork(
    tool: list[str], tmp_path: Path, starters: list[Starter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "script.py"
    path.write_text("import sys\nprint('worked', __name__, file=sys.stderr)\n")
    starters.append(Starter([sys.executable, "-m", *tool, str(path)], {}, tmp_path / "no", print))
    assert outcome(starters[0], tmp_path) == (0, "worked __main__\n")
    assert (tmp_path / ".coverage").exists() == ("coverage" in tool)


# -- what it refuses ---------------------------------------------------------------------------------------------------


ODD = {
    "a thread": (
        "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "thread",
    ),
    "a descriptor": ("import os; keep = open(os.devnull)", "/dev/null open"),
    "the rank": ("import os; RANK = os.environ.get('RANK')", "odd reads RANK"),
    "an error": ("raise ImportError('broken')", "import odd raised ImportError: broken"),
    "cuda": ("import torch; torch.cuda._initialized = True", "CUDA"),
    "a debugger": ("import sys; sys.settrace(lambda *a: None)", "debugger"),
    "shared memory": ("import multiprocessing; lock = multiprocessing.Lock()", "shares memory"),
    "nothing odd": ("class rank_zero_only: rank = 0\nimport os; os.environ.get('LOCAL_RANK')", "''"),
    "the whole environment": ("import os; MINE = [*os.environ.items()]", "''"),
}


@linux
@pytest.mark.parametrize("name", ODD)
def test_a_parent_says_why_it_may_not_be_forked(name: str, tmp_path: Path) -> None:
    text, expected = ODD[name]
    (tmp_path / "odd-1.0.dist-info").mkdir()
    (tmp_path / "odd.py").write_text(text)
    code = """
    import os, socket, sys
    sys.path.append(sys.argv[1])
    from lightning_scar.elastic.prepared.parent import Parent
    print(repr(Parent(socket.socket())._import(["odd"])), os.environ["RANK"])
    """
    done = prepared.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        # As in a rank of another job, or of a notebook.
        env={**os.environ, "RANK": "7"},
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert expected in done.stdout, done.stderr
    assert done.stdout.endswith(" 7\n")


@linux
def test_a_changed_module_makes_the_parent_stale(tmp_path: Path) -> None:
    (tmp_path / "odd-1.0.dist-info").mkdir()
    (tmp_path / "odd.py").write_text("")
    code = """
    import os, socket, sys
    sys.path.append(sys.argv[1])
    from lightning_scar.elastic.prepared.parent import Parent
    parent = Parent(socket.socket())
    assert not parent._import(["odd"]) and not parent._stale()
    os.utime(sys.modules["odd"].__file__, (0, 0))
    print(parent._stale())
    """
    done = prepared.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], timeout=60, capture_output=True, text=True
    )
    assert done.stdout == f"{tmp_path / 'odd.py'}\n", done.stderr


@linux
def test_a_parent_that_is_lost_is_replaced_by_another_one(tmp_path: Path, starters: list[Starter]) -> None:
    path = tmp_path / "worker.py"
    path.write_text("import os, sys; sys.exit(int(os.environ['CODE']))")
    told: list[str] = []
    starter = Starter([sys.executable, str(path)], {}, tmp_path / "no", told.append)
    starters.append(starter)
    parents = []
    for code in (3, 4, 5):
        while not starter.is_ready:
            time.sleep(0.01)
        assert starter._parent is not None
        parents.append(starter._parent._process.pid)
        if code == 4:
            os.kill(parents[-1], signal.SIGKILL)
        assert code_of(starter.start({"CODE": str(code)}, 2)) == code
    assert told == []
    assert parents[0] == parents[1] != parents[2]


@linux
def test_what_a_training_worker_has_imported_the_next_ones_find_imported(
    tmp_path: Path, starters: list[Starter], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A real program: all that the tests import would be imported.
    path = tmp_path / "worker.py"
    path.write_text("import sys; sys.exit(int('mlxtend' in sys.modules))")
    starter = Starter([sys.executable, "-s", str(path)], {}, tmp_path / "imports", print)
    starters.append(starter)
    assert code_of(starter.start({}, 2)) == 0
    assert starter.is_ready
    (tmp_path / "imports").write_text(json.dumps(["__main__", "worker", "mlxtend"]))
    starter.import_more()
    assert not (tmp_path / "imports").exists()
    assert code_of(starter.start({}, 2)) == 1


def test_a_fork_never_meets_the_threads_of_who_asks_for_it(tmp_path: Path, starters: list[Starter]) -> None:
    path = tmp_path / "worker.py"
    path.write_text("import os, sys; sys.exit(len(os.listdir('/proc/self/task')) + 10)")
    starters.append(Starter([sys.executable, str(path)], {}, tmp_path / "no", print))
    busy = threading.Event()
    threads = [threading.Thread(target=busy.wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        assert code_of(starters[0].start({}, 2)) == 11
    finally:
        busy.set()


def test_it_is_said_once_why_workers_are_not_forked(tmp_path: Path) -> None:
    text = "import os\nos.environ['NUMBER'] = str(1)\nimport torch\nimport sys; sys.exit(int(os.environ['RANK']))"
    done = run("--nproc-per-node", "2", "--max-restarts", "0", script(tmp_path, text))
    assert done.stderr.count("workers start as programs of their own") == 1
    assert "script.py, line 2, changes the environment before it imports torch" in done.stderr
    assert "rank 1 exited with code 1" in done.stderr


# -- what it imports -------------------------------------------------------------------------------------------------


def imports(folder: Path, text: str, *more: tuple[str, str]) -> Imports:
    for name, content in (("main.py", text), *more):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    program = Program.of(["python", str(folder / "main.py")])
    assert program is not None
    return Imports(program)


def test_imports_are_read_from_a_script_and_the_users_own_modules(tmp_path: Path) -> None:
    own = [
        ("helper.py", "import yaml\nfrom pack import thing\n"),
        ("pack/__init__.py", "from . import part\nfrom .deep.er import x"),
        ("pack/thing.py", "import psutil"),
        ("pack/part.py", "import fsspec"),
        ("pack/deep/er.py", "import numpy.linalg"),
    ]
    text = """
    import helper, json
    from typing import TYPE_CHECKING
    if TYPE_CHECKING:
        import accelerate
    try:
        import mlxtend
    except ImportError:
        import nothing_of_that_name
    def later():
        import torchmetrics
    """
    found = imports(tmp_path, textwrap.dedent(text), *own).modules
    expected = {"yaml", "psutil", "fsspec", "numpy.linalg", "mlxtend", "torch"}
    assert expected <= set(found)
    assert not set(found) & {"json", "helper", "pack", "accelerate", "nothing_of_that_name", "torchmetrics", "typing"}


def test_a_long_chain_of_modules_and_namespaces_of_the_user_is_read_in_part(tmp_path: Path) -> None:
    chain = [(f"link{i}.py", f"import link{i + 1}") for i in range(2000)]
    found = imports(tmp_path, "import psutil, link0, space.inner.part", *chain, ("space/inner/part.py", "import yaml"))
    assert {"psutil", "torch"} <= set(found.modules)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("os.environ['A_NAME'] = '1'", {"A_NAME": "1"}),
        ("os.environ.setdefault('A_NAME', '1')", {"A_NAME": "1"}),
        ("os.environ.setdefault('PATH', '1')", {}),
        ("os.environ.get('A_NAME', '1')", {}),
        ("os.environ['A_NAME'] = str(1)", None),
        ("os.environ.update(A_NAME='1')", None),
        ("os.putenv('A_NAME', '1')", None),
        ("if os.sep:\n    os.environ['A_NAME'] = '1'", None),
        ("del os.environ['A_NAME']", None),
        ("import torch\nos.environ['A_NAME'] = '1'", None),
    ],
)
def test_variables_that_are_set_before_imports(line: str, expected: dict[str, str] | None, tmp_path: Path) -> None:
    text = f"import os\n{line}\nimport numpy\n"
    if expected is None:
        with pytest.raises(NotPreparedError, match=r"main.py, line .* changes the environment"):
            imports(tmp_path, text)
    else:
        assert imports(tmp_path, text).environment == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-u", "x.py", "-m"], (("-u",), "script", "x.py", ("-m",))),
        (["-OBum", "pkg.x", "1"], (("-O", "-B", "-u"), "-m", "pkg.x", ("1",))),
        (["-uWerror", "-X", "dev", "x.py"], (("-u", "-W", "error", "-X", "dev"), "script", "x.py", ())),
        (["-c", "pass", "x"], ((), "-c", "pass", ("x",))),
        (["--check-hash-based-pycs", "never", "x.py"], (("--check-hash-based-pycs", "never"), "script", "x.py", ())),
        ([], None),
        (["-"], None),
        (["-m"], None),
        (["-W"], None),
        (["--version"], None),
        ([str(Path(__file__).parent)], None),
    ],
)
def test_command_lines(words: list[str], expected: tuple[Any, ...] | None) -> None:
    program = Program.of(["python", *words])
    assert (program and (program.flags, program.kind, program.what, program.arguments)) == expected


def test_a_command_without_a_program_is_refused() -> None:
    with pytest.raises(NotPreparedError, match="does not name"):
        ProgramParent([sys.executable, "-"], {})


def test_it_is_known_what_differs_between_workers(tmp_path: Path) -> None:
    text = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1] + os.environ['RANK'], 'w'))"
    run("--nproc-per-node", "2", script(tmp_path, text), tmp_path / "seen")
    zero, one = (json.loads((tmp_path / f"seen{rank}").read_text()) for rank in "01")
    differ = {name for name in {*zero, *one} if zero.get(name) != one.get(name)}
    assert differ <= OF_A_WORKER
    assert {"RANK", "LOCAL_RANK", "LIGHTNING_SCAR_SLOT"} <= differ
    assert not {name for name in OF_A_WORKER if name not in zero}


def test_nobody_forks_over_a_broken_connection() -> None:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with mine, pytest.raises(NotPreparedError, match="cannot be asked"):
        prepared.PreparedParent(mine).fork([sys.executable, "-c", ""], {}, [0, 1, 2])


@linux
def test_what_cannot_wait_is_done_until_a_fork_is_there() -> None:
    """Its parent answers, as far as this test goes, not before it was done three times."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    done: list[int] = []

    def meanwhile() -> None:
        done.append(len(done))
        if len(done) == 3:
            theirs.send(json.dumps({"pid": 1234}).encode())

    with mine, theirs:
        process = prepared.PreparedParent(mine).fork([sys.executable], {}, [0, 1, 2], meanwhile=meanwhile)
    assert (process.pid, done) == (1234, [0, 1, 2])
