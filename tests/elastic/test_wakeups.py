"""What wakes a supervisor and its workers: each waits without end, as far as a test goes, unless it is woken."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest

from lightning_scar.elastic.protocol.doorbell import Doorbell
from lightning_scar.elastic.supervisor.wakeups import Wakeups

#: Longer than any test may take.
FOREVER = 1000.0
SOON = 40.0


@pytest.fixture
def wakeups() -> Iterator[Wakeups]:
    with closing(Wakeups()) as wakeups:
        yield wakeups


def connected(wakeups: Wakeups) -> Doorbell:
    doorbell = Doorbell(wakeups.port)
    wakeups.wait(FOREVER)
    # It rings once, for what there was before.
    assert doorbell.wait(FOREVER)
    return doorbell


def while_waiting(wait: Callable[[], object], wake: Callable[[], object]) -> None:
    """Wakes whoever waits, perhaps before it does."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(wait)
        wake()
        future.result(SOON)


def test_a_ring_wakes_the_supervisor_once(wakeups: Wakeups) -> None:
    doorbell = connected(wakeups)
    doorbell.ring()
    wakeups.wait(FOREVER)
    waited = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: (wakeups.wait(FOREVER), waited.set()))
        assert not waited.wait(0.3)
        doorbell.ring()
    assert waited.is_set()


def test_the_supervisor_rings_at_all(wakeups: Wakeups) -> None:
    doorbells = [connected(wakeups) for _ in range(3)]
    wakeups.ring()
    assert all(doorbell.wait(FOREVER) for doorbell in doorbells)


def test_who_connects_is_rung_for_what_there_was_before(wakeups: Wakeups) -> None:
    doorbell = Doorbell(wakeups.port)
    wakeups.ring()
    assert doorbell.wait(FOREVER)


def test_who_waits_no_longer_than_so_many_seconds_hears_that_the_other_end_is_there(wakeups: Wakeups) -> None:
    assert connected(wakeups).wait(0.01)


def test_a_process_that_is_killed_wakes_the_supervisor(wakeups: Wakeups) -> None:
    """Whatever it has appended to a log, and was killed before it rang, is read."""
    process = multiprocessing.get_context("fork").Process(target=hold, args=(wakeups.port,))
    process.start()
    wakeups.wait(FOREVER)
    process.kill()
    wakeups.wait(FOREVER)
    process.join()


def hold(port: int) -> None:
    doorbell = Doorbell(port)
    while True:
        doorbell.wait(FOREVER)


def test_who_waits_learns_that_the_supervisor_is_gone(wakeups: Wakeups) -> None:
    doorbell = connected(wakeups)
    wakeups.close()
    assert not doorbell.wait(FOREVER)
    doorbell.ring()


def test_a_doorbell_that_is_closed_wakes_the_thread_that_waits(wakeups: Wakeups) -> None:
    doorbell = connected(wakeups)
    while_waiting(lambda: doorbell.wait(FOREVER), doorbell.close)


def test_rings_that_nobody_hears_block_nobody(wakeups: Wakeups) -> None:
    doorbell = connected(wakeups)
    # A connection holds some tens of thousands: the rest is dropped.
    for _ in range(100_000):
        doorbell.ring()
    wakeups.wait(FOREVER)
    wakeups.ring()
    assert doorbell.wait(FOREVER)


def test_news_goes_through_the_supervisor_of_another_node_both_ways(wakeups: Wakeups) -> None:
    with closing(Wakeups(node_0=wakeups.port)) as other:
        worker = connected(other)
        wakeups.wait(FOREVER)
        other.wait(FOREVER)
        assert worker.wait(FOREVER)
        worker.ring()
        other.wait(FOREVER)
        wakeups.wait(FOREVER)
        wakeups.ring()
        other.wait(FOREVER)
        assert worker.wait(FOREVER)


def test_who_introduced_itself_is_named_when_its_connection_breaks(wakeups: Wakeups) -> None:
    with closing(Wakeups(node_0=wakeups.port)) as other:
        wakeups.wait(FOREVER)
        other.introduce("3/1")
        other.report()
        wakeups.wait(FOREVER)
        assert wakeups.gone() == []
    wakeups.wait(FOREVER)
    assert (wakeups.gone(), wakeups.gone()) == (["3/1"], [])


def test_a_node_whose_node_0_is_gone_goes_on_to_wait_for_its_workers(wakeups: Wakeups) -> None:
    with closing(Wakeups(node_0=wakeups.port)) as other:
        wakeups.close()
        other.wait(FOREVER)
        worker = connected(other)
        worker.ring()
        other.wait(FOREVER)


def test_its_own_reports_wake_node_0(wakeups: Wakeups) -> None:
    wakeups.report()
    wakeups.wait(FOREVER)


def test_signals_and_children_that_exit_wake_it(wakeups: Wakeups) -> None:
    # A loader's processes may have left torch's own.
    handler = signal.getsignal(signal.SIGCHLD)
    with ExitStack() as stack:
        heard: list[int] = []
        before = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
        stack.callback(signal.signal, signal.SIGUSR2, before)
        stack.enter_context(wakeups.woken_by_signals())
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        wakeups.wait(FOREVER)
        assert heard == [signal.SIGUSR2]
        child = multiprocessing.get_context("fork").Process(target=lambda: None)
        child.start()
        wakeups.wait(FOREVER)
        child.join()
    assert signal.getsignal(signal.SIGCHLD) == handler
