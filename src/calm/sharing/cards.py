"""A finished run -> the model card in its model folder."""

from pathlib import Path

import yaml

from calm.errors import InputError, reason_of
from calm.sharing.card import CARD, MARK, CardDetails
from calm.sharing.finetuned import card_of_finetuning
from calm.sharing.trained import card_of_training
from calm.storage.disk import write_atomically
from calm.training.recipe_files import RECIPE


def write_card(
    run: Path,
    *,
    name: str | None = None,
    license_name: str | None = None,
    about: str | None = None,
    ngrams: list[int] | None = None,
    num_blocks: int | None = None,
) -> Path:
    """Write the model card of a finished run into its model folder, from the run's records and its scores.

    Args:
        run: Folder of `calm train` or `calm finetune`.
        name: Name of the model on the card; None for that of the run's folder.
        license_name: An identifier that the hub knows, such as "mit".
        about: A paragraph in your own words.
        ngrams: Orders of the n-gram floors on the card of a trained model.
        num_blocks: Maximum number of held-out blocks to score, for a trained model.

    Returns:
        The path of the card.

    Raises:
        InputError: If the run is not finished, an argument does not apply, or somebody else wrote a card.
    """
    folder = run / "model"
    if not (run / RECIPE).is_file() or not (folder / "config.json").is_file():
        raise InputError(
            f"'{run}' is not a finished run of `calm train` or `calm finetune` (it needs {RECIPE} and "
            "model/)."
        )
    path = folder / CARD
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
        raise InputError(f"'{path}' was not written by `calm share`; move it away to have one written.")
    details = CardDetails(name or run.resolve().name, license_name, about)
    if not _is_finetuning(run / RECIPE):
        text = card_of_training(run, details, ngrams or [], num_blocks)
    elif ngrams or num_blocks is not None:
        raise InputError(
            "the card of a fine-tuned model has the scores of its run; leave out --ngrams and --max_blocks."
        )
    else:
        text = card_of_finetuning(run, details)
    write_atomically(path, text)
    return path


def _is_finetuning(path: Path) -> bool:
    """Whether a recipe is one of `calm finetune`."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"'{path}' cannot be read ({reason_of(error)}).") from error
    return isinstance(values, dict) and "examples" in values
