"""One interface to all language models: CALMs and any causal language model of transformers.

Scoring, fine-tuning and generation use it, and need not know which of the two a network is. The few callers
that need what only a CALM has, such as the harness and the server, ask the network or its configuration.
"""

import abc
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from calm.core.chunks import IGNORED_LABEL
from calm.core.samplers import Sampler
from calm.core.seeds import as_seed
from calm.core.temperature import decodes_greedily, inverse_temperature
from calm.errors import InputError, NotFiniteError
from calm.models.autoencoder import CalmAutoencoder
from calm.models.blocks import LastTokenProjection
from calm.models.calm import CalmForCausalLM
from calm.models.context import longest_context
from calm.models.drafting.generate import Drafting, generate_drafted
from calm.models.generation.alternatives import Alternatives, draw_alternatives, outcome_of
from calm.models.generation.arguments import num_texts
from calm.models.generation.sampler_registry import default_sampler, sampler_from
from calm.models.heads import Distillable, Likelihood
from calm.models.readers import NO_DISTRIBUTION, ChunkReader, LikelihoodChunkReader, Reader, TokensReader
from calm.models.thoughts import Thoughts, thoughts_for
from calm.models.tokens import LlamaForCausalLM
from calm.ranges import SEEDS

_ALIBI = ("bloom", "mpt")  # Model types that derive positions from the mask.


