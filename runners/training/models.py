"""Loads the model to train and its tokenizer: dtype, attention, quantisation, pad token, adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runners.api import BadRequest, Context, MissingDependency
from runners.models import weights
from runners.models.adapters import weight_names
from runners.models.sources import Source, loading
from runners.models.tied import untie
from runners.training import templates
from runners.training.checkpoints import Start
from runners.training.devices import Device
from runners.training.plan import Plan

DTYPES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
DROPOUT = 0.05
KNOWN_DTYPES = ("auto", "float16", "bfloat16", "float32")


def load_tokenizer(plan: Plan, start: Start) -> Any:
    """The model's tokenizer, with a pad token.

    Raises:
        BadRequest: there is none.
    """
    from transformers import AutoTokenizer

    with loading(start.weights):
        tokenizer = AutoTokenizer.from_pretrained(
            start.weights.path,
            revision=start.weights.revision,
            trust_remote_code=plan.model.transformers.trust_remote_code,
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BadRequest(f"{start.weights.where}: {start.weights.shown!r} has neither a pad nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(plan: Plan, start: Start, device: Device, tokenizer: Any) -> Any:
    """The model to train; a PeftModel where LoRA continues an adapter.

    Raises:
        BadRequest: there is no such model, or an option does not fit it or this node.
        MissingDependency: a library that an option needs is missing.
    """
    options = load_options(plan, device)
    model = _pretrained(plan, start.weights, options)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        _stop_at_turns(model, tokenizer)
    if start.adapter is not None:
        model = _with_adapter(plan, start, model)
    elif plan.lora is not None:
        check_targets(plan, model)
    return model


def _stop_at_turns(model: Any, tokenizer: Any) -> None:
    """Make generation, also from the saved model, stop at the chat template's end-of-turn token."""
    given = model.generation_config.eos_token_id
    known = [] if given is None else [given] if isinstance(given, int) else list(given)
    ends = list(dict.fromkeys([*known, *templates.end_tokens(tokenizer)]))
    if len(ends) > len(known):
        model.generation_config.eos_token_id = ends


def _pretrained(plan: Plan, source: Source, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if plan.kind.head == "score":
        return weights.load_model(AutoModelForSequenceClassification, source, head="fresh", num_labels=1, **options)
    return weights.load_model(AutoModelForCausalLM, source, **options)


def load_options(plan: Plan, device: Device) -> dict[str, Any]:
    """`from_pretrained`'s arguments for `model.transformers` on this device."""
    given = plan.model.transformers
    where = "spec.model.transformers"
    if given.low_cpu_mem_usage is False:
        raise BadRequest(f"{where}.low_cpu_mem_usage: Transformers 5 always loads so; leave it out or set it to true")
    options: dict[str, Any] = {"dtype": dtype(plan, device), "trust_remote_code": given.trust_remote_code}
    if attention := _attention(plan, device):
        options["attn_implementation"] = attention
    if given.load_in_8bit or given.load_in_4bit:
        options["quantization_config"] = _quantisation(plan, device)
    if device.spread:
        options["device_map"] = given.device_map
    return options


def dtype(plan: Plan, device: Device) -> str:
    """Dtype of the weights: float32 where all are trained, else bfloat16 where the GPU computes it."""
    given = plan.model.transformers.dtype
    where = "spec.model.transformers.dtype"
    if given is None:
        return "bfloat16" if plan.lora is not None and device.cuda and device.bf16 else "float32"
    name = DTYPES.get(given, given)
    if name not in KNOWN_DTYPES:
        raise BadRequest(f"{where}: {given!r} is none; known: {', '.join([*KNOWN_DTYPES, *DTYPES])}")
    if name == "float16" and plan.lora is None:
        raise BadRequest(f"{where}: float16 weights cannot be trained; use bfloat16 or float32, or spec.lora")
    return name


def _attention(plan: Plan, device: Device) -> str | None:
    given = plan.model.transformers
    name = given.attn_implementation or ("flash_attention_2" if given.use_flash_attention_2 else None)
    if name is None or not name.startswith("flash_attention"):
        return name
    field = "use_flash_attention_2" if given.use_flash_attention_2 else "attn_implementation"
    if not device.cuda:
        raise BadRequest(f"spec.model.transformers.{field}: flash attention needs a GPU; leave it out")
    from transformers.utils import is_flash_attn_2_available

    if name == "flash_attention_2" and not is_flash_attn_2_available():
        raise MissingDependency("flash_attn", f"spec.model.transformers.{field}")
    return name


def _quantisation(plan: Plan, device: Device) -> Any:
    given = plan.model.transformers
    field = "load_in_4bit" if given.load_in_4bit else "load_in_8bit"
    try:
        import bitsandbytes  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        raise MissingDependency("bitsandbytes", f"spec.model.transformers.{field}") from None
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_8bit=given.load_in_8bit,
        load_in_4bit=given.load_in_4bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if device.bf16 else torch.float32,
    )


