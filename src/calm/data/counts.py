"""How much text is trained on and held out: logged before training, and shown on the model card."""

import logging
from dataclasses import dataclass

import datasets
import pyarrow.compute

logger = logging.getLogger(__name__)
_FAR = 1.5  # Factor between the shares held out and asked for beyond which a warning is logged.
_FEW_TOKENS = 3000
_DOCUMENTS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Counts:
    """Number of documents and tokens of the training text and the held-out text.

    Args:
        documents: Documents of "train" and "validation"; of one that was cut, each stretch counts.
        tokens: Tokens of both.
    """

    documents: dict[str, int]
    tokens: dict[str, int]

    @property
    def share(self) -> float:
        """Share of the tokens that is held out."""
        return self.tokens["validation"] / max(1, sum(self.tokens.values()))

    def __str__(self) -> str:
        train, held_out = (
            f"{number(self.documents[part], 'document')} and {number(self.tokens[part], 'token')}"
            for part in ("train", "validation")
        )
        return f"{train} to train on; {held_out} ({_percent(self.share)}) held out"

    def tell(self, asked: float | None, *, is_sample: bool = False) -> None:
        """Log the counts, and warn if the held-out text is not the share asked for, or too little.

        Args:
            asked: Share of the text to hold out; None if held-out text was given.
            is_sample: Whether these are the counts of a sample of streamed text.
        """
        logger.info("text%s: %s", " (a sample of what is streamed)" if is_sample else "", self)
        if asked is not None and not asked / _FAR <= self.share <= asked * _FAR:
            logger.warning(
                "%s of the text is held out, not the %s asked for: its documents and paragraphs are too "
                "long or too similar. Use --separator to split it into documents, --validation to name "
                "held-out text, or another --validation_fraction (in a recipe: data.separator, "
                "data.validation_sources, data.validation_fraction).",
                _percent(self.share),
                _percent(asked),
            )
        if self.tokens["validation"] < _FEW_TOKENS:
            logger.warning(
                "%s held out are too few for a reliable score (at least %s are needed): give more text, or "
                "hold out more of it.",
                number(self.tokens["validation"], "token"),
                f"{_FEW_TOKENS:,}",
            )


def count(train: datasets.Dataset, validation: datasets.Dataset) -> Counts:
    """Count the documents and tokens of datasets with the column `input_ids`."""
    parts = {"train": train, "validation": validation}
    return Counts(
        {name: len(part) for name, part in parts.items()},
        {name: _tokens_of(part) for name, part in parts.items()},
    )


def _tokens_of(documents: datasets.Dataset) -> int:
    tables = documents.with_format("arrow").iter(_DOCUMENTS_AT_ONCE)
    return sum(
        pyarrow.compute.sum(pyarrow.compute.list_value_length(table["input_ids"])).as_py() for table in tables
    )


def number(count: int, what: str) -> str:
    """A count with its noun, in the plural unless it is 1."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _percent(share: float) -> str:
    """A percentage: two significant digits below 1%, one decimal from there on: 0.012%, 2.0%, 33.3%."""
    percent = 100 * share
    return f"{percent:.1f}%" if percent >= 1 else f"{percent:.2g}%"
