"""Models that are saved over others."""

from pathlib import Path
from typing import Any

from calm.storage.checksums import CHECKSUMS


class SavedAnew:
    """Mixin of models whose folder does not keep the checksums of what it replaces."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """See `transformers.PreTrainedModel.save_pretrained`."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        (Path(save_directory) / CHECKSUMS).unlink(missing_ok=True)
