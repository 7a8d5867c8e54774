"""What the models of transformers call the argument that takes a cache of keys and values."""

import inspect

from transformers import LlamaModel

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""`cache` from transformers 5.24 on, `past_key_values` before."""
