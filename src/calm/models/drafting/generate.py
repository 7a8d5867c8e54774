"""Drafts inside transformers' `generate`, with its logits processors, stopping criteria and length limits.

Shapes: T tokens.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from calm.core.random import generators_of_rows
from calm.models.calm import CalmForCausalLM
from calm.models.drafting.draft import TREE_TOKENS, ChunkDrafter
from calm.models.drafting.passes import check_model
from calm.models.drafting.text import DraftedText
from calm.models.generation.alternatives import ends_of
from calm.models.generation.arguments import num_texts

# Arguments of `generate` that do not work with a draft, and their neutral values.
_REFUSED = {
    "num_beams": (None, 1),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "prompt_lookup_num_tokens": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "cache_implementation": (None, "dynamic"),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}
# Added by transformers itself; a text has its own cache whatever `use_cache` says.
_ADDED_BY_TRANSFORMERS = frozenset(
    ("attention_mask", "position_ids", "past_key_values", "cache", "logits_to_keep", "use_cache")
)


@dataclass
class DraftedOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns.

    Args:
        sequences: The prompt with its continuation, shape (1, T + new).
        num_rounds: Forward passes of the target model.
        num_drafted: Drafted tokens; of a tree, those of its longest path.
        num_accepted: Drafted tokens that were accepted.
    """

    sequences: Tensor | None = None
    num_rounds: int | None = None
    num_drafted: int | None = None
    num_accepted: int | None = None


@dataclass(frozen=True)
class Drafting:
    """Lets a CALM draft for another model: `model.generate(ids, custom_generate=Drafting(calm))`.

    The text has the same distribution as without a draft; with greedy decoding, it is the same text. Only the
    time differs and, for a given seed, the samples. It takes one prompt at a time.

    Args:
        draft: A CALM with the target model's tokens.
        num_chunks: Chunks per draft.
        num_draws: See `ChunkDrafter`.
        lookup: See `ChunkDrafter`.
        tree_tokens: See `ChunkDrafter`.
        streamer: Receives the prompt and the tokens; that of `generate` itself is not passed on.
        generator: Source of randomness, on the model's device; torch's default generator if None.
    """

    draft: CalmForCausalLM
    num_chunks: int = 1
    num_draws: int = 16
    lookup: int = 3
    tree_tokens: int = TREE_TOKENS
    streamer: BaseStreamer | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.draft, CalmForCausalLM):
            raise ValueError(
                f"the draft must be a CALM, not a {type(self.draft).__name__}; for a smaller token-level "
                "model, use transformers' assistant_model."
            )
        for name in ("lookup", "tree_tokens"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} must be at least 0, got {value}.")
        if self.num_chunks < 1 or self.num_draws < 1:
            raise ValueError(
                f"num_chunks and num_draws must be at least 1, got {self.num_chunks} and {self.num_draws}."
            )

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | DraftedOutput:
        """Generate a text; transformers calls this after processing the arguments of `generate`.

        Raises:
            ValueError: If the model or an argument does not work with drafts.
        """
        check_model(model)
        self._check(model, input_ids, generation_config, model_kwargs)
        is_greedy = not generation_config.do_sample
        temperature = 0.0 if is_greedy else generation_config.temperature or 1.0
        text = DraftedText(
            model,
            ChunkDrafter(
                self.draft, temperature, self.num_chunks, self.num_draws, self.lookup, self.tree_tokens
            ),
            input_ids,
            model_kwargs.get("attention_mask"),
            logits_processor,
            is_greedy,
            self.generator,
        )
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        length = self._generate(text, stopping_criteria, generation_config.max_length)
        if self.streamer is not None:
            self.streamer.end()
        sequences = text.ids_1T[:, :length]
        if not generation_config.return_dict_in_generate:
            return sequences
        counts = text.counts
        return DraftedOutput(sequences, counts.rounds, counts.drafted, counts.accepted)

    def _generate(self, text: DraftedText, criteria: StoppingCriteriaList, max_length: int) -> int:
        """Run rounds until a stopping criterion is met; returns the text's length up to there."""
        while True:
            num_before = text.ids_1T.shape[1]
            new_tokens = text.run_round(max_length - num_before)
            for length in range(num_before + 1, num_before + len(new_tokens) + 1):
                # Checked after every token, as without a draft.
                is_done = bool(criteria(text.ids_1T[:, :length], None).all())
                if self.streamer is not None:
                    self.streamer.put(text.ids_1T[0, length - 1 : length].cpu())
                if is_done:
                    return length

    def _check(
        self, model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any]
    ) -> None:
        for name, neutral in _REFUSED.items():
            if (value := getattr(config, name, None)) not in neutral:
                raise ValueError(f"{name}={value!r} is not supported with a draft; leave it out.")
        if len(input_ids) > 1:
            raise ValueError(f"with a draft, generation takes one prompt at a time; got {len(input_ids)}.")
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("with a draft, prompts must be token ids: pass input_ids, not inputs_embeds.")
        for name in ("past_key_values", "cache"):
            if (cache := kwargs.get(name)) is not None and cache.get_seq_length() > 0:
                raise ValueError(f"{name} is not supported with a draft: both models must read the prompt.")
        given = {name for name, value in kwargs.items() if value is not None}
        if others := sorted(given - _ADDED_BY_TRANSFORMERS - _REFUSED.keys()):
            raise ValueError(
                f"{others[0]} is not supported with a draft, which reads only tokens; leave it out."
            )
        mask_BT = kwargs.get("attention_mask")
        if not (input_ids.numel() if mask_BT is None else mask_BT.any()):
            raise ValueError("a draft needs a prompt of at least one token.")
        if self.draft.device != model.device:
            raise ValueError(
                f"the draft is on {self.draft.device} and the model on {model.device}; move one to the other."
            )


def generate_drafted(
    model: PreTrainedModel,
    drafting: Drafting,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    num_return_sequences: int = 1,
    seed: int | None = None,
    **arguments: Any,
) -> Tensor:
    """Prompts with their continuations, (B · copies, T + new), generated one after another.

    Args:
        model: The target model.
        drafting: The draft and its settings.
        input_ids: Prompts (B, T).
        attention_mask: (B, T), 1 on their tokens.
        num_return_sequences: Texts per prompt.
        seed: With a prompt and its earlier copies, determines the text in any batch; None uses
            `drafting.generator`.
        **arguments: Further arguments of transformers' `generate`.

    Raises:
        ValueError: If the seed is not a whole number, or `drafting` already has a generator.
    """
    if seed is not None and drafting.generator is not None:
        raise ValueError("give either a seed or a generator, not both.")
    generate: Any = model.generate
    config: Any = model.generation_config
    mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = torch.arange(len(input_ids)).repeat_interleave(num_texts(num_return_sequences)).tolist()
    draftings = [drafting] * len(rows)
    if seed is not None:
        prompts = [input_ids[row][mask_BT[row].bool()].tolist() for row in rows]
        generators = generators_of_rows(seed, prompts, model.device)
        draftings = [dataclasses.replace(drafting, generator=generator) for generator in generators]
    texts = [
        generate(
            input_ids[row : row + 1],
            attention_mask=mask_BT[row : row + 1],
            custom_generate=row_drafting,
            **arguments | {"return_dict_in_generate": False},
        )[0]
        for row, row_drafting in zip(rows, draftings, strict=True)
    ]
    pad = config.pad_token_id
    if pad is None:
        pad = next(iter(ends_of(config)), 0)
    return pad_sequence(texts, batch_first=True, padding_value=pad)
