"""A Slurm on this machine alone, around a command: python tests/one_machine_slurm.py bash

It needs `apt-get install munge slurmctld slurmd slurm-client`, and no rights, services or settings of the system. Two
nodes stand for two machines: each has all the cores. All of it ends with the command.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue"]
SECONDS_TO_START = 60
# Nodes have names that are also addresses of this machine, where the processes of a job find each other.
CONF = """
ClusterName=alone
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=10
SchedulerParameters=sched_interval=1,bf_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=127.0.0.1 Port={ports[1]} CPUs={cores} RealMemory=4000
NodeName=127.0.0.2 Port={ports[2]} CPUs={cores} RealMemory=4000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE OverTimeLimit=0 State=UP
"""


def missing() -> list[str]:
    """The programs that are not installed. Daemons are often outside of a user's PATH."""
    return [program for program in PROGRAMS if not shutil.which(program, path=search())]


def search() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start Slurm with all its files in `folder`, which has a short path, as sockets need; yield the environment."""
    env = {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": search()}
    host, user, ports = socket.gethostname().partition(".")[0], getpass.getuser(), free_ports(3)
    cores = max(2, os.cpu_count() or 1)
    (folder / "slurm.conf").write_text(CONF.format_map(locals()))
    folder.chmod(0o755)  # or munged refuses it
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    files = {"key-file": "key", "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log"}
    places = [f"--{name}={folder / file}" for name, file in files.items()]
    daemons = []
    try:
        # In the foreground, as children, all of them are sure to be ended.
        for command in (
            ["munged", "--foreground", *places, f"--seed-file={folder / 'seed'}"],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "127.0.0.1"],
            ["slurmd", "-D", "-N", "127.0.0.2"],
        ):
            with (folder / "output.log").open("ab") as output:
                daemons.append(
                    subprocess.Popen(
                        command, env=os.environ | env, stdout=output, stderr=output, start_new_session=True
                    )
                )
            until = time.monotonic() + SECONDS_TO_START
            while command[0] == "munged" and not (folder / "munge.sock").exists() and time.monotonic() < until:
                time.sleep(0.05)
        wait_for_nodes(os.environ | env, folder)
        yield env
    finally:
        with suppress(subprocess.SubprocessError):  # while there is a Slurm that can
            subprocess.run(["scancel", "--full", f"--user={user}"], env=os.environ | env, timeout=10, check=False)
            wait_for_jobs(os.environ | env)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for_nodes(env: dict[str, str], folder: Path) -> None:
    """Until both can take jobs.

    Raises:
        RuntimeError: with the last words of the daemons, if they do not start.
    """
    until = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < until:
        told = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], env=env, capture_output=True, text=True, check=False)
        if told.stdout.split() == ["idle", "idle"]:
            return
        time.sleep(0.1)
    last = [file.read_text(errors="replace")[-500:] for file in folder.glob("*.log")]
    raise RuntimeError("\n".join(["Slurm does not start:", told.stderr, *last]))


def wait_for_jobs(env: dict[str, str]) -> None:
    """Until none is left."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        told = subprocess.run(["squeue", "-h"], env=env, capture_output=True, text=True, timeout=10, check=False)
        if not told.stdout.strip():
            return
        time.sleep(0.2)


def main() -> int:
    if missing():
        print(f"not installed: {', '.join(missing())}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, slurm(Path(folder)) as env:
        return subprocess.call(sys.argv[1:] or ["bash"], env=os.environ | env, preexec_fn=default_sigint)


def default_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
