"""Generation chunk by chunk, modeled on `GenerationMixin.generate`.

Shapes: B batch, T tokens, K tokens per chunk, C chunks, D hidden size, S steps.
"""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from calm.core.chunks import as_id_tensor, end_after_eos, is_after_eos
from calm.core.random import Randomness, generators_of_rows, select_rows
from calm.core.samplers import Sampler
from calm.core.temperature import ChunkSample
from calm.models.context import check_room, remaining_context
from calm.models.generation.ahead import CompiledSteps
from calm.models.generation.arguments import REFUSED, check_arguments, num_texts
from calm.models.generation.model import ChunkModel
from calm.models.generation.prompts import Prompt
from calm.models.generation.sampler_registry import default_sampler, sampler_from
from calm.models.generation.sampling import sample_chunks
from calm.models.generation.steps import steps_of
from calm.models.generation.stopping import Stopping
from calm.models.thoughts import Thoughts, num_tokens_of, thoughts_for

logger = logging.getLogger(__name__)
DEFAULT_MAX_NEW_TOKENS = 128
_USED = {
    "max_new_tokens",
    "max_length",
    "temperature",
    "top_p",
    "min_p",
    "num_return_sequences",
    "use_cache",
    "cache_implementation",
    "compile_config",
    "disable_compile",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "return_dict_in_generate",
    "do_sample",
    "max_time",
    "stop_strings",
}


