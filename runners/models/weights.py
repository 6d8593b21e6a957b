"""Loads weights with `from_pretrained`, and refuses a checkpoint whose weights are not the model's.

Transformers fills missing weights with random numbers and drops unexpected ones, both with a warning only. Here either
is an error that names the first of them. Only `head="fresh"` accepts a missing head: it is about to be trained.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from runners.api import BadRequest
from runners.models import quantized
from runners.models.sources import Source, loading

Head = Literal["whole", "fresh", "none"]
"""What of the model's head the checkpoint must hold: `whole`: all of it. `fresh`: none of it, because training starts a
new one. `none`: the loaded class has no head, and one in the checkpoint is dropped (embedding models)."""

Quantized = Literal["no", "checked", "unchecked"]
"""Whether a checkpoint is quantized, and whether its names could be checked without the libraries that read it."""

WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DDP",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "PEFT",
    "_forward_module.": "Lightning",
}
"""Prefixes of weight names, by the wrapper that a model was saved in."""
_HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|(attn|attention)\.(masked_)?bias"
    r"|[kvq]_scale|_extra_state|num_batches_tracked)$|(^|\.)mtp\."
)
"""Unexpected names that change no output: buffers of older versions, cache scales, layers of multi-token prediction."""
_POOLER = re.compile(r"(^|\.)pooler\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_OTHER_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForMaskedLM",
    "ForPreTraining",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
)


def load_model(loader: Any, source: Source, *, head: Head = "whole", **arguments: Any) -> Any:
    """`loader.from_pretrained` with `source`'s path and revision, checked.

    Args:
        loader: an Auto class of Transformers, or a model class. With AutoModelForCausalLM, `check_generates` runs too.
        arguments: more of `from_pretrained`'s.

    Raises:
        BadRequest: there is no such model, or its checkpoint does not hold the model's weights.
        MissingDependency: a library that the model needs is missing.
        RunnerError: the hub cannot be reached.
    """
    if (Path(source.path) / "adapter_config.json").is_file():  # Transformers would apply it without a word
        raise BadRequest(
            f"{source.where}: {source.shown!r} holds a model and an adapter; move the adapter to a separate "
            "folder, and name it as an adapter"
        )
    check_quantized(loader, source, head=head, **arguments)
    model, info = _loaded(loader, source, **arguments)
    check_keys(model, info, source, head=head)
    if getattr(loader, "__name__", "") == "AutoModelForCausalLM":
        check_generates(model.config, source)
    return model


def check_checkpoint(loader: Any, source: Source, *, head: Head = "whole", **arguments: Any) -> Quantized:
    """The checks of `load_model` without reading the weights, for a library that loads the model by itself.

    The model is made without memory (device `meta`). Arguments and errors as for `load_model`.
    """
    found = check_quantized(loader, source, head=head, **arguments)
    if found == "no":
        load_model(loader, source, head=head, device_map={"": "meta"}, dtype="auto", **arguments)
    return found


def check_quantized(loader: Any, source: Source, *, head: Head = "whole", **arguments: Any) -> Quantized:
    """The checks of `load_model` for a checkpoint that is quantized, without reading it.

    Args:
        arguments: of `from_pretrained`; with a `config` it is not read again.

    Raises:
        BadRequest: as `load_model`.
    """
    from transformers import AutoConfig

    shared = ("trust_remote_code", "cache_dir", "use_safetensors", "subfolder")
    named = {name: arguments[name] for name in shared if name in arguments}
    config = arguments.get("config")
    if config is None:
        of_config = {name: value for name, value in named.items() if name != "use_safetensors"}
        with loading(source):
            config = AutoConfig.from_pretrained(source.path, revision=source.revision, **of_config)
    method = quantized.method_of(config)
    if method is None:
        return "no"
    if method not in quantized.PACKED:
        return "unchecked"
    plain = {"config": quantized.plain(config), "device_map": {"": "meta"}, "dtype": "auto"}
    with _quiet():  # the names are reported below
        model, info = _loaded(loader, source, **named, **plain)
    if quantized.merges(model):
        return "unchecked"
    check_keys(model, quantized.unpacked(model, info, config), source, head=head)
    return "checked"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _loaded(loader: Any, source: Source, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    with loading(source):
        model, info = loader.from_pretrained(
            source.path,
            revision=source.revision,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by `check_keys`, with both shapes
            **arguments,
        )
    return model, info


def check_loaded(model: Any, source: Source, *, head: Head = "none", subfolder: str = "") -> None:
    """The checks of `load_model` for a model that another library loaded.

    Args:
        model: of Transformers; its checkpoint is where its `name_or_path` says.
        source: what the task named, for errors.
        subfolder: of the checkpoint, where it does not lie at the top.
    """
    place = msgspec.structs.replace(source, path=model.name_or_path)
    check_checkpoint(type(model), place, head=head, config=model.config, subfolder=subfolder)


def check_keys(model: Any, info: dict[str, Any], source: Source, *, head: Head = "whole") -> None:
    """Raises BadRequest where the names or shapes in the checkpoint are not those of `model`.

    Args:
        info: what `from_pretrained` returns with `output_loading_info`.
    """
    missing: set[str] = set(info["missing_keys"])
    unexpected: set[str] = {name for name in info["unexpected_keys"] if not _HARMLESS.search(name)}
    mismatched: list[tuple[str, Any, Any]] = sorted(info["mismatched_keys"])
    unexpected -= _further_layers(model.config, unexpected)
    own_head = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    if head == "none" or (head == "fresh" and not own_head):
        missing = {name for name in missing if not _may_be_fresh(model, name, head)}
        mismatched = [each for each in mismatched if not _may_be_fresh(model, each[0], head)]
        if not missing and not mismatched:
            unexpected = _extra_layers(model, unexpected)
    if not (missing or unexpected or mismatched):
        return
    said = [
        *([f"{len(missing)} missing, first {_first(missing)!r}"] if missing else []),
        *([f"{len(unexpected)} unexpected, first {_first(unexpected)!r}"] if unexpected else []),
        *(f"{name!r} has shape {_shape(found)} and not {_shape(wanted)}" for name, found, wanted in mismatched[:1]),
    ]
    raise BadRequest(
        f"{source.where}: {source.shown!r} does not hold the weights of a {type(model).__name__}: "
        f"{'; '.join(said)}{_remedy(model, unexpected, head)}"
    )


def check_generates(config: Any, source: Source) -> None:
    """Raises BadRequest for a model that reads text in both directions or was saved with a head for another purpose.

    A BERT with its masked-language head loads as a causal model without a missing weight, and writes noise.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    made_for: Sequence[str] = getattr(config, "architectures", None) or ()
    both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", None) is False
    if (both_ways and not config.is_encoder_decoder) or any(name.endswith(_OTHER_HEADS) for name in made_for):
        raise BadRequest(
            f"{source.where}: {source.shown!r} is a {', '.join(made_for) or config.model_type}, which does not "
            "generate text; name a causal language model"
        )


