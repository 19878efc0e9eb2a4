"""The supervisor with real processes and real signals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import prepared
import psutil
import pytest
from elastic_helpers import PLAIN, SLEEPER, assert_gone, command, ours, run, running, script, wait_for
from torch.distributed.elastic.utils.distributed import get_free_port

from lightning_scar.elastic.supervisor.command_line import main
from lightning_scar.elastic.supervisor.token import VARIABLE as TOKEN


def test_a_plain_script_whose_worker_is_killed_starts_again_and_ends_well(tmp_path: Path) -> None:
    # This process is the supervisor. With the second start it has two stores; tests before may have left others.
    others = {f"{one.laddr.ip} {one.laddr.port}" for one in psutil.Process().net_connections("inet") if one.laddr}
    what = ["kill", "listen", str(os.getpid())]
    done = run("--nproc-per-node", "2", script(tmp_path, PLAIN), tmp_path, *what)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 is done", "rank 1 is done"]
    assert ours(done.stderr) == ["rank 1 was killed by SIGKILL; starting all workers again"]
    listening = "\n".join(wait_for(tmp_path / "listens0", tmp_path / "listens1")).splitlines()
    assert {address.split()[0] for address in {*listening} - others} == {"127.0.0.1"}


def test_the_cause_is_shown_once_with_its_traceback(tmp_path: Path) -> None:
    done = run("--nproc-per-node", "2", "--max-restarts", "0", script(tmp_path, PLAIN), tmp_path, "raise")
    assert done.returncode == 1
    message = done.stderr.partition("lightning-scar: the job failed: ")[2]
    assert message.startswith("rank 1 exited with code 1.\n")
    assert message.count("ValueError: boom") == 1
    assert message.count("Traceback") == 1
    assert "--max-restarts is 0" in message


def test_last_words_without_a_newline_are_kept(tmp_path: Path) -> None:
    done = run("--nproc-per-node", "2", "--max-restarts", "1", script(tmp_path, SLEEPER), tmp_path, "fail")
    assert done.returncode == 1
    assert done.stderr.count("half a line and bar 1%\nbar 99%\nlast words\n") == 2
    assert "    bar 99%\n    last words\n" in done.stderr
    assert "--max-restarts 1 within 3600 s is used up" in done.stderr


def test_arguments_reach_python_and_the_script_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(tmp_path, "import sys; print(sys.flags.optimize, sys.argv[1:])")
    arguments = ["--", "--max-restarts", "5", "-m", "a b"]
    assert run(path, *arguments).stdout == f"0 {arguments}\n"
    assert run("--fresh", "--", "-O", path, *arguments).stdout == f"1 {arguments}\n"
    monkeypatch.chdir(tmp_path)
    done = prepared.run(
        command("--nproc_per_node=1", "-m", "script", *arguments), capture_output=True, text=True, timeout=100
    )
    assert done.stdout == f"0 {arguments}\n"


def test_workers_have_the_environment_of_torchrun(tmp_path: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE"
    text = f"import os; print(os.environ['RANK'], [os.environ[name] for name in {names.split()}], flush=True)"
    done = run("--nproc-per-node", "2", script(tmp_path, text))
    assert sorted(done.stdout.splitlines()) == [
        "0 ['0', '0', '2', '2', '0', '1', '0', '2']",
        "1 ['1', '1', '2', '2', '0', '1', '1', '2']",
    ]


def test_workers_are_led_to_the_loopback_and_not_told_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "what the user knows better")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv(TOKEN, "of another job on several nodes")
    names = f"GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME MASTER_ADDR {TOKEN}"
    text = f"import os; print(*[os.environ[name] for name in {names.split()}], sep='; ')"
    done = run("--rdzv-endpoint", "an.address.of.this.node", script(tmp_path, text))
    assert done.stdout == f"{'lo0' if sys.platform == 'darwin' else 'lo'}; what the user knows better; 127.0.0.1; \n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_gives_the_exit_code(tmp_path: Path, number: signal.Signals) -> None:
    with running("--nproc-per-node", "2", script(tmp_path, SLEEPER), tmp_path, "sleep", "polite") as supervisor:
        wait_for(tmp_path / "pid0", tmp_path / "pid1")
        supervisor.send_signal(number)
        assert supervisor.wait(20) == 128 + number
    assert wait_for(tmp_path / "saved0", tmp_path / "saved1") == [number.name] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_that_the_script_handles_reaches_its_workers(tmp_path: Path, number: signal.Signals) -> None:
    with running("--nproc-per-node", "2", script(tmp_path, SLEEPER), tmp_path, "handler") as supervisor:
        wait_for(tmp_path / "pid0", tmp_path / "pid1")
        supervisor.send_signal(number)
        assert supervisor.wait(30) == 0
    assert wait_for(tmp_path / "heard0", tmp_path / "heard1") == [f"{number.name}\n"] * 2


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_that_nobody_handles_ends_the_job(tmp_path: Path, number: signal.Signals) -> None:
    with running("--nproc-per-node", "2", script(tmp_path, SLEEPER), tmp_path, "sleep") as supervisor:
        wait_for(tmp_path / "pid0", tmp_path / "pid1")
        supervisor.send_signal(number)
        assert supervisor.wait(20) == 128 + number


def test_workers_that_do_not_stop_are_killed_with_all_that_they_started(tmp_path: Path) -> None:
    options = ["--nproc-per-node", "1", "--stop-timeout", "0.5"]
    with running(*options, script(tmp_path, SLEEPER), tmp_path, "sleep", "stubborn", "child") as supervisor:
        pids = wait_for(tmp_path / "pid0", tmp_path / "child0")
        supervisor.terminate()
        assert supervisor.wait(20) == 143
        assert_gone(*pids)


def test_what_a_worker_started_does_not_outlive_it(tmp_path: Path) -> None:
    done = run("--nproc-per-node", "2", "--max-restarts", "0", script(tmp_path, SLEEPER), tmp_path, "fail", "child")
    assert done.returncode == 1
    assert_gone(*wait_for(tmp_path / "child1"))


def test_the_folder_in_memory_goes_with_the_job(tmp_path: Path) -> None:
    run(script(tmp_path, SLEEPER), tmp_path)
    [folder] = wait_for(tmp_path / "state0")
    assert folder
    assert not Path(folder).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_killed_supervisor_leaves_no_worker_and_its_folder_to_the_next(tmp_path: Path) -> None:
    path = script(tmp_path, SLEEPER)
    # As users start it: the workers die with it by their own program.
    with running("--nproc-per-node", "2", path, tmp_path, "sleep", kind=subprocess.Popen) as supervisor:
        pids = wait_for(tmp_path / "pid0", tmp_path / "pid1")
        supervisor.kill()
        assert_gone(*pids)
    [folder] = wait_for(tmp_path / "state0")
    run(path, tmp_path)
    assert not Path(folder).exists()


def test_a_taken_port_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = script(tmp_path, SLEEPER)
    port = str(get_free_port())
    with running("--master-port", port, path, tmp_path, "sleep"):
        wait_for(tmp_path / "pid0")
        done = run("--master-port", port, path, tmp_path)
    assert done.returncode == 1
    [line] = ours(done.stderr)
    assert port in line
    assert "--master-port" in line
    assert "Traceback" not in done.stderr


def test_two_supervisors_side_by_side(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    with (
        running("--nproc-per-node", "2", script(folders[0], PLAIN), folders[0]) as a,
        running("--nproc-per-node", "2", script(folders[1], PLAIN), folders[1]) as b,
    ):
        assert (a.wait(60), b.wait(60)) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nproc-per-node", "0", "x.py"], "--nproc-per-node is '0'"),
        (["--nnodes", "2", "x.py"], "--rdzv-endpoint"),
        (["--nnodes", "2", "--node-rank", "2", "x.py"], "--node-rank is 2"),
        (["--rdzv-endpoint", "host:port", "x.py"], "host:port"),
    ],
)
def test_bad_options_are_named(arguments: list[str], expected: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert expected in capfd.readouterr().err


def test_no_script(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--nproc-per-node", "2"])
    assert "which script?" in capfd.readouterr().err


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    done = run("--max-restarts", "0", tmp_path / "nothing.py")
    assert done.returncode == 1
    assert "No such file" in done.stderr.partition("the job failed")[2]
