"""Name of the argument by which transformers' models take a key-value cache."""

import inspect

from transformers import LlamaModel

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""`cache` since transformers 5.24, `past_key_values` before."""
