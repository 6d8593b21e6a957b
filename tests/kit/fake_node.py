"""A node's peer side in plain Python: speaks docs/contract.md §1 on Redis and the control protocol, and runs nothing.

A program: `python -m tests.kit.fake_node --set=redis.url=… --set=node.state_dir=… --set=node.worker_id=…`. What it
does with a task is in the task's `spec.fake`: {events: [watch lines], result, error, wait: true (until cancelled),
die: exit code, silent: true (no watch at all), child: true (leave a process behind)}. `FAKE_NODE` in its
environment: `refuse` ends at once with 78, `crash` with 3, `stubborn` ignores SIGTERM.
"""

import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import redis

HARDWARE = {
    "cpu": {"logical_cores": 4, "model": "fake"},
    "memory": {"total_bytes": 8 * 2**30},
    "gpu": {"driver_version": None, "cuda_version": None, "gpus": []},
    "network": {"ip": "127.0.0.1"},
}


def now():
    return datetime.datetime.now(datetime.UTC).isoformat()


def register(
    client, worker_id, *, status="IDLE", hardware=HARDWARE, tags=(), cost="1.0", types=None, node="", ttl=120, **extra
):
    """A worker as docs/contract.md §1.1 has it."""
    env = {} if types is None else {"task_types": list(types)}
    if node:
        env["node"] = node
    fields = {
        "worker_id": worker_id,
        "status": status,
        "started_at": now(),
        "pid": "1",
        "env_json": json.dumps(env),
        "hardware_json": json.dumps(hardware),
        "tags_json": json.dumps(list(tags)),
        "last_seen": now(),
        "cost_per_hour": cost,
        **extra,
    }
    client.hset(f"worker:{worker_id}", mapping=fields)
    if ttl is not None:
        client.set(f"worker:{worker_id}:hb", now(), ex=ttl or None)
    client.sadd("workers:ids", worker_id)


def finish(client, worker_id, task_id, *, error=None, **payload):
    """A task's terminal event."""
    event = {
        "type": "TASK_FAILED" if error else "TASK_SUCCEEDED",
        "ts": now(),
        "worker_id": worker_id,
        "task_id": task_id,
        "payload": {"runtime_sec": 0.5, **payload},
    }
    if error:
        event["error"] = error
    client.publish("tasks.events", json.dumps(event))


