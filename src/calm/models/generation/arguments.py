"""Arguments of transformers' `generate` that have no meaning for chunks: what each may be, and why.

An argument that would change the text, but cannot, is refused. At its default it has no effect, and passes.
"""

from collections.abc import Mapping
from typing import Any

_SCORES = "chunks are drawn as a whole, so there are no token scores to change or return"
_LENGTH = "the end of a text is drawn as part of its chunk and cannot be delayed"
_BEAMS = "there is no beam search over chunks"
_DRAFTS = "there is no draft model for chunks"
_STATES = "generate returns only tokens and draw counts; call the model itself for its states"
_CACHES = "the cache has no such setting"

_REASONS: dict[str, tuple[str, ...]] = {
    _SCORES: (
        "top_k", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
        "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
        "force_words_ids", "constraints", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
        "begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty", "renormalize_logits",
        "remove_invalid_values", "token_healing", "guidance_scale", "watermarking_config", "dola_layers",
        "logits_processor", "prefix_allowed_tokens_fn", "negative_prompt_ids",
        "negative_prompt_attention_mask", "output_scores", "output_logits",
    ),
    _LENGTH: ("min_length", "min_new_tokens"),
    _BEAMS: ("num_beams", "num_beam_groups", "early_stopping", "length_penalty", "diversity_penalty",
             "penalty_alpha"),
    _DRAFTS: ("assistant_model", "assistant_tokenizer", "use_mtp", "prompt_lookup_num_tokens",
              "max_matching_ngram_size", "assistant_early_exit", "custom_generate"),
    _STATES: ("output_attentions", "output_hidden_states"),
    _CACHES: ("cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
}  # fmt: skip
# Values without an effect, besides None, False and empty ones.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (0,),
    "top_h": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
}
REFUSED: dict[str, str] = {name: reason for reason, names in _REASONS.items() for name in names}


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise ValueError for the first argument that asks for something unsupported."""
    for name, value in given.items():
        if name in REFUSED and not _is_neutral(name, value):
            raise ValueError(f"{name}={value!r} is not supported: {REFUSED[name]}. Leave it out.")


def num_texts(requested: Any) -> int:
    """Number of texts per prompt that `num_return_sequences` asks for; 1 if it is None.

    Raises:
        ValueError: If it is not a whole number of at least 1.
    """
    if requested is None:
        return 1
    if not isinstance(requested, int) or isinstance(requested, bool) or requested < 1:
        raise ValueError(f"num_return_sequences must be a whole number of at least 1, got {requested!r}.")
    return requested


def _is_neutral(name: str, value: Any) -> bool:
    if value is None or value is False:
        return True
    if isinstance(value, list | tuple | dict | str):
        return not value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and value in _NEUTRAL.get(name, ())
