"""nvidia-smi, asked and never told: only queries, each within a few seconds."""

from __future__ import annotations

import re
import subprocess

TIMEOUT_S = 10.0
FIELDS = ("index", "name", "uuid", "memory.total", "driver_version")
READINGS = "index,memory.used,utilization.gpu,power.draw,temperature.gpu,pstate"


class NoSmi(Exception):
    """Raised when nvidia-smi is missing, fails or does not answer."""


def ask(*arguments: str) -> str:
    """
    Raises:
        NoSmi: with the reason.
    """
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise NoSmi("nvidia-smi is not installed") from None
    except subprocess.TimeoutExpired:
        raise NoSmi(f"nvidia-smi did not answer within {TIMEOUT_S:.0f} s: the driver hangs") from None
    if done.returncode:
        raise NoSmi(f"nvidia-smi ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def gpus() -> list[dict[str, str]]:
    """Each GPU's FIELDS."""
    lines = ask(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits").splitlines()
    return [dict(zip(FIELDS, (part.strip() for part in line.split(",")), strict=True)) for line in lines if line]


def cuda_version() -> str | None:
    """The newest CUDA version of the driver, which no query has."""
    found = re.search(r"CUDA (?:UMD )?Version\s*:\s*([\d.]+)", ask())
    return found[1] if found else None


def readings() -> str:
    """What it shows now, for evidence; why not, where it does not answer."""
    try:
        processes = ask("--query-compute-apps=pid,used_memory,name", "--format=csv")
        return f"{ask(f'--query-gpu={READINGS}', '--format=csv')}{processes}"
    except NoSmi as error:
        return str(error)
