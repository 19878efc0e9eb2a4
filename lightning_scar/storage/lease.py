"""One live run a directory: who holds it, and how the next one tells that the holder is dead.

The lease file holds host, process and a beat that grows while the holder lives. On the same host the process is looked
up, so a killed run's directory is free at once; from another host the beat is watched, never compared with a clock.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from lightning_scar.storage.delta import StorageError
from lightning_scar.storage.directory import Directory

FILE = "lease.json"
#: Seconds between two beats, and how long a beat of another host may stop before its holder counts as dead.
BEAT_SECONDS = 5.0
WATCH_SECONDS = 20.0
_FIRST_BEAT_SECONDS = 0.5
#: How long to wait for other processes of this host that start at the same moment.
_ALONE_SECONDS = 2.0

_held_here: set[str] = set()


class DirectoryInUseError(StorageError):
    """Another live run holds the directory."""


class Lease:
    """The right to write to a directory.

    Args:
        directory: The running checkpoint's directory.
        memory: Whether its holder saves to memory first.

    """

    def __init__(self, directory: Directory, memory: bool = False) -> None:
        self._directory = directory
        self._memory = memory
        self.token = uuid.uuid4().hex
        #: The run's name, the same at all of its starts; its folders in memory are named after it.
        self.run = self.token
        #: The number of this start. The previous one is known even if none of its saves can be found.
        self.incarnation = 0
        #: Whether earlier starts may have left in memory what storage does not have.
        self.left_unstored = False
        self._beat = 0
        self._stop = threading.Event()
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None
        self.lost = False

    def acquire(self) -> None:
        """Take the directory, if necessary from a dead holder.

        Raises:
            DirectoryInUseError: If the holder lives.
            OSError: If the directory cannot be written to.

        """
        self._directory.create()
        with self._directory.alone(_ALONE_SECONDS):
            holder = _holder(self._directory)
            if holder is not None and self._lives(holder):
                raise DirectoryInUseError(
                    f"{self._directory} is in use by process {holder['pid']} on {holder['host']}. Give this run "
                    f"another dirpath, or end that process; if you are sure that it is gone, delete "
                    f"{self._directory.file(FILE)}."
                )
            # It may have written more before it ended.
            holder = _holder(self._directory)
            self._go_on_from(holder)
            # A holder that was killed in a beat leaves what it had written of it.
            self._directory.sweep(".")
            self._write()
            _held_here.add(self.token)
        self._start(self._keep_beating)

    def succeed(self, token: str) -> None:
        """Take over the lease of a process of the same run that died.

        Args:
            token: Its token.

        """
        self.token = token
        with suppress(OSError):
            self._go_on_from(_holder(self._directory))
            if not self._is_lost():
                self._write()
        _held_here.add(self.token)
        self._start(self._keep_beating)

    def _go_on_from(self, holder: dict[str, Any] | None) -> None:
        if holder is not None:
            self.run = str(holder.get("run", self.run))
            self.incarnation = int(holder.get("incarnation", 0))
            self.left_unstored = bool(holder.get("unstored"))

    def begin(self, incarnation: int) -> None:
        """Note the number of this start, so that no later one takes it.

        Args:
            incarnation: The number.

        """
        self.incarnation = incarnation
        if self.token in _held_here:
            with suppress(OSError):
                self._write()

    def watch(self, token: str, run: str) -> None:
        """Follow the lease that another rank of this run holds.

        Args:
            token: Its token.
            run: The run's name.

        """
        self.token, self.run = token, run
        self._start(self._keep_watching)

    def is_visible(self, token: str) -> bool:
        """Return whether this process sees the lease file that another one wrote."""
        return token_of(self._directory) == token

    def _start(self, loop: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=loop, name="scar-lease", daemon=True)
        self._thread.start()

    def release(self, is_stored: bool = True, has_memory: bool = False) -> None:
        """Release the directory. Never raises: a file that is left behind names a process that is gone.

        Args:
            is_stored: Whether all that this holder saved is in storage.
            has_memory: Whether it, or another rank, may have left something in memory. The file stays then, so that
                the next one knows the run.

        """
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        with suppress(OSError):
            if self.token in _held_here and not self.lost and not self._is_lost():
                if is_stored and not has_memory and not self.left_unstored:
                    self._directory.delete(FILE)
                else:
                    self._write(released=True, is_stored=is_stored)
        _held_here.discard(self.token)

    def _keep_beating(self) -> None:
        # If another host took the directory at the same moment, notice it at once.
        pause = min(_FIRST_BEAT_SECONDS, BEAT_SECONDS)
        while not self._stop.wait(pause):
            pause = BEAT_SECONDS
            # The writer reports a full or missing disk; the beat continues when it is back.
            with suppress(OSError):
                if self._is_lost():
                    return
                self._beat += 1
                self._write()

    def _keep_watching(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with suppress(OSError):
                if self._is_lost():
                    return

    def _is_lost(self) -> bool:
        token = token_of(self._directory)
        self.lost = token is not None and token != self.token
        return self.lost

    def _write(self, released: bool = False, is_stored: bool = False) -> None:
        # What the beat writes must not be older than what another thread has just written.
        with self._writing:
            holder = {
                "token": self.token,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": _start_of(os.getpid()),
                "beat": self._beat,
                "run": self.run,
                "incarnation": self.incarnation,
                "unstored": (self._memory and not is_stored) or self.left_unstored,
                "released": released,
            }
            self._directory.write(FILE, [json.dumps(holder).encode()])

    def _lives(self, holder: dict[str, Any]) -> bool:
        if holder.get("released"):
            return False
        if holder["host"] != socket.gethostname():
            return self._still_beats(holder)
        if holder["pid"] == os.getpid():
            return holder["token"] in _held_here
        try:
            # A killed process that its parent has not waited for yet no longer writes.
            is_dead = psutil.Process(holder["pid"]).status() == psutil.STATUS_ZOMBIE
            return not is_dead and _start_of(holder["pid"]) == holder["started"]
        except psutil.NoSuchProcess:
            return False

    def _still_beats(self, holder: dict[str, Any]) -> bool:
        deadline = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, WATCH_SECONDS / 10))
            now = _holder(self._directory)
            if now is None or now.get("released"):
                return False
            if now["beat"] != holder["beat"] or now["token"] != holder["token"]:
                return True
        return False


def _start_of(pid: int) -> str:
    """Return when a process of this host started, as text that does not change when the clock is set.

    Raises:
        psutil.NoSuchProcess: If there is none.

    """
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # After the name, which may contain anything: proc_pid_stat(5), field 22.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{boot} {ticks}"
    return str(psutil.Process(pid).create_time())


def token_of(directory: Directory) -> str | None:
    """Return the token of the directory's present or last holder; ``None`` if there is none."""
    holder = _holder(directory)
    return None if holder is None else str(holder["token"])


def run_of(directory: Directory) -> str | None:
    """Return the name of the directory's run; ``None`` if there is none."""
    holder = _holder(directory)
    return None if holder is None or "run" not in holder else str(holder["run"])


def _holder(directory: Directory) -> dict[str, Any] | None:
    try:
        holder: dict[str, Any] = json.loads(directory.read(FILE))
    except (FileNotFoundError, ValueError):
        return None
    return holder
