"""The name of `calm.texts` in version 0.1, which the next version removes."""

import warnings

from calm.texts import continue_texts, continue_tokens, crop_prompts

__all__ = ["continue_texts", "continue_tokens", "crop_prompts"]

warnings.warn("calm.generation is now calm.texts.", DeprecationWarning, stacklevel=2)
