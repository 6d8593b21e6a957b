"""Checks the names in a quantized checkpoint, for both engines and without the libraries that compute with it.

vLLM compares names for other checkpoints only, and Transformers fills what is missing before it reports it. Here the
model is made without its quantization, and the tensors that stand for a weight are counted as that weight.
"""

from __future__ import annotations

import copy
import re
from typing import Any

PACKED = {
    "gptq": (r"\.qweight", r"\.(qzeros|scales|g_idx)"),
    "awq": (r"\.qweight", r"\.(qzeros|scales)"),
    "auto-round": (r"\.qweight", r"\.(qzeros|scales|g_idx)"),
    "compressed-tensors": (
        r"\.weight_packed",
        r"\.(weight|input|output)_(scale|zero_point|shape|g_idx|global_scale)|\.[qkv]_(scale|zero_point)",
    ),
    "fp8": (r"(?!)", r"\.(weight_scale_inv|weight_scale|input_scale|activation_scale)|\.[qkv]_scale"),
    "fbgemm_fp8": (r"(?!)", r"\.(weight_scale|input_scale_ub)"),
    "modelopt": (r"(?!)", r"\.(weight_scale|weight_scale_2|input_scale)|\.[qkv]_scale"),
    "bitsandbytes": (r"(?!)", r"\.(weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+)|SCB|weight_format)"),
    "bitnet": (r"(?!)", r"\.weight_scale"),
    "mxfp4": (r"_blocks", r"_scales"),
}
"""By `quant_method`: the ending of the tensor that holds a weight under another name than its own, and the endings of
the tensors beside it, as patterns."""
OPTIONAL = re.compile(r"(g_idx|qzeros|zero_point|shape|[qkv]_scale)$")
"""Endings that some layers of a checkpoint may have and others not."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def method_of(config: Any) -> str | None:
    """A checkpoint's quantization by its configuration; None: it has none. Empty: one without a name."""
    given = _given(config)
    if given is None:
        return None
    found = given.get("quant_method")
    return str(getattr(found, "value", found) or "")


def _given(config: Any) -> dict[str, Any] | None:
    for part in (config, config.get_text_config()):
        if (given := getattr(part, "quantization_config", None)) is not None:
            return dict(given) if isinstance(given, dict) else dict(given.to_dict())
    return None


def plain(config: Any) -> Any:
    """The configuration of the same model without quantization."""
    found = copy.deepcopy(config)
    for part in {id(each): each for each in (found, found.get_text_config())}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return found


def merges(model: Any) -> bool:
    """Whether Transformers makes weights of several in the checkpoint, such as experts: their packed names differ."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(each, WeightConverter) for each in get_model_conversion_mapping(model))


def unpacked(model: Any, info: dict[str, Any], config: Any) -> dict[str, Any]:
    """`info` of a plain model's `from_pretrained` on a quantized checkpoint, with its tensors counted as weights.

    Args:
        model: made with the configuration `plain`.
        config: of the quantized checkpoint, by one of the methods in PACKED.

    Returns:
        `missing_keys`, `unexpected_keys` and `mismatched_keys` for `check_keys`. A scale that other layers have beside
        the same weight is missing, too.
    """
    main, beside = (re.compile(f"({ending})$") for ending in PACKED[method_of(config) or ""])
    places = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    packed: set[str] = set()
    others: dict[str, set[str]] = {}
    unexpected: set[str] = set()
    for name in info["unexpected_keys"]:
        holds, more = main.search(name), beside.search(name)
        found = holds or more
        place = name[: found.start()] if found else ""
        if found is None or place not in places:
            unexpected.add(name)
        elif holds:
            packed.add(place)
            others.setdefault(place, set())
        else:
            others.setdefault(place, set()).add(found[0])
    left_out = _left_out(config)
    for name, parameter in model.named_parameters():
        place = name.removesuffix(".weight")
        if parameter.dim() > 1 and place != name and not any(each.search(place) for each in left_out):
            others.setdefault(place, set())
    missing = {name for name in info["missing_keys"] if not {name, name.removesuffix(".weight")} & packed}
    mismatched = [each for each in info["mismatched_keys"] if not others.get(each[0].removesuffix(".weight"))]
    there = {place: endings for place, endings in others.items() if f"{place}.weight" not in missing}
    return {
        "missing_keys": missing | _without_scale(there),
        "unexpected_keys": unexpected,
        "mismatched_keys": mismatched,
    }


def _left_out(config: Any) -> list[re.Pattern[str]]:
    """The layers that the configuration says were not quantized."""
    given = _given(config) or {}
    names = [name for key in ("ignore", "modules_to_not_convert", "exclude_modules") for name in given.get(key) or ()]
    texts = [str(name) for name in names]
    return [re.compile(each.removeprefix("re:") if each.startswith("re:") else re.escape(each)) for each in texts]


def _without_scale(others: dict[str, set[str]]) -> set[str]:
    """Names that a layer lacks beside its weight, and its counterparts in other layers have."""
    kinds: dict[str, set[str]] = {}
    for place, endings in others.items():
        kinds.setdefault(_NUMBER.sub("*", place), set()).update(endings)
    return {
        place + ending
        for place, endings in others.items()
        for ending in kinds[_NUMBER.sub("*", place)] - endings
        if not OPTIONAL.search(ending)
    }
