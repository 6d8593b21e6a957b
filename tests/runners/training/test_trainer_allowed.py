"""Arguments of trainers: each is classified, and those that load code or send data out need the operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from runners.api import BadRequest, Context
from runners.training.arguments import OURS
from runners.training.trainer_allowed import PLAIN, VALUES, check_argument, check_deepspeed
from tests.kit.paths import PERMITS

MakeContext = Callable[..., Context]
_CLOSED = """
    accelerator_config chat_template_path generation_kwargs log_completions_hub_repo parallelism_config project
    restore_callback_states_from_checkpoint trackio_bucket_id trackio_space_id trackio_static_space_id
    transformers_continuous_batching_config vllm_group_port vllm_server_base_url vllm_server_host vllm_server_port
    vllm_server_timeout
"""
CLOSED = frozenset(_CLOSED.split())
"""Those that someone has looked at and left to the operator."""


def test_each_argument_of_this_version_is_classified() -> None:
    trl = pytest.importorskip("trl")
    configs = ("SFTConfig", "DPOConfig", "KTOConfig", "RewardConfig", "GRPOConfig", "RLOOConfig")
    known = {field.name for name in configs for field in dataclasses.fields(getattr(trl, name))}
    known = {name for name in known if not name.startswith("hub_")}
    assert known - OURS.keys() - VALUES.keys() - PLAIN == CLOSED


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, "x") for name in sorted(CLOSED)), ("vllm_mode", "server"), ("torch_compile_backend", "my.backend"),
     ("of_a_later_version", 1)],
)  # fmt: skip
def test_a_closed_argument_needs_the_operator(make_context: MakeContext, name: str, value: Any) -> None:
    where = "spec.training.trainer_args"
    with pytest.raises(BadRequest, match=rf"{where}\.{name}: .*tasks\.trainer_arguments"):
        check_argument(make_context({}), name, value, where)
    permits = msgspec.structs.replace(PERMITS, trainer_arguments=(name,))
    check_argument(make_context({}, permits=permits), name, value, where)


def test_plain_arguments_pass(make_context: MakeContext) -> None:
    for name, value in (("weight_decay", 0.1), ("vllm_mode", "colocate"), ("torch_compile_backend", "inductor")):
        check_argument(make_context({}), name, value, "f")


@pytest.mark.parametrize(
    "section",
    [
        {"wandb": {"enabled": True}},
        {"csv_monitor": {"enabled": True, "output_path": "/srv"}},
        {"flops_profiler": {"output_file": "/srv/x"}},
        {"compile": {"backend": "evil.module"}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/srv"}}},
    ],
)
def test_sections_of_deepspeed_that_write_or_send_need_the_operator(
    make_context: MakeContext, section: dict[str, Any]
) -> None:
    with pytest.raises(BadRequest, match=r"tasks\.trainer_arguments"):
        check_deepspeed(make_context({}), section, "spec.training.deepspeed")
    check_deepspeed(make_context({}), {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "f")
    permits = msgspec.structs.replace(PERMITS, trainer_arguments=("deepspeed_*",))
    check_deepspeed(make_context({}, permits=permits), section, "spec.training.deepspeed")
