"""The command line of ``lightning-scar run``, in torchrun's words."""

import os
import sys
from argparse import REMAINDER, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from contextlib import closing

from lightning_scar.elastic.prepared.starter import Starter
from lightning_scar.elastic.supervisor.folder import MemoryFolder
from lightning_scar.elastic.supervisor.job import Job, LaunchError, Layout
from lightning_scar.elastic.supervisor.policy import Policy
from lightning_scar.elastic.supervisor.token import VARIABLE as TOKEN
from lightning_scar.elastic.supervisor.wording import tell_user
from lightning_scar.elastic.worker.state_folder import IMPORTS

_EXAMPLES = """examples:
  lightning-scar run --nproc-per-node 4 train.py --lr 0.1
  lightning-scar run --nproc-per-node 4 -m pkg.train --lr 0.1
  lightning-scar run --nproc-per-node 4 -- -O -m pkg.train --lr 0.1     everything after -- goes to Python
  lightning-scar run --nproc-per-node 8 --nnodes 2 --node-rank 0 --rdzv-endpoint node0:29500 train.py
"""
#: What torchrun uses where no port is named.
_DEFAULT_PORT = 29500


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return its exit code."""
    parser = _parser()
    options = _parsed(parser, arguments)
    if not options.command:
        parser.error("which script? give a file, -m and a module, or -- and Python's arguments")
    try:
        job = _job(options)
        with closing(MemoryFolder()) as folder, closing(_starter(job, folder)) as starter:
            # It imports while this process imports torch itself, and looks for the others.
            from lightning_scar.elastic.supervisor.main import supervise

            return supervise(job, folder, starter)
    except LaunchError as error:
        tell_user(str(error))
        return 1


def _parsed(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    if "--" in arguments:
        here = list(arguments).index("--")
        options = parser.parse_args(arguments[:here])
        if not options.command:
            options.command = [sys.executable, *arguments[here + 1 :]]
            return options
    options = parser.parse_args(arguments)
    if options.command:
        # Unbuffered, as in torchrun: output of a worker that is killed is not lost.
        options.command = [sys.executable, "-u", *(["-m"] if options.module else []), *options.command]
    return options


def _job(options: Namespace) -> Job:
    if not 0 <= options.node_rank < options.nnodes:
        raise LaunchError(f"--node-rank is {options.node_rank}; of {options.nnodes} nodes the first is number 0")
    host, port = _endpoint(options)
    layout = Layout(options.node_rank, options.nnodes, _workers(options.nproc_per_node))
    policy = Policy(
        max_restarts=options.max_restarts,
        restart_window=options.restart_window,
        hang_timeout=options.hang_timeout or Policy.hang_timeout,
        stop_timeout=options.stop_timeout,
        node_timeout=options.node_timeout,
    )
    if options.spares < 0 or (options.spares and options.fresh):
        raise LaunchError(f"--spares is {options.spares}; it takes a number from 0, and none together with --fresh")
    return Job(
        options.command,
        layout,
        policy,
        host,
        port,
        options.rdzv_id,
        options.hang_timeout,
        prepared=not options.fresh,
        spares=options.spares,
    )


def _starter(job: Job, folder: MemoryFolder) -> Starter:
    # Workers do not need the token, and what logs their environment should not know it.
    common = {TOKEN: ""}
    if job.layout.per_node > 1 and "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = "1"
    return Starter(job.command, common, folder.path / IMPORTS, tell_user, job.prepared)


def _endpoint(options: Namespace) -> tuple[str, int]:
    host, port = options.master_addr, options.master_port
    if options.rdzv_endpoint:
        host, _, text = options.rdzv_endpoint.rpartition(":")
        if not host:
            host, text = options.rdzv_endpoint, ""
        if text and not text.isdecimal():
            raise LaunchError(f"--rdzv-endpoint is {options.rdzv_endpoint!r}; its form is host:port")
        port = int(text) if text else port
    if port is not None and port >= 1 << 16:
        raise LaunchError(f"the port is {port}; the highest is 65535")
    if options.nnodes == 1:
        return host or "127.0.0.1", port or 0
    if not host:
        raise LaunchError("several nodes need the address of node 0: add --rdzv-endpoint host:port on each")
    return host.strip("[]"), port or _DEFAULT_PORT


def _workers(text: str) -> int:
    if text in ("gpu", "auto"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.device_count()
        if text == "gpu":
            raise LaunchError("--nproc-per-node is gpu, and there is none")
    if text in ("cpu", "auto"):
        return os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise LaunchError(f"--nproc-per-node is {text!r}; it takes a number from 1, gpu, cpu or auto")
    return int(text)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-scar run",
        usage="lightning-scar run [options] (script.py | -m module | -- python arguments) ...",
        description="Run a script in several workers, as torchrun does, and replace those that die.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(name: str, **options: object) -> None:
        also = "--" + name.removeprefix("--").replace("-", "_")
        parser.add_argument(*dict.fromkeys((name, also)), **options)  # type: ignore[arg-type]

    default = Policy()
    add("--nproc-per-node", default="1", metavar="N", help="workers on this node: a number, gpu, cpu or auto")
    add("--nnodes", type=int, default=1, metavar="K", help="nodes; the command runs on each")
    add("--node-rank", type=int, default=0, metavar="R", help="this node's number, from 0")
    add("--rdzv-endpoint", default="", metavar="HOST:PORT", help="node 0's address")
    add("--rdzv-id", default="", metavar="ID", help="a name for the job, passed on to the workers")
    add("--master-addr", default="", metavar="HOST", help="instead of --rdzv-endpoint")
    add("--master-port", type=int, default=None, metavar="PORT", help="instead of --rdzv-endpoint")
    add(
        "--max-restarts",
        type=int,
        default=default.max_restarts,
        metavar="M",
        help="failures within the window that lead to a restart (%(default)s)",
    )
    add("--restart-window", type=float, default=default.restart_window, metavar="SECONDS", help="(%(default)s)")
    add(
        "--hang-timeout",
        type=float,
        default=None,
        metavar="SECONDS",
        help="kill a worker for which the others have waited longer (the process group's timeout)",
    )
    add(
        "--stop-timeout",
        type=float,
        default=default.stop_timeout,
        metavar="SECONDS",
        help="time for workers to save and exit when the job is stopped (%(default)s)",
    )
    add(
        "--node-timeout",
        type=float,
        default=default.node_timeout,
        metavar="SECONDS",
        help="how long to wait for a lost node; 0 ends the job at once (%(default)s)",
    )
    add(
        "--spares",
        type=int,
        default=0,
        metavar="K",
        help="replacements on each node that have run the script up to where it asks for its rank (%(default)s)",
    )
    add(
        "--fresh",
        action="store_true",
        help="start every worker as a program of its own, not as a fork of a process that has imported what it needs",
    )
    add("--standalone", action="store_true", help="accepted as torchrun does; one node is the default")
    parser.add_argument("-m", "--module", action="store_true", help="the script is a module, as for python -m")
    parser.add_argument("command", nargs=REMAINDER, metavar="script ...", help="the script and its arguments")
    return parser
