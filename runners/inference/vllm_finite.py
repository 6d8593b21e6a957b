"""Makes vLLM's check of the logits find infinity as well: it counts NaN only.

vLLM adds the class to its workers, in each process that holds a part of the model (`worker_extension_cls`).
"""

from __future__ import annotations

from typing import Any

CLASS = f"{__name__}.FiniteLogits"


class FiniteLogits:
    """A worker's method, called by its name."""

    model_runner: Any

    def flowmesh_check_logits(self) -> None:
        """Turn logits into NaN where the largest of a row is not finite, as the Transformers engine checks them.

        Nothing waits for the device: vLLM counts the NaN along with the sampled tokens.
        """
        model = self.model_runner.model
        compute = getattr(model, "compute_logits", None)
        if compute is None:  # another stage of a pipeline
            return

        def checked(*args: Any, **options: Any) -> Any:
            logits = compute(*args, **options)
            if logits is None:  # another rank has them
                return None
            finite = logits.amax(dim=-1, keepdim=True).isfinite()
            return logits.masked_fill(~finite, float("nan"))

        model.compute_logits = checked