@dataclass
class CalmGenerateOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns; one column per generated chunk.

    Args:
        sequences: Prompts with their continuations, shape (B, T + new).
        num_draws: Draws made, shape (B, S); 0 for rows that had ended.
        num_needed: Draws that the decision is based on, shape (B, S).
        fell_back: Whether the budget of the exact sampler was used up, shape (B, S).
        agreement: Share of the draws equal to the chosen chunk, shape (B, S).
    """

    sequences: Tensor | None = None
    num_draws: Tensor | None = None
    num_needed: Tensor | None = None
    fell_back: Tensor | None = None
    agreement: Tensor | None = None


# transformers considers a model generative if "GenerationMixin" is in the name of a base class.
class ChunkGenerationMixin:
    """`generate` for models that predict chunks, and the sampling methods behind it."""

    @torch.no_grad()
    def generate(
        self: ChunkModel,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        *,
        sampler: str | Sampler | None = None,
        num_draws: int | None = None,
        max_draws: int | None = None,
        num_thoughts: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **kwargs: Any,
    ) -> Tensor | CalmGenerateOutput:
        """Continue each prompt chunk by chunk until EOS or `max_new_tokens`.

        A prompt is padded in front, so that it ends on a chunk boundary; the model has seen this in
        training, where documents start at a random offset inside their first chunk.

        Args:
            input_ids: Prompts (B, T), padded on either side where `attention_mask` is 0; one
                beginning-of-text token if None.
            attention_mask: (B, T), 1 on tokens of the prompt.
            generation_config: Defaults to the model's, which also supplies what another one leaves open;
                keyword arguments override it. Supported are
                `max_new_tokens` (or `max_length`), `temperature` (0 to 1), `top_p` and `min_p` (pool
                sampler), `num_return_sequences`, `stop_strings`, `max_time`, `use_cache`,
                `cache_implementation` and `compile_config` (see `calm.models.generation.steps`),
                `eos_token_id`, `pad_token_id` and `return_dict_in_generate`. Others are accepted at their
                defaults and are errors otherwise (see `calm.models.generation.arguments`).
                `do_sample=False` asks for greedy decoding, which does not exist for chunks, and is an error:
                use `temperature=0` for the mode of a pool.
            streamer: Receives the new tokens as they are generated (batch of one).
            sampler: "exact", "pool" or "head", or a sampler object (see `calm.core.samplers`), whose own
                temperature then applies; by default "pool" with `top_p` or `min_p`, otherwise "head" if the
                head takes the temperature, otherwise "exact".
            num_draws: Pool size of the pool sampler, and of the exact one at temperature 0.
            max_draws: Maximum number of draws per chunk of the exact sampler.
            num_thoughts: Thoughts after each prompt (see `calm.models.thoughts`), which are not returned.
                None takes as many as the model was trained with, 0 takes none.
            seed: Makes the text reproducible: a prompt's text then depends on the seed, the prompt and its
                earlier copies in the batch, not on the other rows (up to rounding, which differs between
                batch shapes).
            generator: One source of randomness for all rows, on the model's device; alternative to
                `seed`.
            tokenizer: The model's tokenizer; `stop_strings` need it.
            stopping_criteria: Stopping criteria of transformers, checked after every token of a chunk; they
                get no scores.
            **kwargs: Overrides of the generation config.

        Returns:
            Prompts with their continuations (B, T + new); rows that ended are filled with padding.
            With `return_dict_in_generate`, a `CalmGenerateOutput`, which counts draws as well.

        Raises:
            ValueError: If an argument is out of range, unknown or contradicts another, or a prompt and its
                new tokens do not fit in the model's context.
        """
        config = _generation_settings(self, generation_config, kwargs)
        cuts = {"top_p": config.top_p, "min_p": config.min_p}
        chunk_sampler = sampler_from(
            sampler=sampler or default_sampler(self.head.config, config.temperature, **cuts),
            temperature=config.temperature,
            num_draws=num_draws,
            max_draws=max_draws,
            **cuts,
        )
        prompt_BT, mask_BT = _prompts(self, input_ids, attention_mask, config)
        if generator is not None and seed is not None:
            raise ValueError("give either a seed or a generator, not both.")
        randomness: Randomness = generator
        if seed is not None:
            rows = [
                prompt_T[mask_T].tolist() for prompt_T, mask_T in zip(prompt_BT, mask_BT.bool(), strict=True)
            ]
            randomness = generators_of_rows(seed, rows, self.device)
        thoughts = thoughts_for(self.config, num_thoughts, warns=True)
        longest, num_thought = int(mask_BT.bool().sum(-1).max()), num_tokens_of(thoughts, self.config)
        room = remaining_context(self.config, longest + num_thought) or 0
        budget = _num_new_tokens(config, prompt_BT.shape[1], room)
        check_room(self.config, longest, budget, num_thought)
        stopping = Stopping(config, stopping_criteria, tokenizer, prompt_BT, mask_BT)
        if streamer is not None:
            if prompt_BT.shape[0] > 1:
                raise ValueError("a streamer supports only one prompt at a time.")
            streamer.put(prompt_BT.cpu())
        new_BT, statistics = _Generation(
            self, prompt_BT, mask_BT, budget, config, chunk_sampler, randomness, streamer, stopping, thoughts
        ).run()
        if streamer is not None:
            streamer.end()
        sequences = torch.cat([prompt_BT, new_BT], dim=1)
        if not config.return_dict_in_generate:
            return sequences
        return CalmGenerateOutput(sequences=sequences, **statistics)

    def sample_chunks(
        self: ChunkModel,
        states_PD: Tensor,
        sampler: Sampler,
        randomness: Randomness = None,
        compiled: CompiledSteps | None = None,
    ) -> ChunkSample:
        """Sample one next chunk per state; see `calm.models.generation.sampling.sample_chunks`."""
        return sample_chunks(self, states_PD, sampler, randomness, compiled)

    @torch.no_grad()
    def draw_chunks(
        self: ChunkModel, states_PD: Tensor, num_draws: int, randomness: Randomness = None
    ) -> Tensor:
        """Independent draws of the next chunk at temperature 1, (N, P, K)."""
        return self.head.draw_chunks(self.head.prepare(states_PD), num_draws, randomness)


def _generation_settings(
    model: ChunkModel, config: GenerationConfig | None, overrides: dict[str, Any]
) -> GenerationConfig:
    config = copy.deepcopy(config or model.generation_config)
    if overrides.get("do_sample", config.do_sample) is False:
        raise ValueError(
            "greedy decoding is not available for chunks; use temperature=0 for the most frequent chunk of a "
            "pool."
        )
    _fill_in(config, model.generation_config)
    if overrides.get("max_new_tokens") is None and "max_length" in overrides:
        config.max_new_tokens = None
    config.do_sample = True  # Otherwise transformers warns about every temperature.
    config.update(**overrides)
    check_arguments(vars(config) | overrides)
    known = _USED | REFUSED.keys()
    if unused := [name for name, value in overrides.items() if name not in known and value is not None]:
        raise ValueError(f"generate() does not support the argument(s): {', '.join(sorted(unused))}.")
    config.temperature = 1.0 if config.temperature is None else config.temperature
    if config.eos_token_id is None:
        config.eos_token_id = model.config.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = model.config.pad_token_id
    return config


def _fill_in(config: GenerationConfig, defaults: GenerationConfig) -> None:
    """Take what a configuration leaves open from the model's, as transformers does."""
    lengths = ("max_new_tokens", "max_length")
    has_length = any(getattr(config, name) is not None for name in lengths)
    for name, value in vars(defaults).items():
        if getattr(config, name, None) is None and not (has_length and name in lengths):
            setattr(config, name, value)


