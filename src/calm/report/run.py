"""The report of one run, as one self-contained HTML file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calm.evaluation.held_out import Scorecard
from calm.quantities import duration, short
from calm.report.curves import History, panels_of_run
from calm.report.facts import RunFacts
from calm.report.pages import Figure, Table, page_of
from calm.report.panels import picture_of
from calm.report.tables import BRIER_COLUMNS, caption_of, cells_of, rows_of, spaced
from calm.storage.disk import read_json, write_file_whole


@dataclass(frozen=True)
class Sample:
    """A continuation that the model wrote.

    Args:
        prompt: The text it was given.
        continuation: What it wrote.
        truth: How the text goes on in the corpus.
    """

    prompt: str
    continuation: str
    truth: str


@dataclass(frozen=True)
class RunReport:
    """What the report of a run shows; what a run of its kind does not have is left out of the page.

    Args:
        title: Its heading.
        card: Held-out figures.
        history: Logged figures of each stage, as the Trainer keeps them.
        samples: What the model wrote.
        recipe: The resolved recipe as text.
        facts: What is known of the run beside its scores.
    """

    title: str
    card: Scorecard
    history: History
    samples: Sequence[Sample]
    recipe: str
    facts: RunFacts


def write_report(path: Path, report: RunReport) -> None:
    """Write the report of a run of any kind as one HTML file, with plots inside.

    Raises:
        InputError: If matplotlib is missing.
    """
    if not report.facts.has_trained_autoencoder:
        report = replace(report, card=replace(report.card, reconstruction=None, ceilings={}))
    panels = panels_of_run(report.history, report.card, report.facts.has_loss_in_nats)
    page = page_of(
        "run.html",
        title=report.title,
        facts=report.facts,
        figures=_key_figures(report),
        scores=_scores(report),
        notes=_notes(report.card),
        stages=_stages(report.facts),
        pictures=[picture_of(panel) for panel in panels],
        parameters=_parameters(report.facts),
        samples=report.samples,
        recipe=report.recipe,
    )
    write_file_whole(path, page)


def read_history(path: Path) -> History:
    """The logged figures of a run.

    Raises:
        InputError: If they are damaged.
    """
    return read_json(path, dict)


def _key_figures(report: RunReport) -> list[Figure]:
    card, facts = report.card, report.facts
    figures = [brier_figure(card, "BrierLM")]
    if (perplexity := card.perplexity) is not None:
        note = f"{perplexity.cross_entropy:.3f} nats per token"
        if floors := card.floor_perplexities:
            best = min(floors, key=lambda name: floors[name].perplexity)
            note += f"; {best} model: {floors[best].perplexity:.2f}"
        figures.append(Figure("Perplexity", f"{perplexity.perplexity:.2f}", note=note))
    if card.reconstruction is not None:
        share = f"{card.reconstruction.token_accuracy:.2%}"
        figures.append(Figure("Reconstruction", share, note="of held-out tokens"))
    figures.append(Figure("Parameters", short(sum(facts.parameters.values()))))
    if facts.tokens:
        figures.append(Figure("Tokens seen", short(facts.tokens), note="by the language model"))
    if facts.flops is not None:
        figures.append(Figure("Training FLOPs", short(facts.flops)))
    if facts.seconds is not None:
        figures.append(Figure("Training time", duration(facts.seconds)))
    return figures


def brier_figure(card: Scorecard, name: str) -> Figure:
    """BrierLM as a key figure, beside the best of the n-gram models; Brier-1 where it is undefined."""
    brier = card.brier
    if brier.undefined:
        return Figure(name, "undefined", note=f"{brier.undefined}; Brier-1 is {100 * brier.means[0]:.2f}")
    floors = {floor: result.brier_lm for floor, result in card.floors.items() if not result.undefined}
    best = max(floors, key=lambda floor: floors[floor], default=None)
    error = "" if math.isnan(brier.brier_lm_error) else f"± {brier.brier_lm_error:.2f}"
    return Figure(name, f"{brier.brier_lm:.2f}", error, f"{best} model: {floors[best]:.2f}" if best else "")


def _scores(report: RunReport) -> Table:
    name_of = {report.card.name: report.facts.model}
    rows = [
        [name_of.get(name, name), *map(spaced, cells_of(result))] for name, result in rows_of(report.card)
    ]
    return Table(caption_of(report.card.brier), ["", *BRIER_COLUMNS], rows)


def _notes(card: Scorecard) -> list[str]:
    notes = []
    if card.floors:
        notes.append("The n-gram models were counted on the same training text.")
    if card.ceilings:
        notes.append("The ceiling is what the true next latents score when they are decoded.")
    if (back := card.reconstruction) is not None:
        notes.append(
            f"The autoencoder reconstructs {back.token_accuracy:.3%} of tokens and {back.chunk_accuracy:.3%} "
            f"of chunks; from a draw of its posterior (standard deviation {back.posterior_std:.2f}), "
            f"{back.token_accuracy_noisy:.3%} of tokens."
        )
    return notes


def _stages(facts: RunFacts) -> Table:
    """Steps and tokens of each stage; FLOPs and time where they are known."""
    rows = [
        [
            stage.name.replace("_", " "),
            f"{stage.steps:,}",
            short(stage.tokens),
            "" if stage.flops is None else short(stage.flops),
            "" if stage.seconds is None else duration(stage.seconds),
        ]
        for stage in facts.stages
    ]
    has_times = any(stage.seconds is not None for stage in facts.stages)
    caption = "Held-out evaluations are part of the time." if has_times else ""
    return Table(caption, ["", "steps", "tokens", "FLOPs", "time"], rows).without_empty_columns()


def _parameters(facts: RunFacts) -> Table:
    counts = {**facts.parameters, "all": sum(facts.parameters.values())}
    return Table("", ["", "parameters"], [[part, f"{number:,}"] for part, number in counts.items()])
