"""Requests of the OpenAI API -> texts to generate. A request is checked before any work on it starts."""

from collections.abc import Sequence

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from calm.errors import InputError
from calm.models.context import check_room, longest_context, room_beside
from calm.models.thoughts import Thoughts, num_tokens_of
from calm.serving.engine import Engine
from calm.serving.errors import ApiError, at, quoted
from calm.serving.formats import ChatFormat, CompletionFormat
from calm.serving.metrics import Metrics
from calm.serving.protocol import ChatRequest, CompletionRequest
from calm.serving.readers import IsGone, Readers
from calm.serving.request_texts import RequestTexts
from calm.serving.settings import ServerSettings
from calm.serving.templates import render_elsewhere
from calm.serving.thoughts import check_effort, thoughts_of_request
from calm.serving.writers import HowToDraw, Writer
from calm.text.chat import encode_chat, end_of_turn, end_of_turn_id
from calm.text.decoding import decode_after
from calm.text.encoding import encode_documents
from calm.text.vocabulary import num_ids

_LONGEST_RENDERING = 1 << 22  # Maximum characters of a rendered chat,
_RENDERING = 4  # and this many times those of the context, which leaves room for the markup around messages.
_TOKENS_OF_A_COMPLETION = 16  # The API's default.


class Endpoint:
    """Checks requests, submits their texts to the engine, and returns them in the requested format.

    Args:
        engine: The engine that generates.
        writer: The model that it generates with.
        tokenizer: The model's tokenizer.
        settings: Settings and limits.
        metrics: Counts prompt tokens.
    """

    def __init__(
        self,
        engine: Engine,
        writer: Writer,
        tokenizer: PreTrainedTokenizerBase,
        settings: ServerSettings,
        metrics: Metrics,
    ) -> None:
        self.engine, self._writer, self.tokenizer = engine, writer, tokenizer
        self.config = writer.model.config
        self.readers = Readers(tokenizer, settings.max_waiting, settings.seconds)
        self._settings, self._metrics = settings, metrics
        # A tokenizer may have more tokens than its model: a padding token is added where there was none.
        self._num_ids = min(num_ids(tokenizer), self.config.get_text_config(decoder=True).vocab_size)
        self._most_characters = _most_characters(self.config, tokenizer)
        reader = self.readers.tokenizer
        if tokenizer.chat_template is not None:
            most = min(_LONGEST_RENDERING, _RENDERING * (self._most_characters or _LONGEST_RENDERING))
            render_elsewhere(reader, most, settings.template_seconds)
        # If the template ends assistant turns with plain words, the model may have learned to generate them.
        by_words = end_of_turn(reader).strip() if end_of_turn_id(reader) is None else ""
        self._ends_of_turn = [by_words] if by_words else []

    def check_name(self, name: str) -> None:
        """Raise ApiError for a model that is not served here."""
        if name != self._settings.name:
            raise ApiError(
                f"there is no model '{quoted(name)}' here; this server has '{self._settings.name}'.",
                404,
                param="model",
                code="model_not_found",
            )

    async def complete(self, request: CompletionRequest, is_gone: IsGone) -> CompletionFormat:
        """Submit the texts of a completion request, and return its answer.

        Args:
            request: The request.
            is_gone: Whether the client has left.

        Raises:
            ApiError: If the request cannot be served.
        """
        asked: Sequence[str | list[int]] = request.prompt
        budget = request.max_tokens or min(_TOKENS_OF_A_COMPLETION, self._settings.max_tokens)
        sampler, thoughts = self._check(request, len(asked), budget)
        places = [f"prompt[{index}]" for index in range(len(asked))] if len(asked) > 1 else ["prompt"]
        for prompt, place in zip(asked, places, strict=True):
            self._check_length(len(prompt), isinstance(prompt, str), place)

        def read() -> tuple[list[list[int]], list[str] | None]:
            prompts = [self.tokens_of(prompt, place) for prompt, place in zip(asked, places, strict=True)]
            self._check_size(request, prompts, budget, thoughts)
            if not request.echo:
                return prompts, None
            read_back = [
                one if isinstance(one, str) else decode_after(self.readers.tokenizer, [], one)
                for one in asked
            ]
            return prompts, [echo for echo in read_back for _ in range(request.n)]

        prompts, echoes = await self.readers.run(read, is_gone)
        texts = self._submit(request, prompts, budget, sampler, thoughts)
        return CompletionFormat(texts, request, self._settings.name, echoes)

    async def chat(self, request: ChatRequest, is_gone: IsGone) -> ChatFormat:
        """Submit the texts of a chat request, and return its answer.

        Args:
            request: The request.
            is_gone: Whether the client has left.

        Raises:
            ApiError: If the request cannot be served.
        """
        self._check_messages(request.messages)
        budget = request.max_completion_tokens or request.max_tokens
        sampler, thoughts = self._check(request, 1, budget or 1)

        def read() -> tuple[list[int], int]:
            prompt = self.tokens_of_chat(request.messages)
            room = self._settings.max_tokens
            if (left := self.room_after(prompt, thoughts)) is not None:
                room = min(max(1, left), room)
            self._check_size(request, [prompt], budget or room, thoughts)
            return prompt, budget or room

        prompt, most = await self.readers.run(read, is_gone)
        texts = self._submit(request, [prompt], most, sampler, thoughts, self._ends_of_turn)
        return ChatFormat(texts, request, self._settings.name)

    def _check(
        self, request: CompletionRequest | ChatRequest, num_prompts: int, budget: int
    ) -> tuple[HowToDraw, Thoughts | None]:
        """Check everything that can be checked before prompts are tokenized.

        Returns:
            How texts are sampled, and their thoughts.
        """
        self.check_name(request.model)
        request.check(self._settings.max_draws)
        thoughts = self.thoughts_for(request.num_thoughts)
        check_effort((request.model_extra or {}).get("reasoning_effort"), thoughts)
        most = self._settings.max_waiting
        if num_prompts * request.n > most:
            raise ApiError(
                f"the request asks for {num_prompts * request.n} texts, but at most {most} can be queued; "
                "ask for fewer at once.",
                param="prompt" if num_prompts > most else "n",
            )
        if budget > self._settings.max_tokens:
            name = (
                "max_completion_tokens" if getattr(request, "max_completion_tokens", None) else "max_tokens"
            )
            raise ApiError(f"'{name}' must be at most {self._settings.max_tokens}.", param=name)
        thought = num_tokens_of(thoughts, self.config)
        self._check_total(request, num_prompts * request.n * (thought + budget))
        return self._writer.sampler_for(request, self._settings), thoughts

    def thoughts_for(self, number: int | None) -> Thoughts | None:
        """The thoughts after a prompt; see `calm.serving.thoughts.thoughts_of_request`."""
        return thoughts_of_request(self.config, number, self._settings.max_thoughts)

    def _check_length(self, length: int, is_text: bool, place: str) -> None:
        """Raise ApiError for a prompt that can never fit in the context, before it is tokenized."""
        most = self._most_characters if is_text else longest_context(self.config)
        if most is not None and length > most:
            raise ApiError(
                f"{place}: {length} {'characters' if is_text else 'tokens'} cannot fit in the context of "
                f"{longest_context(self.config)} tokens; shorten it.",
                param=place,
                code="context_length_exceeded",
            )

    def _check_size(
        self,
        request: CompletionRequest | ChatRequest,
        prompts: Sequence[list[int]],
        budget: int,
        thoughts: Thoughts | None,
    ) -> None:
        """Raise ApiError if a text does not fit in the context, or all together have too many tokens."""
        thought = num_tokens_of(thoughts, self.config)
        try:
            check_room(self.config, max(map(len, prompts)), budget, thought)
        except ValueError as error:
            raise ApiError(str(error), param=request.prompt_name, code="context_length_exceeded") from error
        beside = len(prompts) * (thought + budget)
        self._check_total(request, request.n * (sum(map(len, prompts)) + beside))

    def _check_total(self, request: CompletionRequest | ChatRequest, num_tokens: int) -> None:
        most = self._settings.max_request_tokens
        if num_tokens > most:
            raise ApiError(
                f"the texts of the request total up to {num_tokens} tokens, but at most {most} are "
                "allowed; ask for fewer or shorter texts.",
                param="n" if request.n > 1 else request.prompt_name,
            )

    def _submit(
        self,
        request: CompletionRequest | ChatRequest,
        prompts: Sequence[list[int]],
        budget: int,
        sampler: HowToDraw,
        thoughts: Thoughts | None,
        more_stops: Sequence[str] = (),
    ) -> RequestTexts:
        texts = RequestTexts(
            engine=self.engine,
            tokenizer=self.tokenizer,
            prompts=prompts,
            copies=request.n,
            sampler=sampler,
            budget=budget,
            seed=request.chosen_seed(),
            stops=[*request.stop, *more_stops],
            seconds=self._settings.seconds,
            readers=self.readers,
            with_chunks=request.return_chunks,
            thoughts=thoughts,
        )
        texts.submit()
        self._metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return texts

    def tokens_of(self, prompt: str | list[int], place: str = "prompt") -> list[int]:
        """Token ids of a prompt. Called in the readers' thread.

        Args:
            prompt: A text or token ids.
            place: Its place in the request, for messages.

        Raises:
            ApiError: If there are none or too many, or some are not in the model's vocabulary.
        """
        self._check_length(len(prompt), isinstance(prompt, str), place)
        ids = encode_documents(self.readers.tokenizer, [prompt])[0] if isinstance(prompt, str) else prompt
        if not ids:
            why = ", and this model's tokenizer has no BOS token" if prompt == "" else ""
            raise at(place, f"a prompt is empty{why}; give a text.")
        if any(not 0 <= token < self._num_ids for token in ids):
            raise ApiError(f"token ids in '{place}' must be between 0 and {self._num_ids - 1}.", param=place)
        return ids

    def tokens_of_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat that the assistant is to continue. Called in the readers' thread.

        Args:
            messages: The messages.

        Raises:
            ApiError: If the model has no chat template, it rejects the messages, or they are too long.
        """
        self._check_messages(messages)
        try:
            return encode_chat(self.readers.tokenizer, messages)
        except InputError as error:
            raise ApiError(str(error), param="messages") from error

    def _check_messages(self, messages: list[dict[str, str]]) -> None:
        """Raise ApiError if the model has no chat template, or the chat can never fit in the context."""
        if self.tokenizer.chat_template is None:
            raise ApiError(
                "this model has no chat template, so it is not a chat model; use /v1/completions.",
                param="messages",
            )
        self._check_length(sum(len(message["content"]) for message in messages), True, "messages")

    def room_after(self, prompt: Sequence[int], thoughts: Thoughts | None) -> int | None:
        """New tokens that fit after a prompt and its thoughts; None if there is no limit."""
        config = self.config
        return room_beside(config, len(prompt) + num_tokens_of(thoughts, config))


def _most_characters(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Characters of the longest text that can fit in the context; None if there is no limit."""
    longest = longest_context(config)
    return None if longest is None else longest * max(map(len, tokenizer.get_vocab()))
