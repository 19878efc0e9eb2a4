"""Without what only POSIX or Linux has, the package is imported, saves and resumes, and says what it cannot do."""

import subprocess
import sys
from pathlib import Path

#: What Windows lacks: modules, functions, signals, and descriptors of folders. Other libraries are imported before.
WINDOWS = """
import os, signal, sys
import fsspec, numpy, psutil, torch.distributed
if "lightning" in sys.argv:
    import lightning
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("fork", "getuid", "getppid", "killpg", "posix_fadvise", "preadv", "register_at_fork", "sysconf"):
    delattr(os, name)
# Lightning knows by other means that it is on Windows.
for name in ("SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1") if "lightning" not in sys.argv else ():
    delattr(signal, name)
real = os.open
def open_file(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return real(path, *arguments, **options)
os.open = open_file
"""

SAVE = """
import sys, torch, lightning_scar
from lightning_scar import *

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.Adam(model.parameters())
state = {"model": model, "optimizer": optimizer}
data = [torch.randn(2, 4) for _ in range(6)]
with SCARLoop(sys.argv[1], state, every_n_steps=2) as scar:
    for batch in data[scar.resume() : 4]:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        scar.step()
assert torch.equal(lightning_scar.load(sys.argv[1])["state_dict"]["weight"], model.weight)
with SCARLoop(sys.argv[1], state, every_n_steps=2) as scar:
    assert scar.resume() == 4

from lightning_scar.__main__ import main
sys.argv = ["lightning-scar", "run", "train.py"]
main()
"""

TRAIN = """
import sys, warnings
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_scar import SCARCheckpoint, load

options = dict(max_epochs=1, limit_train_batches=6, limit_val_batches=0, accelerator="cpu", logger=False)
scar = SCARCheckpoint(sys.argv[1], every_n_train_steps=2)
Trainer(**options, enable_progress_bar=False, enable_model_summary=False, callbacks=[scar]).fit(BoringModel())
assert load(sys.argv[1])["global_step"] == 6
"""


def run(program: str, *arguments: str | Path, code: int = 0) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout.splitlines()


def test_on_windows_a_loop_saves_and_resumes_and_the_supervisor_refuses(tmp_path: Path) -> None:
    refusal = run(WINDOWS + SAVE, tmp_path / "scar", code=1)[-1]
    assert refusal.startswith("lightning-scar: `lightning-scar run` and strategy='scar_ddp' need Linux or macOS")


def test_on_windows_a_trainer_saves(tmp_path: Path) -> None:
    run(WINDOWS + TRAIN, tmp_path / "scar", "lightning")
