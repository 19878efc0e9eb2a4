"""Several hosts on one machine: each has a memory and processes of its own, and can be lost with all of that.

Where the machine allows it (Linux, root) they are namespaces: a host has a network interface, a name, process numbers
and a ``/dev/shm`` of its own, and its loss is one of which nobody is told. Else a host is a folder for its memory.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Protocol

import psutil
from prepared import PreparedPopen, kill_all, run_in_this_process
from typing_extensions import override

from lightning_scar.storage.host_memory import VARIABLE

_PATIENCE = 10
_PR_SET_PDEATHSIG = 1


class Host(Protocol):
    """One of them."""

    address: str

    def popen(
        self, command: Sequence[str], environment: Mapping[str, str], cwd: Path, console: IO[str]
    ) -> subprocess.Popen[bytes]:
        """Starts a supervisor."""

    def lose(self) -> None:
        """Its memory and its processes are gone, and it answers nobody."""

    def boot(self) -> None:
        """Another one takes the place of one that was lost."""

    def left_in_memory(self) -> list[str]:
        """What lies in its memory."""

    def living(self, pids: set[int]) -> set[int]:
        """Those of its processes that live."""

    def close(self) -> None:
        """Ends all that it runs."""


class LocalHost:
    """This one. It cannot be lost."""

    address = "127.0.0.1"

    def __init__(self) -> None:
        self._supervisors: list[subprocess.Popen[bytes]] = []

    def popen(
        self, command: Sequence[str], environment: Mapping[str, str], cwd: Path, console: IO[str]
    ) -> subprocess.Popen[bytes]:
        self._supervisors.append(_popen(command, environment, cwd, console))
        return self._supervisors[-1]

    def lose(self) -> None:
        raise NotImplementedError

    def boot(self) -> None:
        raise NotImplementedError

    def left_in_memory(self) -> list[str]:
        return []

    def living(self, pids: set[int]) -> set[int]:
        return set(filter(psutil.pid_exists, pids))

    def close(self) -> None:
        for supervisor in self._supervisors:
            kill_all(supervisor.pid)
            supervisor.wait(_PATIENCE)
        self._supervisors = []


class FolderHost(LocalHost):
    """A folder that stands for a memory, and the processes that were started with it.

    Args:
        memory: The folder.

    """

    def __init__(self, memory: Path) -> None:
        super().__init__()
        self._memory = memory
        self._memory.mkdir()

    @override
    def popen(
        self, command: Sequence[str], environment: Mapping[str, str], cwd: Path, console: IO[str]
    ) -> subprocess.Popen[bytes]:
        return super().popen(command, {**environment, VARIABLE: str(self._memory)}, cwd, console)

    @override
    def lose(self) -> None:
        self.close()
        shutil.rmtree(self._memory)

    @override
    def boot(self) -> None:
        self._memory.mkdir()

    @override
    def left_in_memory(self) -> list[str]:
        return [str(path) for path in self._memory.glob("*/*/**/*")]


class NamespaceHost:
    """A set of namespaces, which live as long as their first process.

    Args:
        network: The number of a process in the namespace of the network.
        number: Which host.

    """

    def __init__(self, network: int, number: int) -> None:
        self.address = f"10.77.0.{number + 1}"
        # The same again after a loss: the others' caches of addresses would lead nowhere for half a minute.
        self._hardware = f"02:00:00:00:00:{number + 1:02x}"
        self._network = network
        self._number = number
        self.boot()

    def boot(self) -> None:
        # The holder's death is the death of all in the namespace.
        begin = f"mount -t tmpfs tmpfs /dev/shm && hostname host-{self._number} && ip link set lo up && echo up"
        kinds = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._holder = _hold(["unshare", *kinds, "sh", "-c", f"{begin} && exec sleep 600"])
        self._first = _child(self._holder)
        veth = f"veth{self._number}"
        _in_network(
            self._network,
            f"ip link add {veth} type veth peer name eth0 address {self._hardware} netns {self._first}",
            f"ip link set {veth} master bridge up",
        )
        _in_network(self._first, f"ip addr add {self.address}/24 dev eth0", "ip link set eth0 up")

    def popen(
        self, command: Sequence[str], environment: Mapping[str, str], cwd: Path, console: IO[str]
    ) -> subprocess.Popen[bytes]:
        enter = [sys.executable, __file__, str(self._first)]
        environment = {**environment, "GLOO_SOCKET_IFNAME": "eth0"}
        return _popen([*enter, *command], environment, cwd, console)

    def lose(self) -> None:
        # The cable first: no kernel says good-bye for its dead processes.
        _in_network(self._network, f"ip link delete veth{self._number}")
        self.close()

    def left_in_memory(self) -> list[str]:
        find = ["nsenter", "-t", str(self._first), "--mount", "find", "/dev/shm", "-mindepth", "1"]
        found = subprocess.run(find, capture_output=True, text=True, check=True).stdout.split()
        # The user's folder stays.
        return [path for path in found if not re.fullmatch("/dev/shm/scar-memory-[^/]*", path)]

    def living(self, pids: set[int]) -> set[int]:
        own = _pid_namespace(self._first)
        # Its first process is none that waits for orphans.
        processes = psutil.process_iter(["status"])
        living = {process.pid for process in processes if process.info["status"] != psutil.STATUS_ZOMBIE}
        return {pid for pid in living - {self._first} if _pid_namespace(pid) == own}

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait(_PATIENCE)
        with suppress(psutil.NoSuchProcess):
            psutil.Process(self._first).wait(_PATIENCE)


@cache
def have_namespaces() -> bool:
    """Whether this machine lets tests make hosts of namespaces."""
    if os.geteuid() != 0 or any(shutil.which(tool) is None for tool in ("unshare", "nsenter", "ip")):
        return False
    with suppress(AssertionError, subprocess.CalledProcessError), namespace_hosts(1):
        return True
    return False


@contextmanager
def namespace_hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts on a network of their own."""
    with ExitStack() as stack:
        holder = _hold(["unshare", "--net", "--fork", "--kill-child", "sh", "-c", "echo up && exec sleep 600"])
        stack.callback(holder.wait, _PATIENCE)
        stack.callback(holder.kill)
        network = _child(holder)
        _in_network(network, "ip link add bridge type bridge", "ip link set bridge up")
        yield [stack.enter_context(closing(NamespaceHost(network, number))) for number in range(count)]


