"""The background writer: bounded, in order, and no error lost."""

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from lightning_scar.storage.writer import DEPTH, BackgroundWriter


@pytest.fixture
def writer() -> Iterator[BackgroundWriter]:
    writer = BackgroundWriter()
    yield writer
    writer.drain()


@pytest.fixture
def gate(writer: BackgroundWriter) -> Iterator[threading.Event]:
    """Holds back what waits for it, until it is set or the test ends."""
    gate = threading.Event()
    yield gate
    gate.set()


def fail(error: BaseException) -> None:
    raise error


def submit_all(writer: BackgroundWriter, *writes: object) -> None:
    for write in writes:
        assert writer.reserve(wait=True)
        writer.submit(write)  # type: ignore[arg-type]


def test_writes_run_one_after_the_other_in_the_order_given(writer: BackgroundWriter) -> None:
    done: list[int] = []
    running = threading.Lock()

    def write(number: int) -> None:
        assert running.acquire(blocking=False)
        done.append(number)
        running.release()

    submit_all(writer, *(lambda number=i: write(number) for i in range(50)))
    writer.drain()
    assert done == list(range(50))
    assert writer.take_errors() == []


def test_writes_run_beside_the_thread_that_submits_them(writer: BackgroundWriter, gate: threading.Event) -> None:
    threads: list[str] = []
    submit_all(writer, lambda: (gate.wait(), threads.append(threading.current_thread().name)))
    assert threads == []
    gate.set()
    writer.drain()
    assert threads == ["scar-writer_0"]


def test_a_full_queue_refuses_who_does_not_wait(writer: BackgroundWriter, gate: threading.Event) -> None:
    submit_all(writer, *[gate.wait] * DEPTH)
    assert writer.depth == DEPTH
    assert not writer.reserve(wait=False)
    gate.set()
    writer.drain()
    assert writer.depth == 0
    assert writer.reserve(wait=False)


def test_a_full_queue_lets_who_waits_in_when_there_is_room(writer: BackgroundWriter, gate: threading.Event) -> None:
    submit_all(writer, *[gate.wait] * DEPTH)
    reserved: list[bool] = []
    waiting = threading.Thread(target=lambda: reserved.append(writer.reserve(wait=True)))
    waiting.start()
    waiting.join(0.05)
    assert reserved == []
    gate.set()
    waiting.join(10)
    assert reserved == [True]


def test_a_place_given_back_is_free_again(writer: BackgroundWriter) -> None:
    for _ in range(3 * DEPTH):
        assert writer.reserve(wait=False)
        writer.give_back()
    assert [writer.reserve(wait=False) for _ in range(DEPTH + 1)] == [True] * DEPTH + [False]


def test_a_place_that_nobody_took_cannot_be_given_back(writer: BackgroundWriter) -> None:
    with pytest.raises(ValueError, match="released too many times"):
        writer.give_back()


def test_errors_wait_in_order_and_later_writes_run_all_the_same(writer: BackgroundWriter) -> None:
    first, second, done = OSError("first"), ValueError("second"), []
    submit_all(writer, lambda: fail(first), lambda: done.append(1), lambda: fail(second), lambda: done.append(2))
    writer.drain()
    assert writer.take_errors() == [first, second]
    assert writer.take_errors() == []
    assert done == [1, 2]


def test_a_write_that_fails_frees_its_place(writer: BackgroundWriter) -> None:
    submit_all(writer, *[lambda: fail(OSError())] * (5 * DEPTH))
    writer.drain()
    assert len(writer.take_errors()) == 5 * DEPTH
    assert [writer.reserve(wait=False) for _ in range(DEPTH)] == [True] * DEPTH


def test_draining_waits_for_everything_and_ends_the_thread(writer: BackgroundWriter, gate: threading.Event) -> None:
    done: list[int] = []
    submit_all(writer, gate.wait, lambda: done.append(1))
    threading.Timer(0.05, gate.set).start()
    writer.drain()
    assert done == [1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scar-writer")]


def test_a_drained_writer_writes_again_and_an_idle_one_drains_at_once(writer: BackgroundWriter) -> None:
    writer.drain()
    done: list[int] = []
    for i in range(2):
        submit_all(writer, lambda number=i: done.append(number))
        writer.drain()
    assert done == [0, 1]


def test_the_end_of_the_program_waits_for_what_is_queued() -> None:
    program = (
        "import time\n"
        "from lightning_scar.storage.writer import BackgroundWriter\n"
        "writer = BackgroundWriter()\n"
        "for i in range(2):\n"
        "    writer.reserve(wait=True)\n"
        "    writer.submit(lambda i=i: (time.sleep(0.1), print(i, flush=True)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]