class LanguageModel(abc.ABC):
    """A language model, as seen by code that scores it or generates with it.

    Args:
        network: The model itself.
    """

    kind: ClassVar[str]
    """"CALM" or "autoregressive"."""
    autoencoder: CalmAutoencoder | None = None
    """The model's autoencoder, if it has one."""
    head_type: str | None = None
    """Name of the head; None for a token-level model."""
    learns_cross_entropy: bool = True
    """Whether its training loss is its own negative log-likelihood."""

    def __init__(self, network: PreTrainedModel) -> None:
        self.network = network

    @property
    @abc.abstractmethod
    def chunk_size(self) -> int:
        """Tokens per step K; 1 for a token-level model."""

    @property
    @abc.abstractmethod
    def has_likelihood(self) -> bool:
        """Whether it can compute the probability of a text."""

    @property
    @abc.abstractmethod
    def parts(self) -> dict[str, list[str]]:
        """Names of the trained submodules of the "backbone", and of the "head" if there is one."""

    @property
    @abc.abstractmethod
    def can_think(self) -> bool:
        """Whether it supports continuous thoughts; see `calm.models.thoughts`."""

    @property
    @abc.abstractmethod
    def can_distill(self) -> bool:
        """Whether it can learn a teacher's token distributions; see `calm.models.distillation`."""

    def thoughts(self, number: int | None) -> Thoughts | None:
        """How it thinks when asked for `number` thoughts; see `calm.models.thoughts.thoughts_for`.

        Raises:
            ValueError: If it cannot think, or the number is out of range.
        """
        if self.can_think:
            return thoughts_for(self.network.config, number)
        if number:
            raise ValueError(
                "thoughts need a CALM or a Llama loaded by calm, not a transformers "
                f"{type(self.network).__name__}; leave out num_thoughts."
            )
        return None

    @property
    @abc.abstractmethod
    def input_rms(self) -> float:
        """Root mean square of its layers' input: the embeddings, or the output of the input projection."""

    @property
    def longest_context(self) -> int | None:
        """Longest text in tokens; None if there is no limit."""
        return longest_context(self.network.config)

    @abc.abstractmethod
    def count_targets(self, labels: Tensor, position_ids: Tensor | None) -> Tensor:
        """Number of targets that the loss of a batch is averaged over.

        Args:
            labels: Tokens (B, T) with -100 where there is no loss.
            position_ids: Position of every chunk in its document (B, C).
        """

    @abc.abstractmethod
    def loss(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """Mean loss of a batch, and the number of targets.

        Args:
            input_ids: Tokens (B, T).
            labels: See `count_targets`.
            position_ids: See `count_targets`.
            generator: Source of the noise, if the loss has any.
        """

    @abc.abstractmethod
    def reader(self, temperature: float = 1.0, sampler: Sampler | None = None) -> Reader:
        """A reader for scoring text; a `LikelihoodReader` if the probabilities of its draws are known.

        Args:
            temperature: Temperature of its draws, with the default sampler.
            sampler: Sampler to use instead; a token-level model uses only its temperature.

        Raises:
            ValueError: If the model cannot score text this way.
        """

    @abc.abstractmethod
    def generate(
        self, input_ids: Tensor, *, temperature: float, seed: int | None, **arguments: Any
    ) -> Tensor:
        """Prompts with their continuations; see `CalmForCausalLM.generate` for the arguments.

        A token-level model also takes `draft`, a CALM for speculative decoding, and `draft_chunks`, how many
        chunks it drafts (see `calm.models.drafting`); prompts are then continued one at a time.

        Raises:
            ValueError: If an argument is out of range or asks for something that the model cannot do.
        """

    def alternatives(self, ids: Sequence[int], **settings: Any) -> Alternatives:
        """Candidates for a text's next chunk; see `calm.models.generation.alternatives.draw_alternatives`.

        Raises:
            InputError: If the model does not generate chunks.
        """
        raise InputError("this model generates one token at a time, not chunks.")


class _CalmModel(LanguageModel):
    """A CALM."""

    kind = "CALM"
    network: CalmForCausalLM
    parts = {"backbone": ["backbone", "projection"], "head": ["head"]}

    def __init__(self, network: CalmForCausalLM) -> None:
        super().__init__(network)
        self.autoencoder = network.autoencoder
        self.head_type = network.config.head.head_type
        self.learns_cross_entropy = self.has_likelihood and network.config.head.learns_cross_entropy

    @property
    def chunk_size(self) -> int:
        return self.network.config.chunk_size

    @property
    def has_likelihood(self) -> bool:
        return isinstance(self.network.head, Likelihood)

    @property
    def can_think(self) -> bool:
        return True

    @property
    def can_distill(self) -> bool:
        return isinstance(self.network.head, Distillable)

    @property
    def input_rms(self) -> float:
        projection = self.network.projection
        if isinstance(projection, LastTokenProjection):
            return float(self.network.backbone.embed_tokens.weight.detach().pow(2).mean().sqrt())
        norm = projection.norm
        weight, bias = norm.weight.detach(), norm.bias.detach()
        return math.sqrt(float(weight.pow(2).mean() + bias.pow(2).mean()))

    def count_targets(self, labels: Tensor, position_ids: Tensor | None) -> Tensor:
        return self.network.count_targets(labels, position_ids)

    def loss(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        output = self.network(input_ids, labels=labels, position_ids=position_ids, generator=generator)
        return output.loss, int(self.count_targets(labels, position_ids))

    def reader(self, temperature: float = 1.0, sampler: Sampler | None = None) -> ChunkReader:
        if sampler is None and temperature != 1:
            name = default_sampler(self.network.config.head, temperature)
            sampler = sampler_from(sampler=name, temperature=temperature)
        kind = LikelihoodChunkReader if LikelihoodChunkReader.fits(self.network, sampler) else ChunkReader
        return kind(self.network, sampler)

    def alternatives(self, ids: Sequence[int], **settings: Any) -> Alternatives:
        return outcome_of(draw_alternatives(self.network, ids, **settings))

    def generate(
        self, input_ids: Tensor, *, temperature: float, seed: int | None, **arguments: Any
    ) -> Tensor:
        if arguments.pop("draft", None) is not None or arguments.pop("draft_chunks", None) is not None:
            raise ValueError("a CALM already generates whole chunks; a draft is only for token-level models.")
        output = self.network.generate(
            input_ids, temperature=temperature, seed=seed, return_dict_in_generate=False, **arguments
        )
        assert isinstance(output, Tensor)
        return output


class _TokenModel(LanguageModel):
    """A causal language model of transformers."""

    kind = "autoregressive"
    chunk_size = 1
    has_likelihood = True

    @property
    def parts(self) -> dict[str, list[str]]:
        return {"backbone": [self.network.base_model_prefix]}

    @property
    def can_think(self) -> bool:
        return isinstance(self.network, LlamaForCausalLM)

    @property
    def can_distill(self) -> bool:
        # Loading turns a Llama of transformers into one of ours.
        return isinstance(self.network, transformers.LlamaForCausalLM)

    @property
    def input_rms(self) -> float:
        embedding: Any = self.network.get_input_embeddings()
        return math.sqrt(float(embedding.weight.detach().pow(2).mean()))

    def count_targets(self, labels: Tensor, position_ids: Tensor | None) -> Tensor:
        return (labels[:, 1:] != IGNORED_LABEL).sum()  # Nothing predicts the first token.

    def loss(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        network: Any = self.network
        output = network(input_ids=input_ids, labels=labels, position_ids=position_ids, use_cache=False)
        return output.loss, int(self.count_targets(labels, position_ids))

    def reader(self, temperature: float = 1.0, sampler: Sampler | None = None) -> TokensReader:
        self._check_readable()
        temperature = temperature if sampler is None else sampler.temperature
        if temperature == 0:
            raise ValueError("accuracy and collision can only be measured at temperatures above 0.")
        return TokensReader(self.network, temperature)

    def _check_readable(self) -> None:
        model = self.network
        if not model.can_generate():
            raise ValueError(f"a {type(model).__name__} is not a causal language model and cannot be scored.")
        config = model.config.get_text_config()
        if not hasattr(config, "num_attention_heads") or model._is_stateful or config.model_type in _ALIBI:
            raise ValueError(
                f"'{config.model_type}' models cannot be scored: scoring branches off a cached text, which "
                "needs a pure attention model that accepts position_ids."
            )

    def generate(
        self,
        input_ids: Tensor,
        *,
        temperature: float,
        seed: int | None,
        sampler: str | Sampler | None = None,
        num_draws: int | None = None,
        max_draws: int | None = None,
        num_thoughts: int | None = None,
        draft: CalmForCausalLM | None = None,
        draft_chunks: int | None = None,
        streamer: BaseStreamer | None = None,
        **arguments: Any,
    ) -> Tensor:
        thinks = self.thoughts(num_thoughts) is not None
        arguments |= {"num_thoughts": num_thoughts} if self.can_think else {}
        if draft is None and draft_chunks is not None:
            raise ValueError("draft_chunks requires a draft: give one as well.")
        if draft is not None and thinks:
            raise ValueError("a draft is not supported with thoughts: leave it out, or set num_thoughts=0.")
        if sampler not in (None, "exact"):
            raise ValueError(
                f"the {sampler} sampler is only for models without probabilities; leave out --sampler."
            )
        inverse_temperature(temperature)  # Raises if it is outside 0 to 1.
        num_texts(arguments.get("num_return_sequences"))
        if not arguments.get("min_p"):
            arguments.pop("min_p", None)
        is_greedy = decodes_greedily(temperature)
        # Otherwise the model's generation configuration could ask for other outputs than tokens.
        arguments |= {"do_sample": not is_greedy, "return_dict_in_generate": False}
        if is_greedy:
            arguments = {name: value for name, value in arguments.items() if name not in ("top_p", "min_p")}
        else:
            arguments |= {"temperature": temperature, "top_k": 0, "top_p": arguments.get("top_p", 1.0)}
        if draft is not None:
            drafting = Drafting(draft, draft_chunks or 1, streamer=streamer)
            return generate_drafted(self.network, drafting, input_ids, seed=seed, **arguments)
        if seed is not None:
            SEEDS.check("seed", seed := as_seed(seed))
        # transformers samples from the global generator, so restore its state afterwards.
        devices = [self.network.device] if self.network.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            network: Any = self.network
            try:
                return network.generate(input_ids, streamer=streamer, **arguments)
            except RuntimeError as error:
                if "probability tensor contains" not in str(error):  # torch.multinomial's message.
                    raise
                raise NotFiniteError(NO_DISTRIBUTION) from error


def language_model(network: PreTrainedModel) -> LanguageModel:
    """Wrap a network in the common interface."""
    return _CalmModel(network) if isinstance(network, CalmForCausalLM) else _TokenModel(network)
