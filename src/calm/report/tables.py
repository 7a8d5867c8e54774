"""Scores and costs as tables on the terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from calm.core.brier import NUM_ORDERS
from calm.evaluation.brier import BrierResult
from calm.evaluation.held_out import Scorecard
from calm.evaluation.perplexity import PerplexityResult
from calm.flops import Cost, CostOfThoughts
from calm.quantities import short

BRIER_COLUMNS = ("BrierLM", *(f"Brier-{n}" for n in range(1, NUM_ORDERS + 1)))


def print_scorecard(card: Scorecard) -> None:
    """Print the scores of a model on held-out text."""
    console = Console()
    if card.reconstruction is not None:
        result = card.reconstruction
        console.print(
            f"reconstruction  {result.token_accuracy:.3%} of tokens, {result.chunk_accuracy:.3%} of chunks "
            f"(from a posterior draw: {result.token_accuracy_noisy:.3%} of tokens)",
            highlight=False,
        )
    if card.perplexity is not None:
        perplexity = card.perplexity
        console.print(
            f"perplexity  {perplexity.perplexity:.3f} ({perplexity.cross_entropy:.4f} nats per token, "
            f"{perplexity.num_tokens:,} tokens){perplexities_of(card.floor_perplexities)}",
            highlight=False,
        )
    console.print(caption_of(card), highlight=False)
    rows = [[name, *cells_of(result)] for name, result in rows_of(card)]
    print_narrow(console, ["", *BRIER_COLUMNS], rows)


def perplexities_of(floors: Mapping[str, PerplexityResult]) -> str:
    """Perplexities of n-gram models, to append to a model's; empty if there are none."""
    return "".join(f"; {name} model: {floor.perplexity:.3f}" for name, floor in floors.items())


def print_narrow(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a `narrow_table`; what does not fit the terminal wraps instead of being cropped."""
    console.print(narrow_table(columns, rows), crop=False)


def narrow_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for an 80-column terminal: cells wrap between words, and no word is truncated."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        words = [word for cell in (column, *(row[i] for row in rows)) for word in cell.split()]
        table.add_column(column, min_width=max(map(len, words), default=0))
    for row in rows:
        table.add_row(*row)
    return table


def print_costs(
    title: str, cost: Cost, with_draws: Cost | None, draws: float, thoughts: CostOfThoughts | None = None
) -> None:
    """Print what a model costs, by part.

    Args:
        title: Heading of the table.
        cost: Cost with one draw per chunk.
        with_draws: Cost with the draws of low temperature; None for a model that never needs more than one.
        draws: Number of draws at low temperature.
        thoughts: Cost that thoughts add to an answer; None without thoughts.
    """
    columns: dict[str, Mapping[str, float]] = {
        "parameters": cost.parameters,
        "training": cost.training,
        "inference" if with_draws is None else "inference, T = 1": cost.inference,
    }
    if with_draws is not None:
        columns[f"with {draws:g} draws"] = with_draws.inference
    table = Table("", *columns)
    for part in dict.fromkeys(part for column in columns.values() for part in column):
        table.add_row(part, *(short(column[part]) if part in column else "" for column in columns.values()))
    table.add_section()
    table.add_row("all", *(short(sum(column.values())) for column in columns.values()))
    console = Console(highlight=False)
    console.print(title)
    console.print(table)
    if thoughts is not None:
        num_thoughts = f"{thoughts.number:,} thought" + "s" * (thoughts.number != 1)
        console.print(
            f"a thought takes {short(thoughts.flops_of_one)}; {num_thoughts} and 2 markers add "
            f"{short(thoughts.flops)} to an answer",
            soft_wrap=True,
        )


def caption_of(card: Scorecard) -> str:
    """The protocol of a model's scores, in one line."""
    return (
        f"T = 1, {card.brier.num_chunks:,} held-out chunks, blocks of {card.brier.context} tokens, "
        f"layout {card.layout}, in percent ± standard error"
    )


def costs_exclude(excluded: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """A sentence on each model with parts that were trained before its run.

    Args:
        excluded: The name of each model, and those parts.
    """
    return [
        f"The costs of {name} do not include the training of {' and of '.join(parts)}."
        for name, parts in excluded
        if parts
    ]


def rows_of(card: Scorecard) -> list[tuple[str, BrierResult]]:
    """Rows of a scorecard: floors, the model, and ceilings."""
    return [
        *card.floors.items(),
        (card.name, card.brier),
        *card.ceilings.items(),
    ]


def cells_of(result: BrierResult) -> list[str]:
    """BrierLM (or why it is undefined) and Brier-1..4, with their standard errors if known."""
    pairs = zip(result.as_metrics().values(), result.as_errors().values(), strict=True)
    cells = [with_error(value, error).replace(" ", "") for value, error in pairs]
    # No spaces, to fit in 80 columns.
    return [f"undefined: {result.undefined}", *cells[1:]] if result.undefined else cells


def spaced(cell: str) -> str:
    """A cell of a terminal table with spaces around ±, for pages, which have room for them."""
    return cell.replace("±", " ± ")


def with_error(value: float, error: float, sign: str = "") -> str:
    """A number and its standard error, if it has one; with sign "+", the number always shows its sign."""
    return f"{value:{sign}.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
