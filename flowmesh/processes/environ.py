"""The environment variables of the node's children: an allow-list, so that no secret of the node's gets there."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import flowmesh

PASSED = (
    "PATH", "PYTHONPATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "LD_LIBRARY_PATH",
    "CUDA_HOME", "CUDA_PATH", "CUDA_DEVICE_ORDER", "NVIDIA_*", "NCCL_*", "GLOO_*", "UCX_*",
    "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT",
    "TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE", "TORCH_HOME", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "VLLM_*",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
)  # fmt: skip
"""What a task inherits from the node's own environment; `*` stands for the rest of a name. No tokens among them."""

NEVER = ("REDIS_URL", "ORCHESTRATOR_TOKEN")
"""Not even when the settings ask for it."""

SERVER = {
    # One thread while the libraries are imported: a pool that starts now would be missing in every fork.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    # Asks the driver's library and not the runtime, which would make a context in the server.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # How long an idle OpenMP thread spins before it sleeps: a tenth of libgomp's own 300,000, which takes the core of
    # one that works (on busy cores training was ten times slower with it). On idle cores vLLM and training are as fast
    # with this as with that; with 5,000 vLLM lost a tenth, and with 1,000 a small model's training more than half:
    # threads then sleep between its small operations. Read once, when libgomp is loaded.
    "GOMP_SPINCOUNT": "30000",
    # Likewise for OpenBLAS (numpy, scipy and faiss have one each), whose threads spin as soon as there are any, which
    # is when a task gets its number of threads: for 2^22 cycles, under 2 ms, and not for 2^28, a tenth of a second. On
    # two cores that was half of a small Transformers task's time; linear algebra is as fast with this as with that.
    "OPENBLAS_THREAD_TIMEOUT": "22",
    # One engine in the task's own process, where its parallelism allows that: comes up in a fifth of the time.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "PYTHONUNBUFFERED": "1",
}


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def base(environ: Mapping[str, str], pass_env: Iterable[str]) -> dict[str, str]:
    """What of the node's environment its children may see."""
    patterns = (*PASSED, *pass_env)
    return {name: value for name, value in environ.items() if matches(name, patterns) and name not in NEVER}


def for_server(base_env: Mapping[str, str]) -> dict[str, str]:
    return {**base_env, **SERVER}


def with_package(env: Mapping[str, str]) -> dict[str, str]:
    """`env` for our own interpreter, which then finds this package from wherever we were started."""
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**env, "PYTHONPATH": os.pathsep.join([*paths, str(Path(flowmesh.__file__).parents[1])])}


def for_task(
    base_env: Mapping[str, str],
    *,
    task_env: Mapping[str, str],
    tmp_dir: str,
    threads: int,
    gpus: tuple[str, ...],
    mark: str,
) -> dict[str, str]:
    """A task's whole environment.

    Args:
        mark: names the attempt; whatever the task executes carries it (`FLOWMESH_ATTEMPT`).
    """
    return {
        **base_env,
        **{name: value for name, value in SERVER.items() if not name.endswith("_NUM_THREADS")},
        "OMP_NUM_THREADS": str(threads),
        "PYTHONFAULTHANDLER": "1",  # an interpreter that the task starts says where it was when it dies of a signal
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        **task_env,
        "TMPDIR": tmp_dir,
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        "FLOWMESH_ATTEMPT": mark,
    }
