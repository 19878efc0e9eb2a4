"""Workers that speak the protocol, as real processes: replaced, stranded, stopped, hanging."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from elastic_helpers import ours, run, running, script, wait_for

from lightning_scar.elastic.supervisor import coordinator

#: Counts steps of 20 ms, with no process group, until all are together again after a failure.
WORKER = """
import os, sys, time
from pathlib import Path
from torch.distributed import TCPStore
from lightning_scar.elastic.protocol.log import Events, Notices
from lightning_scar.elastic.protocol.messages import *

folder, what = Path(sys.argv[1]), sys.argv[2:]
host, port = os.environ["LIGHTNING_SCAR_STORE"].split(":")
slot, spawn, number = (int(os.environ["LIGHTNING_SCAR_" + name]) for name in ("SLOT", "SPAWN", "GENERATION"))
world_size, state = int(os.environ["WORLD_SIZE"]), Path(os.environ["LIGHTNING_SCAR_STATE"]) / "step"
store = TCPStore(host, int(port), is_master=False, wait_for_workers=False)
events, notices = Events(store), Notices(store)
formed, broken, joining, stop, restart = {}, set(), set(), None, None


def look():
    global stop, restart
    for notice in notices.news():
        if isinstance(notice, Formed):
            formed[notice.generation.number] = notice.generation
            restart = None
        if isinstance(notice, Broken):
            broken.add(notice.generation)
        if isinstance(notice, Joining):
            joining.add(notice.generation)
        if isinstance(notice, Stop):
            stop = notice
        if isinstance(notice, Restart):
            restart = notice


def end():
    events.append(Ended(slot, spawn))
    sys.exit(0)


def next_generation(number):
    while True:
        look()
        for generation in formed.values():
            if generation.number > number and generation.spawns.get(slot) == spawn:
                return generation
        time.sleep(0.01)


def leave(step, boundary, waited=0.0):
    failure = "" if boundary else "reset by peer"
    events.append(Waiting(slot, spawn, generation.number, step, boundary, waited, failure))
    return next_generation(generation.number)


events.append(Registered(slot, spawn))
look()
with open(folder / f"pids{slot}", "a") as file:
    file.write(f"{os.getpid()}\\n")
if number < 0:
    if "late" in what and len((folder / f"pids{slot}").read_text().splitlines()) == 2:
        time.sleep(1000)
    events.append(Ready(slot, spawn))
    generation = next_generation(-1)
    step = generation.step
else:
    generation, step = formed[number], int(state.read_text()) if state.exists() else 0
    (folder / f"resumed{slot}").write_text(str(step))
events.append(Began(slot, spawn))
while generation.number == 0 or len(generation.spawns) < world_size or "endless" in what:
    time.sleep(0.02)
    step += 1
    if step == 1:
        events.append(Stepped(slot, spawn))
    (folder / f"step{slot}").write_text(str(step))
    if "busy" in what and slot == 0 and generation.number == 0 and step == 3:
        time.sleep(2.5)
    look()
    g = generation.number
    if "hang" in what and g == 0 and slot == 1:
        (folder / "hanging").touch()
        time.sleep(1000)
    elif "hang" in what and g == 0 and (folder / "hanging").exists():
        generation = leave(step, False, waited=2)
    elif g in broken and "strand" in what:
        events.append(Stranded(slot, spawn, g, step))
        while restart is None:
            time.sleep(0.01)
            look()
        if restart.keeper == slot:
            state.write_text(str(step))
        sys.exit(RESTART_EXIT_CODE)
    elif g in broken:
        generation = leave(step, False)
    elif g in joining:
        if slot == min(generation.spawns):
            store.compare_set(f"switch/{g}", "", str(step + 10))
        if store.check([f"switch/{g}"]) and step >= int(store.get(f"switch/{g}")):
            generation = leave(step, True)
    if stop is not None:
        (folder / f"saved{slot}").write_text(stop.reason)
        end()
