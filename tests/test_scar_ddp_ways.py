"""Ways to start ``strategy="scar_ddp"``, and what it works with: LightningCLI, loggers, callbacks, other data."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import prepared
import pytest
import torch
from helpers import assert_same
from scar_ddp_runs import DOORS, REFERENCE, TORCHRUN, assert_done, assert_lived_through, reference, train, world_sizes

from lightning_scar import load

STRATEGIES = {
    "by its name": ["--trainer.strategy=scar_ddp"],
    "with arguments": [
        "--trainer.strategy=lightning_scar.SCARDDPStrategy",
        "--trainer.strategy.init_args.on_failure=wait",
    ],
}


@pytest.mark.parametrize("way", STRATEGIES)
def test_lightning_cli(tmp_path: Path, way: str) -> None:
    """A death in a step, and one that has all workers start again, where config.yaml is written."""
    trainer = {"accelerator": "cpu", "devices": 2, "max_epochs": 2, "log_every_n_steps": 1}
    trainer |= {"enable_progress_bar": "false", "default_root_dir": tmp_path}
    arguments = [*STRATEGIES[way], *(f"--trainer.{name}={value}" for name, value in trainer.items())]
    arguments += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}"]
    by_name = way == "by its name"
    faults = [("training_step", 3, 0, "kill") if by_name else ("validation", 0, 0, "kill")]
    training = train(tmp_path, *faults, cli=arguments, **({"run": None} if by_name else {}))
    assert_done(training, steps=24)
    assert (tmp_path / "lightning_logs/version_0/config.yaml").exists()
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]
    if by_name:
        assert world_sizes(training)[3] == 1


@pytest.mark.slow
def test_a_command_of_lightning_cli_that_was_stopped_is_started_again(tmp_path: Path) -> None:
    """Where config.yaml has one fixed place, and Lightning alone would not overwrite it."""
    trainer = {"accelerator": "cpu", "devices": 2, "max_epochs": 2, "enable_progress_bar": "false", "logger": "false"}
    trainer |= {"strategy": "scar_ddp", "default_root_dir": tmp_path}
    arguments = [f"--trainer.{name}={value}" for name, value in trainer.items()]
    arguments += ["--trainer.callbacks+=lightning_scar.SCARCheckpoint", f"--trainer.callbacks.dirpath={tmp_path}/scar"]
    stopped = train(tmp_path, ("training_step", 5, 1, "terminate the job"), cli=arguments)
    assert stopped.code == 143, stopped.console
    assert (tmp_path / "config.yaml").exists()
    assert_done(train(tmp_path, ("training_step", 5, 1, "terminate the job"), cli=arguments), steps=24)


def test_logs_and_checkpoints_go_on_in_the_replacement_of_rank_0(tmp_path: Path) -> None:
    """Lightning's own callbacks, a logger, and a test after the fit."""
    callbacks = ["ModelCheckpoint", "LearningRateMonitor", "EarlyStopping"]
    options: dict[str, Any] = {**REFERENCE, "trainer": {**REFERENCE["trainer"], "max_epochs": 9}}
    faults = [("training_step", 3, 0, "kill"), ("test", 0, 1, "kill")]
    training = train(tmp_path, *faults, **options, callbacks=callbacks, logs=True, test=True)
    # The first validation counts as an improvement, the second does not, by the callback's min_delta.
    assert_done(training, steps=24)
    assert_lived_through_or_restarted(training)
    (version,) = (tmp_path / "logs").iterdir()
    with (version / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows if row.get("loss")]
    # Without rank 0 nobody logs: its replacement comes in at the end of the epoch of 12 steps, if not sooner.
    came_in = steps[3]
    assert 3 < came_in <= 12
    assert steps == [*range(3), *range(came_in, 24)]
    assert [int(row["step"]) for row in rows if row.get("lr-Adam")] == steps
    assert [row["scar/outages"] for row in rows if row.get("scar/outages")] == ["1.0"]
    assert sum(bool(row.get("val_loss")) for row in rows) == 2
    assert sum(bool(row.get("test_loss")) for row in rows) == 1
    last = torch.load(next(version.rglob("last.ckpt")), weights_only=False)
    assert last["global_step"] == 24
    assert_same(last["state_dict"], training.state["state_dict"])
    assert len([path for path in version.rglob("*.ckpt") if path.name != "last.ckpt"]) == 2
    tested = [result["tested"] for result in training.results.values()]
    assert tested[0] == tested[1]
    assert_same(training.results[0]["fitted"], training.state["state_dict"])


def assert_lived_through_or_restarted(training: Any) -> None:
    assert "rank 0 was killed by SIGKILL in step 4; 1 of 2 workers go on" in training.console
    assert "starting all workers again" in training.console


def test_iterable_data_has_no_extra_batches(tmp_path: Path) -> None:
    faults = [("training_step", 3, 0, "kill")]
    training = train(tmp_path, *faults, strategy={"on_failure": "buffer"}, data={"iterable": True})
    assert_done(training, steps=24)
    assert_lived_through(training, 1, "rank 0 was killed by SIGKILL")
    assert training.console.count("The group shrinks after a failure instead") == 1
    assert "rank 0 was killed by SIGKILL in step 4; 1 of 2 workers go on" in training.console
    assert training.outages(1)[0]["stale_gradients"] == 0
    # Behind the outage each slot has its own share again.
    for step in training.steps:
        assert all(i % 2 == step["slot"] for batch in step["used"] for i in batch), json.dumps(step)


@pytest.mark.parametrize("door", DOORS)
def test_under_torchrun_it_works_as_ddp(tmp_path: Path, door: str) -> None:
    training = train(tmp_path, command=TORCHRUN, door=door, **REFERENCE)
    assert_done(training, steps=36)
    assert_same(training.state, reference(door=door))
    assert training.console.count("runs without lightning-scar's supervisor") == 1


LAUNCHED = """
import os
import sys
import torch
from accelerate import Accelerator, {launcher}
from lightning_scar import SCARAccelerator, SCARContinuation

def train():
    continuation = SCARContinuation()
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def gradients(x):
        loss = model(x).square().mean()
        accelerator.backward(loss)
        return loss

    with SCARAccelerator(accelerator, sys.argv[1], every_n_steps=1, continuation=continuation) as scar:
        scar.resume()
        for _ in range(3):
            scar.training_step(gradients, torch.ones(2, 2))
            scar.step()
    os.write(1, f"ends with {{accelerator.num_processes}}\\n".encode())  # print writes twice: lines could mix

{call}
"""


@pytest.mark.parametrize(
    ("command", "launcher", "call", "size"),
    [
        ([sys.executable], "notebook_launcher", "notebook_launcher(train, (), num_processes=1)", 1),
        ([sys.executable], "debug_launcher", "debug_launcher(train, num_processes=2)", 2),
        ([sys.executable, "-m", "accelerate.commands.launch", "--cpu"], "utils", "train()", 1),
    ],
)
def test_accelerates_own_launchers_work_without_replacements(
    tmp_path: Path, command: list[str], launcher: str, call: str, size: int
) -> None:
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED.format(launcher=launcher, call=call))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = prepared.run(
        [*command, str(script), str(tmp_path / "scar")],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(f"ends with {size}") == size
    assert done.stdout.count("a worker that dies is not replaced") == 1, done.stdout
    assert load(tmp_path / "scar")["global_step"] == 3
