"""A real Slurm of one node, on loopback: munged, slurmctld and slurmd of Debian's packages, without cgroups."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.kit.support import end_process, short_dir, until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
ReturnToService=2
KillWait=60
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 State=UP
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""
"""Jobs of the partition `urgent` preempt those of `main`."""


class Slurm:
    """Runs from its construction to `close`."""

    def __init__(self) -> None:
        if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
            if os.environ.get("CI"):
                pytest.fail(f"no {missing[0]}: scripts/test must install it")
            pytest.skip(f"no {missing[0]}: apt-get install slurmctld slurmd slurm-client munge")
        if os.geteuid() != 0:
            pytest.skip("slurmd must be root")
        self.folder = short_dir()
        host = socket.gethostname().partition(".")[0]
        conf = self.folder / "slurm.conf"
        text = CONF.format(host=host, folder=self.folder, ports=[_free_port(), _free_port()], cpus=os.cpu_count())
        conf.write_text(text)
        for name in ("state", "spool", "jobs"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        self.jobs = self.folder / "jobs"
        """Where jobs are submitted, and write their output."""
        self.env = {**os.environ, "SLURM_CONF": str(conf)}
        self._processes: list[subprocess.Popen[bytes]] = []
        munge = ["--key-file", str(key), "--socket", str(self.folder / "munge.sock")]
        munge += [f"--{name}-file={self.folder / name}" for name in ("log", "pid", "seed")]
        self._start("munged", "--force", "--foreground", *munge)
        until((self.folder / "munge.sock").exists, "munged listens")
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D")
        until(lambda: "idle" in self.run("sinfo", "--noheader", "--format", "%T", check=False), "the node is up")

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "ab") as log:
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.env, cwd=self.folder))

    def run(self, *command: str, check: bool = True, env: dict[str, str] | None = None) -> str:
        """What a command prints."""
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=env or self.env, cwd=self.jobs, timeout=60
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """A job, as scontrol shows it."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(each.split("=", 1) for each in fields if "=" in each)

    def wait_state(self, job: str, state: str) -> None:
        def there() -> bool:
            time.sleep(0.1)  # scontrol costs more than a look
            return self.state(job)["JobState"] == state

        until(there, f"job {job} is {state}")

    def close(self) -> None:
        for job in self.run("squeue", "--noheader", "--format", "%i", check=False).split():
            self.run("scancel", "--signal=KILL", "--full", job, check=False)
        for process in reversed(self._processes):
            end_process(process)
        shutil.rmtree(self.folder, ignore_errors=True)


def text_of(folder: Path) -> str:
    """The output of all jobs."""
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.log")))


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