class FakeNode:
    def __init__(self, settings):
        self.worker_id = settings["node.worker_id"]
        self.state_dir = Path(settings["node.state_dir"])
        self.results = Path(
            settings.get("results.dir") or os.environ.get("RESULTS_DIR") or "results_workers"
        ).absolute()
        self.client = redis.Redis.from_url(settings["redis.url"])
        self.changed = threading.Condition()
        self.lines = {}  # task id → watch lines so far
        self.cancels = []
        self.drained = None
        (self.state_dir / "run").mkdir(parents=True, exist_ok=True)
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(self.state_dir / "run" / "control.sock"))
        self.server.listen()

    def serve(self):
        threading.Thread(target=self.accept, daemon=True).start()
        subscription = self.client.pubsub(ignore_subscribe_messages=True)
        subscription.subscribe("tasks")
        subscription.get_message(timeout=5)
        register(self.client, self.worker_id)
        for message in subscription.listen():
            task = json.loads(message["data"])
            if task["assigned_worker"] == self.worker_id:
                threading.Thread(target=self.run, args=(task,), daemon=True).start()

    def say(self, task_id, line):
        with self.changed:
            self.lines.setdefault(task_id, []).append(line)
            self.changed.notify_all()

    def run(self, message):
        task_id, spec = message["task_id"], message["task"]["spec"]
        fake = spec.get("fake", {})
        out_dir = self.results / task_id
        (out_dir / "logs").mkdir(parents=True)
        (out_dir / "message.json").write_text(json.dumps(message))
        for line in fake.get("events", []):
            self.say(task_id, line)
            time.sleep(fake.get("pace", 0))
        error, kind = fake.get("error"), fake.get("kind", "error")
        if fake.get("child"):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
            (out_dir / "child.pid").write_text(str(child.pid))
        if "die" in fake:
            print("about to die", flush=True)
            os._exit(fake["die"])
        if fake.get("wait"):
            with self.changed:
                (out_dir / "waiting").touch()
                self.changed.wait_for(lambda: len(self.cancels) > (1 if fake["wait"] == "stubborn" else 0))
            error, kind = f"cancelled, forced {self.cancels[-1]}", "cancelled"
        if error is None:
            result = fake.get("result", {"ok": True, "echo": spec})
            (out_dir / "responses.json").write_text(json.dumps(result))
        finish(self.client, self.worker_id, task_id, error=error, **({"error_kind": kind} if error else {}))
        if not fake.get("silent"):
            end = {"event": "end", "ok": error is None, "verdict": "ok" if error is None else kind, "error": error}
            self.say(task_id, {**end, "out_dir": str(out_dir)})

    def accept(self):
        while True:
            connection, _ = self.server.accept()
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        with connection, connection.makefile("rw") as stream:
            for line in stream:
                request = json.loads(line)
                if request["op"] == "watch":
                    self.watch(stream, request["task_id"])
                    return
                stream.write(json.dumps(self.reply(request)) + "\n")
                stream.flush()

    def watch(self, stream, task_id):
        sent = 0
        while True:
            with self.changed:
                while not (fresh := self.lines.get(task_id, [])[sent:]):
                    self.changed.wait()
            sent += len(fresh)
            for line in fresh:
                stream.write(json.dumps(line) + "\n")
                stream.flush()
                if line["event"] == "end":
                    return

    def reply(self, request):
        match request["op"]:
            case "status":
                return self.status()
            case "logs":
                out_dir = self.results / request["task_id"]
                if not out_dir.is_dir():
                    return {"ok": False, "error": f"no task {request['task_id']} on this node"}
                running = not (out_dir / "responses.json").exists()
                return {"ok": True, "out_dir": str(out_dir), "logs_dir": str(out_dir / "logs"), "running": running}
            case "cancel":
                if not (self.results / request["task_id"]).is_dir():
                    return {"ok": False, "error": f"no task {request['task_id']} on this node"}
                with self.changed:
                    self.cancels.append(request["force"])
                    self.changed.notify_all()
                return {"ok": True}
            case "drain":
                self.drained = request["mode"]
                return {"ok": True, "mode": request["mode"]}
        return {"ok": False, "error": f"unknown operation {request['op']!r}"}

    def status(self):
        worker = {"worker_id": self.worker_id, "slot": "all", "status": "RUNNING", "task_id": "task-1", "gpus": []}
        progress = {"done": 12, "total": 64, "unit": "items", "metrics": {"tokens_per_s": 1234.5}}
        task = {
            "task_id": "task-1",
            "task_type": "inference",
            "state": "running",
            "phase": "generate",
            "progress": progress,
            "pid": 4711,
            "started_at": now(),
            "out_dir": str(self.results / "task-1"),
        }
        return {
            "ok": True,
            "pid": os.getpid(),
            "version": "0.1.0",
            "uptime_s": 4000.0,
            "redis_up": True,
            "draining": self.drained,
            "isolation": "cgroup",
            "workers": [worker],
            "tasks": [] if self.drained else [task],
            "queued": 0,
            "outbox": 3,
            "of_a_newer_node": 1,
        }


def main():
    mode = os.environ.get("FAKE_NODE", "")
    print("the fake node begins", flush=True)
    if mode == "refuse":
        print("flowmesh-supervisor: conf.toml: redis.timeout_s: expected a number", flush=True)
        sys.exit(78)
    if mode == "crash":
        sys.exit(3)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "stubborn" else signal.SIG_DFL)
    FakeNode(dict(argument.removeprefix("--set=").split("=", 1) for argument in sys.argv[1:])).serve()


if __name__ == "__main__":
    main()