def _prompts(
    model: ChunkModel,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    config: GenerationConfig,
) -> tuple[Tensor, Tensor]:
    """Prompt tokens and mask, (B · copies, T) each."""
    if input_ids is None:
        begin = model.config.bos_token_id if config.bos_token_id is None else config.bos_token_id
        if begin is None:
            raise ValueError("give a prompt: this model has no BOS token.")
        input_ids = torch.tensor([[begin]], device=model.device)
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must have a non-empty shape (batch, tokens), got {tuple(input_ids.shape)}."
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}."
        )
    if not attention_mask.bool().any(-1).all():
        raise ValueError("a prompt is empty: start it with the BOS token.")
    if int(input_ids.min()) < 0 or int(input_ids.max()) >= model.config.vocab_size:
        raise ValueError(
            f"token ids must be between 0 and {model.config.vocab_size - 1}, got {int(input_ids.min())} to "
            f"{int(input_ids.max())}; is this the model's own tokenizer?"
        )
    if input_ids.shape[1] > 1 and _all_end(input_ids, attention_mask, config):
        logger.warning(
            "Every prompt ends with an EOS token, so the model starts a new text after it. Encode prompts "
            "with calm.text.encoding.encode_documents, which omits the EOS token that a tokenizer appends."
        )
    copies = num_texts(config.num_return_sequences)
    return input_ids.repeat_interleave(copies, 0), attention_mask.repeat_interleave(copies, 0)


