"""Requests of the OpenAI API -> texts to generate. A request is checked before any work on it starts."""

from collections.abc import Sequence

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from calm.errors import InputError
from calm.models.context import check_room, longest_context, remaining_context
from calm.models.thoughts import Thoughts, num_tokens_of
from calm.serving.engine import Engine
from calm.serving.errors import ApiError, error_at, quoted
from calm.serving.formats import ChatFormat, CompletionFormat
from calm.serving.metrics import Metrics
from calm.serving.protocol import ChatRequest, CompletionRequest
from calm.serving.readers import IsGone, Readers
from calm.serving.request_texts import RequestTexts
from calm.serving.settings import ServerSettings
from calm.serving.templates import isolate_chat_template
from calm.serving.thoughts import check_effort, thoughts_of_request
from calm.serving.writers import AnySampler, Writer
from calm.text.chat import encode_chat, end_of_turn, end_of_turn_id
from calm.text.decoding import decode_after
from calm.text.encoding import encode_documents
from calm.text.vocabulary import num_ids

_MAX_RENDERED_CHARACTERS = 1 << 22  # Of a chat.
_MARKUP_FACTOR = 4  # A rendered chat may be so many times as long as the context: room for markup.
_DEFAULT_MAX_TOKENS = 16  # Of a completion, as the API has it.


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
        self._max_characters = _max_characters(self.config, tokenizer)
        readers_tokenizer = self.readers.tokenizer
        if tokenizer.chat_template is not None:
            max_rendered = _MAX_RENDERED_CHARACTERS
            if self._max_characters is not None:
                max_rendered = min(max_rendered, _MARKUP_FACTOR * self._max_characters)
            isolate_chat_template(readers_tokenizer, max_rendered, settings.template_seconds)
        # If the template ends assistant turns with plain words, the model may have learned to generate them.
        has_end_token = end_of_turn_id(readers_tokenizer) is not None
        end = "" if has_end_token else end_of_turn(readers_tokenizer).strip()
        self._turn_stops = [end] if end else []

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
        prompts: Sequence[str | list[int]] = request.prompt
        budget = request.max_tokens or min(_DEFAULT_MAX_TOKENS, self._settings.max_tokens)
        sampler, thoughts = self._check(request, len(prompts), budget)
        params = [f"prompt[{index}]" for index in range(len(prompts))] if len(prompts) > 1 else ["prompt"]
        for prompt, param in zip(prompts, params, strict=True):
            self._check_length(len(prompt), isinstance(prompt, str), param)

        def read() -> tuple[list[list[int]], list[str] | None]:
            ids = [self.tokenize(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
            self._check_size(request, ids, budget, thoughts)
            if not request.echo:
                return ids, None
            echoes = [
                prompt if isinstance(prompt, str) else decode_after(self.readers.tokenizer, [], prompt)
                for prompt in prompts
            ]
            return ids, [echo for echo in echoes for _ in range(request.n)]

        ids, echoes = await self.readers.run(read, is_gone)
        texts = self._submit(request, ids, budget, sampler, thoughts)
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
            ids = self.tokenize_chat(request.messages)
            max_tokens = self._settings.max_tokens
            if (room := self.room_after(ids, thoughts)) is not None:
                max_tokens = min(max_tokens, max(1, room))
            self._check_size(request, [ids], budget or max_tokens, thoughts)
            return ids, budget or max_tokens

        ids, budget_or_room = await self.readers.run(read, is_gone)
        texts = self._submit(request, [ids], budget_or_room, sampler, thoughts, self._turn_stops)
        return ChatFormat(texts, request, self._settings.name)

    def _check(
        self, request: CompletionRequest | ChatRequest, num_prompts: int, budget: int
    ) -> tuple[AnySampler, Thoughts | None]:
        """Check everything that can be checked before prompts are tokenized.

        Returns:
            How texts are sampled, and their thoughts.
        """
        self.check_name(request.model)
        request.check(self._settings.max_draws)
        thoughts = self.thoughts_for(request.num_thoughts)
        check_effort((request.model_extra or {}).get("reasoning_effort"), thoughts)
        num_texts, max_texts = num_prompts * request.n, self._settings.max_waiting
        if num_texts > max_texts:
            raise ApiError(
                f"the request asks for {num_texts} texts, but at most {max_texts} can be queued; "
                "ask for fewer at once.",
                param="prompt" if num_prompts > max_texts else "n",
            )
        if budget > self._settings.max_tokens:
            name = (
                "max_completion_tokens" if getattr(request, "max_completion_tokens", None) else "max_tokens"
            )
            raise ApiError(f"'{name}' must be at most {self._settings.max_tokens}.", param=name)
        self._check_total(request, num_texts * (num_tokens_of(thoughts, self.config) + budget))
        return self._writer.sampler_for(request, self._settings), thoughts

    def thoughts_for(self, number: int | None) -> Thoughts | None:
        """The thoughts after a prompt; see `calm.serving.thoughts.thoughts_of_request`."""
        return thoughts_of_request(self.config, number, self._settings.max_thoughts)

    def _check_length(self, length: int, is_text: bool, param: str) -> None:
        """Raise ApiError for a prompt that can never fit in the context, before it is tokenized."""
        limit = self._max_characters if is_text else longest_context(self.config)
        if limit is not None and length > limit:
            raise ApiError(
                f"{param}: {length} {'characters' if is_text else 'tokens'} cannot fit in the context of "
                f"{longest_context(self.config)} tokens; shorten it.",
                param=param,
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
        num_thought_tokens = num_tokens_of(thoughts, self.config)
        try:
            check_room(self.config, max(map(len, prompts)), budget, num_thought_tokens)
        except ValueError as error:
            raise ApiError(str(error), param=request.prompt_name, code="context_length_exceeded") from error
        num_tokens = sum(len(prompt) + num_thought_tokens + budget for prompt in prompts)
        self._check_total(request, request.n * num_tokens)

    def _check_total(self, request: CompletionRequest | ChatRequest, num_tokens: int) -> None:
        limit = self._settings.max_request_tokens
        if num_tokens > limit:
            raise ApiError(
                f"the texts of the request total up to {num_tokens} tokens, but at most {limit} are "
                "allowed; ask for fewer or shorter texts.",
                param="n" if request.n > 1 else request.prompt_name,
            )

    def _submit(
        self,
        request: CompletionRequest | ChatRequest,
        prompts: Sequence[list[int]],
        budget: int,
        sampler: AnySampler,
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

    def tokenize(self, prompt: str | list[int], param: str = "prompt") -> list[int]:
        """Token ids of a prompt. Called in the readers' thread.

        Args:
            prompt: A text or token ids.
            param: Where it is in the request, for messages.

        Raises:
            ApiError: If the prompt is empty or too long, or an id is not in the model's vocabulary.
        """
        self._check_length(len(prompt), isinstance(prompt, str), param)
        ids = encode_documents(self.readers.tokenizer, [prompt])[0] if isinstance(prompt, str) else prompt
        if not ids:
            reason = ", and this model's tokenizer has no BOS token" if prompt == "" else ""
            raise error_at(param, f"a prompt is empty{reason}; give a text.")
        if any(not 0 <= token < self._num_ids for token in ids):
            raise ApiError(f"token ids in '{param}' must be between 0 and {self._num_ids - 1}.", param=param)
        return ids

    def tokenize_chat(self, messages: list[dict[str, str]]) -> list[int]:
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
        return remaining_context(self.config, len(prompt) + num_tokens_of(thoughts, self.config))


def _max_characters(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Characters of the longest text that can fit in the context; None if there is no limit."""
    context = longest_context(config)
    return None if context is None else context * max(map(len, tokenizer.get_vocab()))
