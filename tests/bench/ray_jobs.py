"""Ray on this machine, and what it is asked for: has it run one of `peer_jobs` for each line of its input.

A program: `python -m tests.bench.ray_jobs FOLDER [fresh]`; with `fresh`, in a new process for each job. A line is the
job's name and its arguments, with spaces between. It writes `ready`, then `ok` for each job, and ends at the end of
its input.
"""

from __future__ import annotations

import sys

import ray

from tests.bench import peer_jobs

STORE_BYTES = 80 << 20
"""Ray's least size of its store of objects."""


def main(folder: str, *, fresh: bool) -> None:
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, _node_ip_address="127.0.0.1",
             object_store_memory=STORE_BYTES, log_to_driver=False, logging_level="ERROR")  # fmt: skip
    remote = ray.remote(max_calls=1) if fresh else ray.remote
    jobs = {job.__name__: remote(job) for job in (peer_jobs.nothing, peer_jobs.infer)}
    print("ready", flush=True)
    for line in sys.stdin:
        name, *arguments = line.split()
        print("ok" if ray.get(jobs[name].remote(*arguments)) else "no result", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], fresh="fresh" in sys.argv[2:])