@dataclass
class _Generation:
    """One call of `generate`."""

    model: ChunkModel
    prompt_BT: Tensor
    mask_BT: Tensor
    budget: int
    config: GenerationConfig
    sampler: Sampler
    randomness: Randomness
    streamer: BaseStreamer | None
    stopping: Stopping
    thoughts: Thoughts | None

    def __post_init__(self) -> None:
        self._eos_ids = as_id_tensor(self.config.eos_token_id, self.prompt_BT.device)
        self._ends = frozenset(self._eos_ids.tolist())

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """New tokens of each row, (B, new) with new <= budget, and statistics of all steps if requested."""
        size, (num_rows, prompt_length) = self.model.config.chunk_size, self.prompt_BT.shape
        pad = 0 if self.config.pad_token_id is None else self.config.pad_token_id
        prompt = Prompt.aligned(self.model, self.prompt_BT, self.mask_BT, pad).followed_by(
            self.thoughts, size
        )
        num_steps = -(-self.budget // size)
        steps = steps_of(self.model, prompt, num_steps, self.config)
        text_BT = torch.nn.functional.pad(self.prompt_BT, (0, num_steps * size), value=pad)
        length_B = torch.full_like(self.prompt_BT[:, 0], num_steps * size)  # New tokens of each text.
        open_A = torch.arange(num_rows, device=text_BT.device)  # Rows that have not ended.
        randomness = self.randomness
        samples: list[tuple[Tensor, ChunkSample]] = []
        chunk_AK: Tensor | None = None
        for step in range(num_steps):
            states_AD = steps.read() if chunk_AK is None else steps.advance(chunk_AK)
            sample = self.model.sample_chunks(states_AD, self.sampler, randomness, steps.compiled)
            if self.config.return_dict_in_generate:
                samples.append((open_A, sample))
            start = prompt_length + step * size
            chunk_AK, num_kept_A, ends_A = self._cut(sample.chunks_RK, text_BT[:, :start], open_A, pad)
            # A view if these are all rows: indexing is several times slower.
            text_BT[open_A if len(open_A) < num_rows else slice(None), start : start + size] = chunk_AK
            if self.streamer is not None:
                num_kept = size if num_kept_A is None else int(num_kept_A[0])
                _stream(self.streamer, text_BT[0, start : start + min(num_kept, self.budget - step * size)])
            if num_kept_A is None or ends_A is None:
                continue
            length_B[open_A] = torch.where(ends_A, step * size + num_kept_A, length_B[open_A])
            remaining = (~ends_A).nonzero().flatten()
            if len(remaining) == 0:
                break
            steps.keep(remaining.tolist())
            open_A, chunk_AK = open_A[remaining], chunk_AK[remaining]
            randomness = select_rows(self.randomness, open_A)
        longest = min(int(length_B.max()), self.budget)
        return text_BT[:, prompt_length : prompt_length + longest], _statistics(samples, num_rows)

    def _cut(
        self, chunk_AK: Tensor, before_BT: Tensor, open_A: Tensor, pad: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Cut chunks where their texts end.

        Returns:
            The chunks with padding after the end, (A, K); how many tokens of each are kept, (A,); and which
            end, (A,). The last two are None if none ends.
        """
        size, eos_ids = chunk_AK.shape[1], self._eos_ids
        # Looking up numbers in a set is faster than comparing tensors.
        if not self.stopping.is_needed and self._ends.isdisjoint(chunk_AK.flatten().tolist()):
            return chunk_AK, None, None
        num_kept_A = (~is_after_eos(chunk_AK, eos_ids)).sum(-1)
        chunk_AK, ends_A = end_after_eos(chunk_AK, eos_ids, pad)
        if self.stopping.is_needed:
            stop_A = self.stopping.lengths(before_BT[open_A], chunk_AK, open_A.tolist())
            num_kept_A, ends_A = num_kept_A.minimum(stop_A), ends_A | (stop_A <= size)
            is_kept_AK = torch.arange(size, device=num_kept_A.device) < num_kept_A.unsqueeze(-1)
            chunk_AK = chunk_AK.where(is_kept_AK, pad)
        return chunk_AK, num_kept_A, ends_A


def _all_end(prompt_BT: Tensor, mask_BT: Tensor, config: GenerationConfig) -> bool:
    """Whether the last token of every prompt ends a text."""
    column_T = torch.arange(prompt_BT.shape[1], device=prompt_BT.device)
    last_B = torch.where(mask_BT.bool(), column_T, -1).amax(-1, keepdim=True)
    eos_ids = as_id_tensor(config.eos_token_id, prompt_BT.device)
    return bool(torch.isin(prompt_BT.gather(1, last_B), eos_ids).all())


def _stream(streamer: BaseStreamer, tokens: Tensor) -> None:
    for token in tokens.cpu():
        streamer.put(token.unsqueeze(0))


def _statistics(steps: list[tuple[Tensor, ChunkSample]], num_rows: int) -> dict[str, Tensor]:
    """Fields of `CalmGenerateOutput`, 0 where a row had ended; empty without steps."""
    if not steps:
        return {}
    table: dict[str, list[Tensor]] = {"num_draws": [], "num_needed": [], "fell_back": [], "agreement": []}
    for rows_A, sample in steps:
        for name, columns in table.items():
            values_A = getattr(sample, name + "_R")
            columns.append(values_A.new_zeros(num_rows).index_copy(0, rows_A, values_A))
    return {name: torch.stack(columns, dim=1) for name, columns in table.items()}


def _num_new_tokens(config: GenerationConfig, prompt_length: int, room: int) -> int:
    """Maximum number of new tokens: as requested, or else the default, reduced to what fits."""
    if config.max_new_tokens is not None:
        budget = config.max_new_tokens
    elif config.max_length is not None:
        budget = config.max_length - prompt_length
    else:
        budget = min(DEFAULT_MAX_NEW_TOKENS, max(1, room))
    if budget < 1:
        raise ValueError(
            f"there is no room for new tokens: max_new_tokens is {budget}; it must be at least 1."
        )
    return budget
