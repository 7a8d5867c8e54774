"""A run: a recipe and its folder, locked while the run works there; each piece is written atomically.

Only the main process writes. The others make the same calls and wait where they must.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from transformers import PreTrainedTokenizerBase

from calm.errors import InputError
from calm.storage.checksums import check_intact
from calm.storage.disk import disk_errors, read_json, write_atomically
from calm.storage.folders import (
    atomic_folder,
    check_inputs_outside,
    check_output,
    discard_replaced,
    emptied,
    new_folder,
    restore,
    work_path,
)
from calm.storage.locks import LOCK, locked
from calm.storage.ours import FINETUNED, TRAINED, FolderKind
from calm.training.extending import STEPS_OF_LAST_STAGE, check_more_steps, extend_run
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.processes import processes
from calm.training.recipe import Recipe
from calm.training.recipe_files import RECIPE, AnyRecipe, differences, read_recipe_of, write_recipe
from calm.training.recipe_settings import recipe_file_of_run

logger = logging.getLogger(__name__)
HISTORY = "history.json"
DATA = "data"  # The prepared text of a run, in its folder.
_KEPT = (LOCK, work_path(Path(DATA)).name)  # Kept when a folder is emptied for a run.
_REPLACED: dict[type, FolderKind] = {Recipe: TRAINED, FinetuningRecipe: FINETUNED}


@dataclass(frozen=True)
class Run(Generic[AnyRecipe]):
    """A recipe and the folder of its run.

    Args:
        recipe: The recipe.
        folder: The folder.
        resume: Whether to resume the run in that folder.
        overwrite: Whether the contents of that folder may be replaced.
    """

    recipe: AnyRecipe
    folder: Path
    resume: bool = False
    overwrite: bool = False

    def check_folder(self, inputs: Sequence[str] = ()) -> None:
        """Check that the run can start in its folder, or resume there; nothing is changed.

        Args:
            inputs: Paths and names of what the run reads.

        Raises:
            InputError: If the folder is not empty or holds an input, or there is no run of this recipe to
                resume.
        """
        if not self.resume:
            check_inputs_outside(self.folder, inputs)
            check_output(self.folder, _REPLACED[type(self.recipe)] if self.overwrite else None, _KEPT)
            return
        recorded = self._recorded_recipe()
        changed = differences(recorded, self.recipe)
        if changed == [STEPS_OF_LAST_STAGE[type(self.recipe)]]:
            check_more_steps(self.folder, recorded, self.recipe)
        elif changed:
            raise InputError(
                f"cannot resume '{self.folder}': the recipe differs in {', '.join(changed)}; "
                f"use the recipe in {self.folder / RECIPE}, or another output folder."
            )

    def _recorded_recipe(self) -> AnyRecipe:
        """The recipe on record in the run's folder."""
        return read_recipe_of(type(self.recipe), str(recipe_file_of_run(self.folder)))

    @contextlib.contextmanager
    def locked(self, inputs: Sequence[str] = ()) -> Iterator[None]:
        """Check the folder, and lock it for the block.

        What a killed command has moved aside is restored first.

        Args:
            inputs: Paths and names of what the run reads.

        Raises:
            InputError: As `check_folder`, or if another process is working there.
            RunError: If the disk is full, or cannot be written.
        """
        with disk_errors(
            self.folder, "once there is room on the disk, --resume continues from the work already done"
        ):
            if not processes().is_main_process:
                yield
                return
            if not self.folder.is_dir():
                self.check_folder(inputs)
            with new_folder(self.folder), locked(self.folder / LOCK, f"the run '{self.folder}'"):
                if not (self.resume and (self.folder / RECIPE).is_file()):
                    restore(self.folder, _KEPT)
                self.check_folder(inputs)
                yield

    @contextlib.contextmanager
    def set_up(self) -> Iterator[None]:
        """Set up the folder, around the block in which the main process prepares the run.

        A new run starts with nothing but its recipe: previous contents are removed once the block succeeds.
        If it fails, they are restored; text prepared so far is kept. A run that is resumed with more steps is
        extended once the block succeeds.
        """
        if self.resume:
            yield
            discard_replaced(self.folder)
            recorded = self._recorded_recipe()
            if differences(recorded, self.recipe):
                extend_run(self.folder, recorded, self.recipe)
            if changed := differences(recorded, self.recipe, "rounding"):
                logger.warning(
                    "%s changed: the weights will differ by rounding from those of an unchanged run",
                    ", ".join(changed),
                )
            if recorded != self.recipe:
                write_recipe(self.recipe, self.folder / RECIPE)
            return
        with emptied(self.folder, _KEPT):
            write_recipe(self.recipe, self.folder / RECIPE)
            yield
        shutil.rmtree(work_path(self.folder / DATA), ignore_errors=True)

    def is_finished(self, name: str) -> bool:
        """Whether a model or adapters have been saved under a name."""
        folder = self.folder / name
        return any((folder / file).is_file() for file in ("config.json", "adapter_config.json"))

    def has_model(self, name: str) -> bool:
        """`is_finished`, with the same answer for all processes, which call this together.

        Raises:
            InputError: If it is damaged.
        """
        is_finished = self.is_finished(name)
        if is_finished and processes().is_main_process:
            check_intact(self.folder / name)
        processes().wait_for_everyone()  # Otherwise a fast process could write it before a slow one looks.
        return is_finished

    def save_model(
        self,
        name: str,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        json_files: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a model folder with tokenizer and recipe.

        Args:
            name: Its name inside the run's folder.
            model: A model, or adapters: anything with `save_pretrained`.
            tokenizer: Its tokenizer.
            json_files: Contents of further JSON files, by file name.
        """
        if processes().is_main_process:
            with atomic_folder(self.folder / name) as partial:
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
                write_recipe(self.recipe, partial / RECIPE)
                for file, value in (json_files or {}).items():
                    (partial / file).write_text(json.dumps(value) + "\n", encoding="utf-8")
        processes().wait_for_everyone()

    def save_history(self, log: list[dict[str, Any]], stage: str | None = None) -> None:
        """Write what was logged; if it is the log of one stage, those of other stages are kept."""
        if processes().is_main_process:
            history = log if stage is None else {**self._read_history(), stage: log}
            write_atomically(self.folder / HISTORY, json.dumps(history, indent=1) + "\n")

    def _read_history(self) -> dict[str, Any]:
        """What was logged so far. A damaged file is moved aside, since no weights depend on it."""
        path = self.folder / HISTORY
        try:
            return read_json(path, dict) if path.exists() else {}
        except InputError as error:
            renamed = path.with_name(f"damaged-{path.name}")
            path.replace(renamed)
            logger.warning(
                "%s It was renamed to '%s'; what was logged before is missing from the new log.",
                error,
                renamed.name,
            )
            return {}
