"""LoRA adapters on a Transformers model, by PEFT: merged into the weights, or switched at run time."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from runners.api import BadRequest, Context, MissingDependency
from runners.models.adapters import LocalAdapter


def apply_adapters(model: Any, adapters: Sequence[LocalAdapter]) -> Any:
    """The model with its adapters: first those to merge, in their order, then the others, none of them active yet.

    Raises:
        BadRequest: an adapter does not fit the model.
        MissingDependency: PEFT is missing.
    """
    if not adapters:
        return model
    if importlib.util.find_spec("peft") is None:
        raise MissingDependency("peft", "inference")
    from peft import PeftModel

    for adapter in adapters:
        if adapter.apply == "merge":
            model = _fitted(adapter, lambda each=adapter, base=model: PeftModel.from_pretrained(base, each.folder))
            model = model.merge_and_unload()
    runtime = [adapter for adapter in adapters if adapter.apply == "runtime"]
    for i, adapter in enumerate(runtime):
        if i == 0:
            model = _fitted(
                adapter,
                lambda each=adapter, base=model: PeftModel.from_pretrained(base, each.folder, adapter_name=each.name),
            )
        else:
            _fitted(adapter, lambda each=adapter, base=model: base.load_adapter(each.folder, adapter_name=each.name))
    return model.eval()


def check_fit(ctx: Context, adapter: LocalAdapter, config: Any, *, trust_remote_code: bool) -> None:
    """Raises BadRequest where an adapter's matrices have other sizes than the layers that they are for.

    vLLM itself copies what it is given into buffers that are large enough, and computes on.

    Args:
        config: the model's configuration; a model without memory is made from it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as error:  # one that Transformers cannot make without its weights, or at all
        ctx.log.warning("not checked whether %s fits the model: %.200s", adapter.name, " ".join(str(error).split()))
        return
    for name, shape in _shapes(adapter):
        path, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        try:
            weight = model.get_submodule(path).weight
        except AttributeError:
            raise BadRequest(f"{adapter.where}: the adapter does not fit the model: it has no {path!r}") from None
        side = 1 if part.startswith("A") else 0
        if weight.ndim == 2 and shape[side] != weight.shape[side]:
            raise BadRequest(
                f"{adapter.where}: the adapter does not fit the model: size mismatch at {path!r}, "
                f"{shape[side]} and not {weight.shape[side]}"
            )


def _shapes(adapter: LocalAdapter) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of an adapter's matrices."""
    file = adapter.folder / "adapter_model.safetensors"
    if file.is_file():
        from safetensors import safe_open

        with safe_open(file, "pt") as weights:
            return [(name, tuple(weights.get_slice(name).get_shape())) for name in weights.keys()]  # noqa: SIM118
    import torch

    weights = torch.load(adapter.folder / "adapter_model.bin", map_location="meta", weights_only=True)
    return [(name, tuple(weight.shape)) for name, weight in weights.items()]


def _fitted(adapter: LocalAdapter, load: Any) -> Any:
    """What `load` returns; peft tells a misfit by many kinds of errors."""
    try:
        return load()
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        if "out of memory" in str(error).lower():
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
        raise BadRequest(f"{adapter.where}: the adapter does not fit the model: {detail[:300]}") from error
