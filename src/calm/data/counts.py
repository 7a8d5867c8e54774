"""How much text is trained on and held out: logged before training, and shown on the model card."""

import logging
from dataclasses import dataclass

import datasets
import pyarrow.compute

logger = logging.getLogger(__name__)
_MAX_RATIO = 1.5  # Between the held-out share and the one asked for; beyond it, a warning is logged.
_FEW_TOKENS = 3000
_DOCUMENTS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Counts:
    """Number of documents and tokens of the training text and the held-out text.

    Args:
        documents: Number of documents in "train" and "validation"; of a document that was cut, each
            stretch counts.
        tokens: Number of tokens in each.
    """

    documents: dict[str, int]
    tokens: dict[str, int]

    @property
    def share(self) -> float:
        """Share of the tokens that are held out."""
        return self.tokens["validation"] / max(1, sum(self.tokens.values()))

    def __str__(self) -> str:
        train, held_out = (
            f"{pluralize(self.documents[split], 'document')} and {pluralize(self.tokens[split], 'token')}"
            for split in ("train", "validation")
        )
        return f"{train} to train on; {held_out} ({_percent(self.share)}) held out"

    def log(self, target: float | None, *, is_sample: bool = False) -> None:
        """Log the counts, and warn if the held-out text is not the share asked for, or too little.

        Args:
            target: Share of the text to hold out; None if held-out text was given.
            is_sample: Whether these are the counts of a sample of streamed text.
        """
        logger.info("text%s: %s", " (a sample of what is streamed)" if is_sample else "", self)
        if target is not None and not target / _MAX_RATIO <= self.share <= target * _MAX_RATIO:
            logger.warning(
                "%s of the text is held out, not the %s asked for: its documents and paragraphs are too "
                "long or too similar. Use --separator to split it into documents, --validation to name "
                "held-out text, or another --validation_fraction (in a recipe: data.separator, "
                "data.validation_sources, data.validation_fraction).",
                _percent(self.share),
                _percent(target),
            )
        if self.tokens["validation"] < _FEW_TOKENS:
            logger.warning(
                "%s held out are too few for a reliable score (at least %s are needed): give more text, or "
                "hold out more of it.",
                pluralize(self.tokens["validation"], "token"),
                f"{_FEW_TOKENS:,}",
            )


def count(train: datasets.Dataset, validation: datasets.Dataset) -> Counts:
    """Count the documents and tokens of datasets with the column `input_ids`."""
    splits = {"train": train, "validation": validation}
    return Counts(
        {name: len(split) for name, split in splits.items()},
        {name: _count_tokens(split) for name, split in splits.items()},
    )


def _count_tokens(documents: datasets.Dataset) -> int:
    tables = documents.with_format("arrow").iter(_DOCUMENTS_AT_ONCE)
    return sum(
        pyarrow.compute.sum(pyarrow.compute.list_value_length(table["input_ids"])).as_py() for table in tables
    )


def pluralize(count: int, noun: str) -> str:
    """A count with its noun, in the plural unless it is 1."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _percent(share: float) -> str:
    """A percentage: two significant digits below 1%, one decimal from there on: 0.012%, 2.0%, 33.3%."""
    percent = 100 * share
    return f"{percent:.1f}%" if percent >= 1 else f"{percent:.2g}%"
