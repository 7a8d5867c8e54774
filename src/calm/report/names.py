"""Names of models in reports: what they are and, if that is ambiguous, their run."""

from collections import Counter
from collections.abc import Sequence

from calm.report.measured import Comparison, ModelResult


def model_name(chunk_size: int, head: str | None, *, with_head: bool = True) -> str:
    """A name such as "CALM, K = 4, energy head" or "Transformer".

    Args:
        chunk_size: Tokens per chunk K.
        head: `head_type` of a CALM; None for a token-level model.
        with_head: Whether to name the head.
    """
    if head is None:
        return "Transformer"
    name = f"CALM, K = {chunk_size}"
    return f"{name}, {head.replace('_', ' ')} head" if with_head else name


def names_of(results: Sequence[ModelResult]) -> list[str]:
    """Unique names: with the head if there are several, and the run if names would otherwise be equal."""
    heads = {result.head for result in results if result.head is not None}
    names = [model_name(r.chunk_size, r.head, with_head=len(heads) > 1) for r in results]
    count = Counter(names)
    return [
        f"{name} ({result.name})" if count[name] > 1 else name
        for name, result in zip(names, results, strict=True)
    ]


def with_names(comparison: Comparison) -> list[tuple[str, ModelResult]]:
    """The models of a comparison, with their names."""
    return list(zip(names_of(comparison.results), comparison.results, strict=True))
