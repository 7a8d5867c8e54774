"""Saving a model into the folder of an earlier one."""

from pathlib import Path
from typing import Any

from calm.storage.checksums import CHECKSUMS


class SavingMixin:
    """Removes outdated checksums when a model is saved into an existing folder."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """See `transformers.PreTrainedModel.save_pretrained`."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        (Path(save_directory) / CHECKSUMS).unlink(missing_ok=True)
