"""One live run a directory: who owns it, and how the next one tells that the owner is dead.

The owner's file holds host, process and a beat that grows while the owner lives. On the same host the process is looked
up, so a killed run's directory is free at once; from another host the beat is watched, never compared with a clock.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

import psutil

from lightning_scar.storage.delta import StorageError
from lightning_scar.storage.directory import Directory

FILE = "owner.json"
#: Seconds between two beats, and how long a beat of another host may stand still before its owner counts as dead.
BEAT_SECONDS = 5.0
WATCH_SECONDS = 20.0

_held_here: set[str] = set()


class DirectoryInUseError(StorageError):
    """Another live run owns the directory."""


class Ownership:
    """The right to write to a directory.

    Args:
        directory: The running checkpoint's directory.

    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._token = uuid.uuid4().hex
        self._beat = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = False

    def acquire(self) -> None:
        """Takes the directory, over a dead owner's head if need be.

        Raises:
            DirectoryInUseError: If the owner lives.
            OSError: If the directory cannot be written to.

        """
        owner = self._read()
        if owner is not None and self._lives(owner):
            raise DirectoryInUseError(
                f"{self._directory} is in use by process {owner['pid']} on {owner['host']}. Give this run another "
                f"dirpath, or end that process; if it is gone for certain, delete {self._directory.file(FILE)}."
            )
        self._directory.create()
        self._write()
        _held_here.add(self._token)
        self._thread = threading.Thread(target=self._keep_beating, name="scar-owner", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Gives the directory back. Never raises: a file that stays behind names a process that is gone."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        _held_here.discard(self._token)
        if not self.lost:
            with suppress(OSError):
                self._directory.delete(FILE)

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            # A full or vanished disk is the writer's to report; the beat goes on when it is back.
            with suppress(OSError):
                owner = self._read()
                if owner is not None and owner["token"] != self._token:
                    self.lost = True
                    return
                self._beat += 1
                self._write()

    def _read(self) -> dict[str, Any] | None:
        try:
            owner: dict[str, Any] = json.loads(self._directory.read(FILE))
        except (FileNotFoundError, ValueError):
            return None
        return owner

    def _write(self) -> None:
        process = psutil.Process()
        owner = {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": process.pid,
            "started": process.create_time(),
            "beat": self._beat,
        }
        self._directory.write(FILE, [json.dumps(owner).encode()])

    def _lives(self, owner: dict[str, Any]) -> bool:
        if owner["host"] != socket.gethostname():
            return self._still_beats(owner)
        if owner["pid"] == os.getpid():
            return owner["token"] in _held_here
        try:
            process = psutil.Process(owner["pid"])
            # A process that was killed but not yet waited for writes nothing any more.
            return bool(abs(process.create_time() - owner["started"]) < 2 and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    def _still_beats(self, owner: dict[str, Any]) -> bool:
        deadline = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, WATCH_SECONDS / 10))
            now = self._read()
            if now is None:
                return False
            if now["beat"] != owner["beat"] or now["token"] != owner["token"]:
                return True
        return False
