"""Checks on two rows that a model does not attend across packed rows. Not every architecture masks the boundary."""

from __future__ import annotations

from typing import Any

from runners.api import BadRequest

ROW = 8
"""Tokens of each row of the probe."""
SHARE = 0.1
"""Allowed influence of the first row on the second, as a part of that without any boundary; for rounding."""
FLOOR = 1e-5


def check(model: Any) -> None:
    """Compare two rows alone and packed as TRL packs them: one sequence whose positions restart with each row.

    Raises:
        BadRequest: a row in a pack reads the row before it.
    """
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = torch.randint(vocabulary, (2, ROW), generator=torch.Generator().manual_seed(0)).to(model.device)
    positions = torch.arange(ROW, device=model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = _logits(model, rows[1:], positions[None])
            packed = _logits(model, rows.reshape(1, -1), positions.repeat(2)[None])[:, ROW:]
            run_on = _logits(model, rows.reshape(1, -1), torch.arange(2 * ROW, device=model.device)[None])[:, ROW:]
    except TypeError as error:
        raise _refusal(model) from error
    finally:
        model.train(was_training)
    leaked, unparted = (float((each - alone).abs().max()) for each in (packed, run_on))
    if leaked > max(SHARE * unparted, FLOOR * float(alone.abs().max())):
        raise _refusal(model)


def _logits(model: Any, ids: Any, positions: Any) -> Any:
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()


def _refusal(model: Any) -> BadRequest:
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return BadRequest(
        f"spec.training.packing: in a {type(bare).__name__} with {bare.config._attn_implementation} attention, packed "
        "rows read the rows before them (packed and unpacked losses differ); leave packing out"
    )
