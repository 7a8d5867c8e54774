"""Valid seeds; without torch, so that code that only needs a seed stays light."""

import operator
from typing import Any


def as_seed(seed: Any) -> int:
    """A seed as a plain int, so that 1 gives the same results whether it is from Python, numpy or torch.

    Raises:
        ValueError: If it is not an integer. 1.0, "1" and True are rejected too: they are likely mistakes.
    """
    is_bool = isinstance(seed, bool) or str(getattr(seed, "dtype", "")).endswith("bool")
    try:
        if not is_bool:
            return operator.index(seed)
    except TypeError:
        pass
    raise ValueError(f"a seed must be a whole number, got {seed!r:.100} of type {type(seed).__name__}.")
