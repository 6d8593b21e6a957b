"""LoRA adapters on a Transformers model by PEFT: merged into the weights, or switched at run time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from runners.api import BadRequest, Context, MissingDependency
from runners.models.adapters import LocalAdapter, weight_names
from runners.models.tied import untie


def apply_adapters(model: Any, adapters: Sequence[LocalAdapter]) -> Any:
    """The model with its adapters: first those to merge, in their order, then the others, none of them active yet.

    Raises:
        BadRequest: an adapter does not fit the model.
        MissingDependency: PEFT is missing.
    """
    if not adapters:
        return model
    if importlib.util.find_spec("peft") is None:
        raise MissingDependency("peft")
    for adapter in adapters:
        if adapter.apply == "merge":
            untie(model, weight_names(adapter.folder))
            model = attach(model, adapter, "default").merge_and_unload()
    for adapter in adapters:
        if adapter.apply == "runtime":
            model = attach(model, adapter, adapter.name)
    return model.eval()


def attach(model: Any, adapter: LocalAdapter, name: str, *, low_memory: bool = False) -> Any:
    """The model as a PeftModel with one more adapter.

    Args:
        low_memory: make no weights for the adapter but those in its file; for a model on the device `meta`.

    Raises:
        BadRequest: the adapter's weights are not exactly those that its configuration means on this model. PEFT drops
            what does not fit, and leaves at zero what is missing.
    """
    from peft import PeftConfig, PeftModel, PeftModelForCausalLM

    folder = str(adapter.folder)

    def load() -> tuple[Any, Any]:
        wrapped = model
        if not isinstance(model, PeftModel):
            config = PeftConfig.from_pretrained(folder)
            config.inference_mode = True
            wrapped = PeftModelForCausalLM(model, config, adapter_name=name, low_cpu_mem_usage=low_memory)
        return wrapped, wrapped.load_adapter(folder, adapter_name=name, low_cpu_mem_usage=low_memory)

    wrapped, found = _fitted(adapter, load)
    missing = ["".join(each.rsplit(f".{name}", 1)) for each in found.missing_keys]
    missing += _missing_biases(wrapped, adapter, name)
    if found.unexpected_keys:
        raise _misfit(adapter, f"{_counted(found.unexpected_keys, 'unknown')}{_counted(missing, 'missing', '; ')}")
    if missing:
        raise _misfit(adapter, _counted(missing, "missing"))
    return wrapped


def check_fit(ctx: Context, adapter: LocalAdapter, config: Any, *, trust_remote_code: bool) -> None:
    """Raises BadRequest where an adapter's weights have other names or sizes than the layers that they are for.

    vLLM itself copies what it is given into buffers that are large enough, and computes on.

    Args:
        config: the model's configuration; a model without memory is made from it.
    """
    import torch

    from runners.inference.vision import model_class

    try:
        with torch.device("meta"):
            model = model_class(config, None).from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as error:  # one that Transformers cannot make without its weights, or at all
        ctx.log.warning("not checked whether %s fits the model: %.200s", adapter.name, " ".join(str(error).split()))
        return
    attach(model, adapter, adapter.name, low_memory=True)


def _missing_biases(wrapped: Any, adapter: LocalAdapter, name: str) -> list[str]:
    """Biases that the adapter's configuration says were trained, and that its file lacks; PEFT does not report them."""
    if getattr(wrapped.peft_config[name], "bias", "none") == "none":
        return []
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    return sorted({key for key in saved if key.endswith(".bias")} - set(weight_names(adapter.folder)))


def _fitted(adapter: LocalAdapter, load: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """What `load` returns; PEFT reports a misfit by many kinds of errors."""
    try:
        return load()
    except KeyError as error:  # a module of `modules_to_save` whose weights are not in the file
        raise _misfit(adapter, f"its file lacks the weight {error.args[0]!r}") from error
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        if "out of memory" in str(error).lower():
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
        raise _misfit(adapter, detail[:300]) from error


def _misfit(adapter: LocalAdapter, detail: str) -> BadRequest:
    return BadRequest(f"{adapter.where}: the adapter does not fit the model: {detail}")


def _counted(names: Iterable[str], what: str, before: str = "") -> str:
    listed = list(names)
    return f"{before}{len(listed)} {what} weights, first {listed[0]!r}" if listed else ""