@contextmanager
def folder_hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """So many hosts, whose memories are folders."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(FolderHost(folder / f"host-{number}"))) for number in range(count)]


def _popen(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path, console: IO[str]
) -> subprocess.Popen[bytes]:
    return PreparedPopen(
        command, stdout=console, stderr=subprocess.STDOUT, cwd=cwd, env=dict(environment), start_new_session=True
    )


def _hold(command: Sequence[str]) -> subprocess.Popen[str]:
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert holder.stdout is not None
    said = holder.stdout.readline()
    if said != "up\n":
        holder.send_signal(signal.SIGKILL)
        raise AssertionError(f"{command}: {said}{holder.communicate()[0]}")
    return holder


def _pid_namespace(pid: int) -> str:
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return f"none: {pid} is gone"


def _child(holder: "subprocess.Popen[str]") -> int:
    [child] = psutil.Process(holder.pid).children()
    return child.pid


def _in_network(pid: int, *commands: str) -> None:
    for command in commands:
        subprocess.run(["nsenter", "-t", str(pid), "--net", *command.split()], check=True, capture_output=True)


def _enter() -> None:
    """Runs a Python program in the namespaces of a process whose number comes first. It dies with this one."""
    first, command, libc = sys.argv[1], sys.argv[2:], ctypes.CDLL(None, use_errno=True)
    where = os.getcwd()
    for place in [os.open(f"/proc/{first}/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts", "ipc", "pid", "mnt")]:
        if libc.setns(place, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(place)
    os.chdir(where)
    # Only children are in the namespace of process numbers.
    child = os.fork()
    if not child:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        del sys.path[0]
        run_in_this_process(command)
    sys.exit(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))


if __name__ == "__main__":
    _enter()
