"""What a seed may be; no torch, so that what needs no more than a seed stays light."""

import operator
from typing import Any


def whole_seed(seed: Any) -> int:
    """A seed as a plain number, so that 1 gives the same whether Python, numpy or torch made it.

    Raises:
        ValueError: If it is no whole number. Neither are 1.0, "1" and True, which mean something else where
            they were not a mistake.
    """
    is_truth = isinstance(seed, bool) or str(getattr(seed, "dtype", "")).endswith("bool")
    try:
        if not is_truth:
            return operator.index(seed)
    except TypeError:
        pass
    raise ValueError(f"a seed must be a whole number, got {seed!r:.100} of type {type(seed).__name__}.")