def check_finite(model: Any, source: Source) -> None:
    """Raises BadRequest where a weight holds NaN or infinity. Reads all weights once."""
    found = first_not_finite(model)
    if found is not None:
        raise BadRequest(not_finite(source.where, source.shown, str(model.dtype), found))


def not_finite(where: str, shown: str, dtype: str, weight: str | None) -> str:
    """The error text for a model that computes NaN or infinity.

    Args:
        weight: the first weight that is not finite itself; None: none is, or it is not known.
    """
    name = dtype.removeprefix("torch.")
    if weight is not None:
        cause = f"its weight {weight!r} holds NaN or infinity; the checkpoint is damaged, or exceeds {name}"
    elif name == "float32":
        cause = "its numbers overflow, or its checkpoint is damaged"
    else:
        wider = "float32" if name == "bfloat16" else "bfloat16 or float32"
        cause = f"its numbers overflow {name}, or its checkpoint is damaged; try dtype {wider}"
    return f"{where}: {shown!r} computes no finite numbers in {name}: {cause}"


def first_not_finite(model: Any) -> str | None:
    """Name of the model's first weight that holds NaN or infinity."""
    import torch

    for name, weight in model.named_parameters():
        if weight.device.type == "meta" or weight.numel() == 0 or weight.dtype.itemsize < 2 or weight.is_complex():
            continue  # offloaded, empty or quantised
        if weight.is_floating_point():
            with torch.no_grad():
                least, most = torch.aminmax(weight.detach())  # NaN and infinity both show in these two
            if not bool(torch.isfinite(least) & torch.isfinite(most)):
                return str(name)
    return None


def _may_be_fresh(model: Any, name: str, head: Head) -> bool:
    """Whether a missing weight lies outside the model's body. A pooler belongs to the heads that use it."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    return bool(_POOLER.search(name)) or (head == "fresh" and bool(prefix) and not name.startswith(prefix))


def _extra_layers(model: Any, unexpected: set[str]) -> set[str]:
    """Unexpected weights that look like the body's own, such as those of a layer beyond the model's last one."""
    prefix = f"{model.base_model_prefix}."
    own = {_pattern(name.removeprefix(prefix)) for name in model.state_dict()}
    return {name for name in unexpected if _pattern(name.removeprefix(prefix)) in own}


def _further_layers(config: Any, unexpected: set[str]) -> set[str]:
    """Layers for multi-token prediction, which some models number on from their last layer."""
    text = config.get_text_config()
    layers, further = getattr(text, "num_hidden_layers", None), getattr(text, "num_nextn_predict_layers", None)
    if not layers or not further:
        return set()
    found = {name: re.search(r"(^|\.)layers\.(\d+)\.", name) for name in unexpected}
    return {name for name, match in found.items() if match and layers <= int(match[2]) < layers + further}


def _remedy(model: Any, unexpected: set[str], head: Head) -> str:
    for prefix, wrapper in WRAPPERS.items():
        if any(f".{prefix}" in f".{name}" for name in unexpected):
            return (
                f". The {prefix!r} in the names means that the model was saved inside {wrapper}: save the model "
                "itself, without its wrapper"
            )
    made_for = getattr(model.config, "architectures", None) or ()
    if head == "whole" and made_for and type(model).__name__ not in made_for:
        return f". Its config.json says {', '.join(made_for)}"
    return ". Its config.json may be another model's, or weights were left out when it was saved"


def _pattern(name: str) -> str:
    return _NUMBER.sub("*", name)


def _first(names: Iterable[str]) -> str:
    """The first name, with numbers in numeric order."""
    return min(names, key=lambda name: [(len(part), part) if part.isdigit() else (0, part) for part in name.split(".")])


def _shape(shape: Iterable[int]) -> str:
    return "×".join(str(size) for size in shape)
