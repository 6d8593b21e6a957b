"""Imported by fork servers only, after `transformers`: fills tables that every `from_pretrained` would fill anew.

No tensor is touched: a process that computed before it forked hands broken thread pools to its children.
"""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")  # compiles some 600 patterns for all architectures: 0.1 s
