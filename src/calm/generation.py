"""Where `calm.texts` was in version 0.1; this name goes with the next."""

import warnings

from calm.texts import continue_texts, continue_tokens, crop_prompts

__all__ = ["continue_texts", "continue_tokens", "crop_prompts"]

warnings.warn("calm.generation is now calm.texts.", DeprecationWarning, stacklevel=2)