end()
"""


def kill_when_training(folder: Path, slot: int, others: tuple[int, ...]) -> None:
    [pids, *_] = wait_for(folder / f"pids{slot}", *(folder / f"step{one}" for one in (slot, *others)))
    os.kill(int(pids), signal.SIGKILL)


def pids(folder: Path, slot: int) -> int:
    return len((folder / f"pids{slot}").read_text().splitlines())


def test_a_dead_worker_is_replaced_while_the_others_go_on(tmp_path: Path) -> None:
    with running("--nproc-per-node", "3", script(tmp_path, WORKER), tmp_path) as supervisor:
        kill_when_training(tmp_path, 1, others=(0, 2))
        _, err = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 0, err
    assert ours(err) == ["rank 1 was killed by SIGKILL; starting a replacement"]
    assert [pids(tmp_path, slot) for slot in range(3)] == [1, 2, 1]


def test_a_hanging_worker_is_replaced(tmp_path: Path) -> None:
    options = ["--nproc-per-node", "2", "--hang-timeout", "1"]
    with running(*options, script(tmp_path, WORKER), tmp_path, "hang") as supervisor:
        _, err = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 0, err
    assert ours(err) == ["rank 1 hung and was killed; starting a replacement"]


def test_a_lone_survivor_that_is_busy_is_not_killed(tmp_path: Path) -> None:
    options = ["--nproc-per-node", "2", "--hang-timeout", "1"]
    with running(*options, script(tmp_path, WORKER), tmp_path, "busy") as supervisor:
        kill_when_training(tmp_path, 1, others=(0,))
        _, err = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 0, err
    [death, silence] = ours(err)
    assert death == "rank 1 was killed by SIGKILL; starting a replacement"
    assert "for 1 s nothing was heard of rank 0. Nobody else waits" in silence
    assert [pids(tmp_path, slot) for slot in range(2)] == [1, 2]


def test_a_replacement_that_hangs_on_its_way_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "_LEAST_PATIENCE", 2)
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_when_training, tmp_path, 1, (0, 2))
        done = run("--nproc-per-node", "3", script(tmp_path, WORKER), tmp_path, "late")
        killing.result()
    assert done.returncode == 0, done.stderr
    [_, late] = ours(done.stderr)
    assert re.match(r"rank 1 was not ready within \d+ s \(the first start took \d+ s\) and was killed; starting", late)
    assert [pids(tmp_path, slot) for slot in range(3)] == [1, 3, 1]


def test_stranded_workers_start_again_from_what_one_kept(tmp_path: Path) -> None:
    with running("--nproc-per-node", "2", script(tmp_path, WORKER), tmp_path, "strand") as supervisor:
        kill_when_training(tmp_path, 1, others=(0,))
        _, err = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 0, err
    assert [int((tmp_path / f"resumed{slot}").read_text()) > 0 for slot in range(2)] == [True, True]


@pytest.mark.parametrize("max_restarts", ["0", "3"])
def test_workers_are_told_to_stop_and_save(tmp_path: Path, max_restarts: str) -> None:
    options = ["--nproc-per-node", "2", "--max-restarts", max_restarts]
    with running(*options, script(tmp_path, WORKER), tmp_path, "endless") as supervisor:
        if max_restarts == "0":
            kill_when_training(tmp_path, 1, others=(0,))
        else:
            wait_for(tmp_path / "step0", tmp_path / "step1")
            supervisor.terminate()
        _, err = supervisor.communicate(timeout=60)
    if max_restarts == "0":
        assert supervisor.returncode == 1
        assert wait_for(tmp_path / "saved0") == ["rank 1 was killed by SIGKILL"]
        assert "the job failed: rank 1 was killed by SIGKILL" in err
    else:
        assert supervisor.returncode == 143
        assert wait_for(tmp_path / "saved0", tmp_path / "saved1") == ["SIGTERM"] * 2