def lora_config(plan: Plan) -> Any:
    """PEFT's configuration of `spec.lora`."""
    from peft import LoraConfig

    lora = plan.lora
    assert lora is not None
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=DROPOUT if lora.dropout is None else lora.dropout,
        bias=lora.bias,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        task_type="SEQ_CLS" if plan.kind.head == "score" else "CAUSAL_LM",
        use_rslora=lora.use_rslora,
    )


def check_targets(plan: Plan, model: Any) -> None:
    """Raises BadRequest for a target module that is not one of the model's linear layers; lists them."""
    import torch

    assert plan.lora is not None
    wanted = plan.lora.target_modules
    if isinstance(wanted, str):
        return  # all-linear, or a pattern over full names: PEFT checks it
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding) or type(module).__name__ == "Conv1D"
    }
    whole = [name for name, _ in model.named_modules()]
    for target in wanted:
        if target not in linear and not any(name == target or name.endswith(f".{target}") for name in whole):
            there = ", ".join(sorted(linear))
            raise BadRequest(f"spec.lora.target_modules: the model has no {target!r}; it has: {there}")


def _with_adapter(plan: Plan, start: Start, model: Any) -> Any:
    """The model with its adapter: trainable with LoRA, merged where all weights are trained."""
    from peft import PeftModel

    assert start.adapter is not None
    where = Source(path=str(start.adapter), revision=None, shown=start.adapter.name, where="spec.checkpoint.load")
    if plan.lora is None:
        untie(model, weight_names(start.adapter))
    with loading(where):
        found = PeftModel.from_pretrained(model, str(start.adapter), is_trainable=plan.lora is not None)
    _check_names(found, start.adapter)
    return found if plan.lora is not None else found.merge_and_unload()


def _check_names(model: Any, folder: Path) -> None:
    """Raises BadRequest where an adapter's file does not hold the weights of its configuration. PEFT only warns."""
    from peft import get_peft_model_state_dict

    there = set(weight_names(folder))
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # PEFT saves resized embeddings beside an adapter, and loads them into the base model.
    unknown = {name for name in there - wanted if not name.endswith(("embed_tokens.weight", "lm_head.weight"))}
    for what, names in (("lacks", wanted - there), ("holds unknown weights, such as", unknown)):
        if names:
            raise BadRequest(
                f"spec.checkpoint.load: the adapter does not fit the model: its file {what} {min(names)!r} "
                f"({len(names)} weights); give an adapter of this base model, saved by PEFT"
            )


def merged_start(plan: Plan, start: Start, ctx: Context, *, write: bool) -> Start:
    """For full training from an adapter: start from the merged weights, so that a reference model has them too.

    Args:
        write: whether this rank merges and saves, or another of this node. Before the ranks join, since afterwards
            only rank 0 can save.
    """
    if start.adapter is None or plan.lora is not None:
        return start
    folder = ctx.tmp_dir / "merged"
    if write:
        plain = {"dtype": "auto", "trust_remote_code": plan.model.transformers.trust_remote_code}
        _with_adapter(plan, start, _pretrained(plan, start.weights, plain)).save_pretrained(folder)
        load_tokenizer(plan, start).save_pretrained(folder)
    merged = Source(path=str(folder), revision=None, shown=start.weights.shown, where="spec.checkpoint.load")
    return Start(weights=merged, resume=start.resume)
