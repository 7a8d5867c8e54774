"""What models are called in reports: what they are, and where that is not enough, which run they are of."""

from collections import Counter
from collections.abc import Sequence

from calm.report.measured import Comparison, ModelResult


def model_name(chunk_size: int, head: str | None, *, with_head: bool = True) -> str:
    """Such as "CALM, K = 4, energy head", or "Transformer".

    Args:
        chunk_size: Tokens per chunk K.
        head: `head_type` of a CALM; None for a model of tokens.
        with_head: Whether the head is named.
    """
    if head is None:
        return "Transformer"
    name = f"CALM, K = {chunk_size}"
    return f"{name}, {head.replace('_', ' ')} head" if with_head else name


def names_of(results: Sequence[ModelResult]) -> list[str]:
    """Names that differ: heads are named where there are several, runs where models are alike."""
    several = len({result.head for result in results if result.head is not None}) > 1
    names = [model_name(result.chunk_size, result.head, with_head=several) for result in results]
    count = Counter(names)
    return [
        f"{name} ({result.name})" if count[name] > 1 else name
        for name, result in zip(names, results, strict=True)
    ]


def named(comparison: Comparison) -> list[tuple[str, ModelResult]]:
    """The models of a comparison with their names."""
    return list(zip(names_of(comparison.results), comparison.results, strict=True))
