"""The environment variables of the node's children: an allow-list, which keeps the node's secrets out."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from flowmesh import installed

PASSED = (
    "PATH", "PYTHONPATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "LD_LIBRARY_PATH",
    "CUDA_HOME", "CUDA_PATH", "CUDA_DEVICE_ORDER", "NVIDIA_*", "NCCL_*", "GLOO_*", "UCX_*",
    "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT",
    "TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE", "TORCH_HOME", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "VLLM_*",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
)  # fmt: skip
"""The variables of the node that its tasks inherit; `*` matches any rest of a name. None of them holds a token."""

NEVER = ("REDIS_URL", "ORCHESTRATOR_TOKEN")
"""Never passed on, even if `tasks.pass_env` names them."""

SECRETS = (*NEVER, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
           "OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")  # fmt: skip
"""The node's own secrets: no child inherits them. A task may get variables of the latter names by its `spec.env`."""
SERVER = {
    # One thread during the imports: threads of a pool that starts then do not exist in the forks.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    # torch asks NVML whether there are GPUs. The CUDA runtime would create a context in the server.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # How long an idle OpenMP thread spins before it sleeps: a tenth of libgomp's default of 300,000. With the default,
    # spinning threads take the cores of working ones: on busy cores training was ten times slower. On idle cores vLLM
    # and training are as fast with 30,000 as with the default. With 5,000 vLLM lost a tenth; with 1,000 training of a
    # small model lost more than half, because threads sleep between its small operations. Read once, when libgomp is
    # loaded.
    "GOMP_SPINCOUNT": "30000",
    # The same for OpenBLAS, of which numpy, scipy and faiss load one copy each. Its threads spin from the moment they
    # exist, which is when a task sets its number of threads. They spin for 2^22 cycles, under 2 ms, instead of the
    # default 2^28, a tenth of a second. On two cores the default took half of a small Transformers task's time; linear
    # algebra is equally fast with both.
    "OPENBLAS_THREAD_TIMEOUT": "22",
    # Run vLLM's engine in the task's own process if its parallelism allows that: it starts in a fifth of the time.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "PYTHONUNBUFFERED": "1",
}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a variable's name matches one of these shell patterns. Case matters."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


_OF_ROLE = (
    "AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "AWS_EC2_METADATA_DISABLED",
)  # fmt: skip


def of_role(wanted: bool) -> dict[str, str]:
    """The node's variables that say where the credentials of its role are; for the children that transfer."""
    return {name: os.environ[name] for name in _OF_ROLE if name in os.environ} if wanted else {}


def base(environ: Mapping[str, str], pass_env: Iterable[str]) -> dict[str, str]:
    """The part of the node's environment that its children may see.

    Args:
        environ: the node's environment.
        pass_env: name patterns to pass besides PASSED (`tasks.pass_env`).
    """
    patterns = (*PASSED, *pass_env)
    return {name: value for name, value in environ.items() if matches(name, patterns) and name not in SECRETS}


def for_server(base_env: Mapping[str, str]) -> dict[str, str]:
    """A fork server's whole environment, from `base`. It starts in the root folder: PYTHONPATH is made absolute."""
    env = {**base_env, **SERVER}
    if paths := env.get("PYTHONPATH"):
        env["PYTHONPATH"] = os.pathsep.join(str(Path(path).absolute()) for path in paths.split(os.pathsep) if path)
    return env


def with_package(env: Mapping[str, str]) -> dict[str, str]:
    """`env` with this package on PYTHONPATH: for this interpreter, which may have been started in any folder."""
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**env, "PYTHONPATH": os.pathsep.join([*paths, str(installed.ROOT)])}


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
        base_env: from `base`.
        task_env: the task's `spec.env`, already checked.
        tmp_dir: its TMPDIR.
        threads: for OpenMP.
        gpus: UUIDs of the GPUs that CUDA may show it.
        mark: FLOWMESH_ATTEMPT, which names the attempt; every program that the task executes inherits it.
    """
    return {
        **base_env,
        **{name: value for name, value in SERVER.items() if not name.endswith("_NUM_THREADS")},
        "OMP_NUM_THREADS": str(threads),
        "PYTHONFAULTHANDLER": "1",  # Python programs that the task starts print their stacks when a signal kills them
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        **task_env,
        "TMPDIR": tmp_dir,
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        "FLOWMESH_ATTEMPT": mark,
    }
