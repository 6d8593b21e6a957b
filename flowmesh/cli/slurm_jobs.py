"""Slurm's own commands, as far as `flowmesh scale --slurm` needs them."""

from __future__ import annotations

import subprocess

import msgspec

from flowmesh.errors import UnavailableError

TIMEOUT_S = 60.0
COUNTED = "PENDING,CONFIGURING,RUNNING,SUSPENDED,REQUEUED"
"""States of jobs that have a node, or will have one. A job that ends (COMPLETING) has none any more."""


class Job(msgspec.Struct, frozen=True):
    job_id: str
    pending: bool
    """Whether it waits for its allocation."""


def jobs(name: str) -> list[Job]:
    """This user's jobs of a name that have not ended.

    Raises:
        UnavailableError: squeue is not there, or failed.
    """
    answer = _run(["squeue", "--me", "--noheader", "--array", "--name", name, "--states", COUNTED, "--format", "%i %t"])
    found = [line.split() for line in answer.splitlines() if line.strip()]
    return [Job(job_id, state not in ("R", "S")) for job_id, state in found]


def submit(script: str, name: str) -> str:
    """Submit a batch script; returns the job's id.

    Raises:
        UnavailableError: sbatch is not there, or refused it.
    """
    return _run(["sbatch", "--parsable", "--job-name", name, script]).strip().partition(";")[0]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except FileNotFoundError:
        raise UnavailableError(f"{command[0]} is not installed here; run this on a login node of the cluster") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{command[0]}: {error}") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise UnavailableError(f"{command[0]} failed: {said}")
    return done.stdout
