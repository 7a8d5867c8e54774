"""Figures as JSON."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calm.evaluation.brier import BrierResult
from calm.evaluation.held_out import Scorecard
from calm.evaluation.perplexity import PerplexityResult
from calm.flops import Cost, CostOfThoughts
from calm.storage.disk import write_atomically


def write_figures(values: dict[str, Any], path: Path) -> None:
    """Write figures as JSON, with null for NaN and infinity."""
    write_atomically(path, as_json(values) + "\n")


def as_json(values: dict[str, Any]) -> str:
    """Figures as JSON, with null for NaN and infinity."""
    return json.dumps(_finite_or_none(values), indent=1, allow_nan=False)


def values_of_scorecard(card: Scorecard) -> dict[str, Any]:
    """The values of `print_scorecard`: shares and scores in percent, cross-entropy in nats per token."""
    reconstruction, perplexity = card.reconstruction, card.perplexity
    return {
        "kind": card.name,
        "chunks": card.brier.num_chunks,
        "context": card.brier.context,
        **_values_of_brier(card.brier),
        "reconstruction": reconstruction and reconstruction.as_metrics(),
        "perplexity": None,
        **_perplexity_of(perplexity),
        "floors": {
            name: _values_of_brier(result) | _perplexity_of(card.floor_perplexities.get(name))
            for name, result in card.floors.items()
        },
        "ceilings": {name: _values_of_brier(result) for name, result in card.ceilings.items()},
    }


def _perplexity_of(result: PerplexityResult | None) -> dict[str, Any]:
    return {} if result is None else {"perplexity": {**asdict(result), "perplexity": result.perplexity}}


def _values_of_brier(result: BrierResult) -> dict[str, Any]:
    scores = result.as_metrics()
    if result.undefined:
        scores["brier_lm"] = math.nan
    return {**scores, "standard_errors": result.as_errors()}


def values_of_costs(
    cost: Cost, with_draws: Cost | None, draws: float, thoughts: CostOfThoughts | None = None
) -> dict[str, Any]:
    """The values of `print_costs`: parameters and FLOPs per token by part, and FLOPs of thoughts."""
    values: dict[str, Any] = {**asdict(cost), "draws": draws}
    values |= {} if with_draws is None else {"inference_with_draws": with_draws.inference}
    return values if thoughts is None else {**values, "thoughts": asdict(thoughts)}


def _finite_or_none(value: Any) -> Any:
    """Replace NaN, such as an unknown error, and infinities, such as a huge perplexity: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
