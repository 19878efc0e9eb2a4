"""Deferred signals, and forked children that inherit their handlers."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lightning_scar.core.signals import DeferredSignals, PassedOnSignals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork")

told: list[int] = []
NUMBERS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(params=["deferred", "passed on"])
def signals(request: pytest.FixtureRequest) -> Iterator[DeferredSignals]:
    told.clear()
    signals = DeferredSignals(NUMBERS) if request.param == "deferred" else PassedOnSignals(NUMBERS, told.append)
    yield signals
    signals.restore()


def forked() -> "multiprocessing.context.ForkProcess":
    context = multiprocessing.get_context("fork")
    lives = context.Event()
    process = context.Process(target=_live, args=(lives,), daemon=True)
    process.start()
    # Python itself forgets signals that come while it forks.
    assert lives.wait(30)
    return process


def _live(lives: Any) -> None:
    lives.set()
    time.sleep(100)


def test_a_forked_child_that_is_terminated_dies_and_tells_nobody(signals: DeferredSignals) -> None:
    child = forked()
    child.terminate()
    child.join(30)
    assert child.exitcode == -signal.SIGTERM
    assert (signals.received, told) == (None, [])


def test_a_forked_child_leaves_ctrl_c_to_the_program(signals: DeferredSignals) -> None:
    child = forked()
    assert child.pid is not None
    for _ in range(2):
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.05)
    child.terminate()
    child.join(30)
    assert child.exitcode == -signal.SIGTERM


def test_the_program_itself_is_told(signals: DeferredSignals) -> None:
    signal.raise_signal(signal.SIGTERM)
    assert [signals.received, *told] in ([signal.SIGTERM], [None, signal.SIGTERM])
