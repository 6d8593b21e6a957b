"""Injects faults into nodes at random moments of their tasks' lives, and prints a table of what they broke.

Exit status 1 on any violation.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import redis

from tests.faults.faults import FAULTS, Fault
from tests.faults.rig import Lost, Rig
from tests.kit import network
from tests.kit.clock_shim import compiler

QUICK, LONG = 30, 500
EX_UNAVAILABLE = 69
WRONG = (Lost, AssertionError, OSError, subprocess.SubprocessError, redis.RedisError)


@dataclass
class Outcome:
    """The results of all injections."""

    done: Counter[str] = field(default_factory=Counter)
    violations: list[tuple[str, int, str]] = field(default_factory=list)
    """Fault, seed, and what was wrong."""
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def plan(count: int, seed: int, only: str, skipped: dict[str, str], *, long: bool) -> list[tuple[Fault, int]]:
    """The faults to inject, each with its own seed: every fault once in random order, then faults drawn by weight."""
    rng = random.Random(seed)
    no_disks = _cannot_mount()
    no_clock = "" if compiler() else "setting the node's clock needs a C compiler"
    no_network = network.why_not()
    for each in FAULTS:
        too_long = each.long and not long and not only
        short = "it takes minutes: with --long, or --only" if too_long else ""
        lacks = (no_disks if each.disk else "") or (no_clock if each.sets_clock else "")
        if why := lacks or (no_network if each.network else "") or short:
            skipped[each.name] = why
    able = [each for each in FAULTS if only in each.name and each.name not in skipped]
    if not able:
        raise SystemExit(
            f"no fault of this machine has {only!r} in its name; --only is a part of one, such as 'child:'"
        )
    chosen = rng.sample(able, len(able))[:count]
    chosen += rng.choices(able, weights=[each.weight for each in able], k=count - len(chosen))
    return [(each, rng.getrandbits(32)) for each in chosen]


def _cannot_mount() -> str:
    if os.geteuid() != 0:
        return "mounting a small tmpfs needs root"
    probe = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
    )
    return "" if probe.returncode == 0 else "this system does not allow mounting a tmpfs"


def run(injections: list[tuple[Fault, int]], arguments: argparse.Namespace, outcome: Outcome) -> None:
    """Make all injections, in several rigs at once. Faults that need a small disk share one rig per kind of disk."""
    began = time.monotonic()
    piles: dict[str | None, queue.SimpleQueue[tuple[Fault, int]]] = {}
    for each in injections:
        piles.setdefault(each[0].disk, queue.SimpleQueue()).put(each)
    lock = threading.Lock()
    disks: list[str | None] = [disk for disk in piles if disk is not None] + [None] * max(1, arguments.jobs)
    threads = [
        threading.Thread(target=_work, args=(piles[disk], disk, arguments, outcome, lock))
        for disk in disks
        if disk in piles
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcome.seconds = time.monotonic() - began


def _work(
    pile: queue.SimpleQueue[tuple[Fault, int]],
    disk: str | None,
    arguments: argparse.Namespace,
    outcome: Outcome,
    lock: threading.Lock,
) -> None:
    """Work through the pile, one rig at a time; after a violation the next injection gets a new rig."""
    while not pile.empty():
        try:
            with Rig(arguments.isolation, disk) as rig:
                _inject_all(rig, pile, arguments, outcome, lock)
        except WRONG as error:
            with lock:
                outcome.violations.append(("none: the node could not be started or stopped", 0, _line(error)))
                print(f"VIOLATION without a fault: {_line(error)}", file=sys.stderr, flush=True)
            return


def _inject_all(
    rig: Rig,
    pile: queue.SimpleQueue[tuple[Fault, int]],
    arguments: argparse.Namespace,
    outcome: Outcome,
    lock: threading.Lock,
) -> None:
    wrong = ""
    while not wrong:
        try:
            fault, seed = pile.get_nowait()
        except queue.Empty:
            return
        wrong = _inject(rig, fault, seed)
        with lock:
            outcome.done[fault.name] += 1
            if wrong:
                outcome.violations.append((fault.name, seed, wrong))
                print(f"VIOLATION {fault.name} (seed {seed}): {wrong}", file=sys.stderr, flush=True)
                if arguments.verbose:
                    print(rig.node.text()[-5000:], file=sys.stderr, flush=True)


def _inject(rig: Rig, fault: Fault, seed: int) -> str:
    """Inject one fault; returns what was wrong after it, empty if nothing was."""
    try:
        rig.begin()
        fault.act(rig, random.Random(seed))
        rig.check()
        errors = [line for line in rig.node.text().splitlines() if "Traceback" in line or "unhandled error" in line]
        if errors:
            return f"the node's log has an unexpected error: {errors[0]}"
        rig.settle()
    except WRONG as error:
        return _line(error)
    except Exception as error:  # noqa: BLE001 - the row itself is wrong: no run may count as good with it
        return f"the row itself failed: {_line(error)}"
    return ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def rows(outcome: Outcome) -> list[tuple[str, int, int]]:
    bad = Counter(name for name, _, _ in outcome.violations)
    return [(each.name, outcome.done[each.name], bad[each.name]) for each in FAULTS if outcome.done[each.name]]


def as_text(outcome: Outcome) -> str:
    lines = [f"{'fault':<60} {'injections':>12} {'violations':>12}"]
    lines += [f"{name:<60} {count:>12} {bad:>12}" for name, count, bad in rows(outcome)]
    lines.append(f"{'all':<60} {outcome.done.total():>12} {len(outcome.violations):>12}")
    lines += [f"left out: {name}\n  ({why})" for name, why in outcome.skipped.items()]
    return "\n".join(lines)


def as_markdown(outcome: Outcome, arguments: argparse.Namespace) -> str:
    lines = [
        "# Fault matrix",
        "",
        f"`scripts/faults{' --long' * arguments.long}`: {outcome.done.total()} injections at random moments of tasks' "
        f"lives, seed {arguments.seed}, isolation `{arguments.isolation}`, in {outcome.seconds:.0f} s on "
        f"{os.cpu_count()} cores, {arguments.jobs + 2} nodes at once; **{len(outcome.violations)} violations**.",
        "",
        "Checked after each: exactly one terminal event for each accepted task, with the right verdict; no more",
        "processes, cgroups, files in `tmp/` and `spool/`, and open descriptors of the supervisor and its fork servers",
        "than before; the slot is idle, also in Redis; no heartbeat was more than a second late; the next task runs.",
        "",
        "| fault | injections | violations |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {count} | {bad} |" for name, count, bad in rows(outcome)),
        f"| all | {outcome.done.total()} | {len(outcome.violations)} |",
    ]
    lines += [""] if outcome.skipped or outcome.violations else []
    lines += [f"Left out here: {name} ({why})." for name, why in outcome.skipped.items()]
    lines += [f"Violation: {name} (seed {seed}): {wrong}" for name, seed, wrong in outcome.violations]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/faults", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help=f"{QUICK} injections (the default)")
    length.add_argument("--long", action="store_true", help=f"{LONG} injections, about 15 minutes")
    parser.add_argument("--injections", type=int, help="number of injections instead")
    parser.add_argument("--seed", type=int, default=None, help="the same seed gives the same faults")
    parser.add_argument("--jobs", type=int, default=2, help="nodes in use at once, in addition to two with small disks")
    parser.add_argument("--isolation", choices=["auto", "cgroup", "subreaper"], default="auto")
    parser.add_argument("--only", default="", metavar="TEXT", help="only faults with this text in their names")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the table there as markdown")
    parser.add_argument("--verbose", action="store_true", help="print the node's log after a violation")
    arguments = parser.parse_args(argv)
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().getrandbits(32)
    if shutil.which("redis-server") is None and shutil.which("valkey-server") is None:
        print("no redis-server on this machine: apt-get install redis-server", file=sys.stderr)
        return EX_UNAVAILABLE
    count = arguments.injections or (LONG if arguments.long else QUICK)
    outcome = Outcome()
    injections = plan(count, arguments.seed, arguments.only, outcome.skipped, long=arguments.long)
    print(f"{len(injections)} injections, seed {arguments.seed}", flush=True)
    run(injections, arguments, outcome)
    print(as_text(outcome))
    if arguments.output is not None:
        arguments.output.write_text(as_markdown(outcome, arguments))
    complete = outcome.done.total() == len(injections)
    if not complete:
        print(f"only {outcome.done.total()} of {len(injections)} injections were made", file=sys.stderr)
    return 0 if complete and not outcome.violations else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
