"""A conversation with a model, turn by turn."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.core.seeds import as_seed
from calm.errors import InputError
from calm.models.context import remaining_context
from calm.models.generation.alternatives import Alternatives, ends_of, up_to_end
from calm.models.language_model import language_model
from calm.models.thoughts import num_tokens_of
from calm.progress import track
from calm.text.chat import ASSISTANT, encode_chat
from calm.text.decoding import spell_tokens
from calm.texts import TextListener, continue_tokens

_MIN_ANSWER_ROOM = 64  # Old turns are dropped until an answer has room for this many tokens.
Message = dict[str, str]


class Conversation:
    """The turns so far, and a model that answers.

    Args:
        model: A CALM, or another causal language model.
        tokenizer: Its tokenizer, with a chat template.
        system: System message; "" for none.
        seed: Makes the answers reproducible: each turn derives its own seed from it.
        max_new_tokens: Maximum tokens of an answer; fewer if the context ends first.
        num_thoughts: Thoughts before each answer; None for as many as the model was trained with.

    Raises:
        InputError: If the model has no chat template, the template takes no system message, or the model
            cannot take that many thoughts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str = "",
        seed: int | None = None,
        max_new_tokens: int = 512,
        num_thoughts: int | None = None,
    ) -> None:
        if tokenizer.chat_template is None:
            raise InputError(
                "this model has no chat template, so it is not a chat model; fine-tune it on "
                "conversations, or use it to continue texts (calm generate)."
            )
        self._model, self._tokenizer = model, tokenizer
        self._max_new_tokens, self._num_thoughts = max_new_tokens, num_thoughts
        try:
            self._seed = None if seed is None else as_seed(seed)
            self._thoughts = language_model(model).thoughts(num_thoughts)
        except ValueError as error:
            raise InputError(str(error)) from error
        self._thought_tokens = num_tokens_of(self._thoughts, model.config)
        self.messages: list[Message] = []
        self.last: tuple[list[int], list[int]] | None = None
        """Token ids of the last prompt and of its answer; None if there is no answer yet."""
        self.set_system(system)

    def set_system(self, system: str) -> None:
        """Start over with another system message.

        Raises:
            InputError: If the template takes none.
        """
        messages = [{"role": "system", "content": system}] if system else []
        encode_chat(self._tokenizer, [*messages, {"role": "user", "content": "?"}])
        self.messages, self.last = messages, None

    def reset(self) -> None:
        """Drop all turns but the system message."""
        self.messages, self.last = [turn for turn in self.messages if turn["role"] == "system"], None

    def answer(self, text: str, show: Callable[[str], None], **sampling: Any) -> int:
        """Have the model answer. If it is interrupted, the answer so far is kept.

        Args:
            text: The user's message.
            show: Called with each part of the answer as it is generated.
            **sampling: Further arguments of `calm.texts.continue_tokens`, such as `temperature`.

        Returns:
            How many old messages were dropped to make room.

        Raises:
            InputError: If the text does not fit in the context, or an argument is out of range.
        """
        turns = [*self.messages, {"role": "user", "content": text}]
        turns, prompt = self._drop_old(turns)
        num_dropped = len(self.messages) + 1 - len(turns)
        listener = TextListener(self._tokenizer, show)
        seed = None if self._seed is None else (self._seed + len(turns)) % 2**31
        is_complete = False
        try:
            continue_tokens(
                self._model,
                self._tokenizer,
                [prompt],
                max_new_tokens=self._answer_limit(prompt),
                seed=seed,
                streamer=listener,
                num_thoughts=self._num_thoughts,
                **sampling,
            )
            is_complete = True
        finally:
            if is_complete or listener.tokens:
                self.messages = [*turns, {"role": ASSISTANT, "content": listener.text.strip()}]
                self.last = (prompt, listener.tokens)
        return num_dropped

    def alternatives(
        self, temperatures: Sequence[float], num_draws: int, max_candidates: int
    ) -> list[tuple[list[int], Alternatives]]:
        """The chunks of the last answer, and what each could have been.

        If the token limit cut off the last chunk, what is left of it is not among the candidates: how that
        chunk was drawn is unknown.

        Args:
            temperatures: See `calm.models.generation.alternatives.draw_alternatives`.
            num_draws: Draws per chunk.
            max_candidates: Maximum number of candidates per chunk.

        Raises:
            InputError: If there is no answer yet, or the model generates token by token.
        """
        if self.last is None:
            raise InputError("there is no answer yet.")
        view, (prompt, answer) = language_model(self._model), self.last
        size, ends, chunks = view.chunk_size, ends_of(self._model.config), []
        for start in track(range(0, len(answer), size), "drawing", "chunk"):
            chunk = list(up_to_end(answer[start : start + size], ends))
            alternatives = view.alternatives(
                prompt,
                thoughts=self._thoughts,
                written=answer[:start],
                num_draws=num_draws,
                temperatures=temperatures,
                max_candidates=max_candidates,
                seed=0,
                chunk=chunk if len(chunk) == size or chunk[-1] in ends else (),
            )
            chunks.append((chunk, alternatives))
        return chunks

    def spell(self, tokens: Sequence[int]) -> str:
        """Tokens as text, with control tokens by name."""
        return "".join(spell_tokens(self._tokenizer, tokens))

    def _drop_old(self, turns: list[Message]) -> tuple[list[Message], list[int]]:
        """As many of the latest turns as leave room for an answer, and their token ids."""
        system = [turn for turn in turns if turn["role"] == "system"]
        recent = turns[len(system) :]
        while True:
            prompt = encode_chat(self._tokenizer, [*system, *recent])
            room = self._room_after(prompt)
            is_last = len(recent) == 1
            if room is None or room >= (1 if is_last else min(_MIN_ANSWER_ROOM, self._max_new_tokens)):
                return [*system, *recent], prompt
            if is_last:
                thoughts = f" and {self._thought_tokens} for thoughts" if self._thought_tokens else ""
                raise InputError(
                    f"the message is too long: {len(prompt)} tokens{thoughts} leave no room for an answer."
                )
            recent = recent[2:]  # Without the oldest question and its answer.

    def _answer_limit(self, prompt: Sequence[int]) -> int:
        """Maximum tokens of the answer to a prompt."""
        room = self._room_after(prompt)
        return self._max_new_tokens if room is None else min(self._max_new_tokens, room)

    def _room_after(self, prompt: Sequence[int]) -> int | None:
        """Tokens that fit after a prompt and its thoughts; None if there is no limit."""
        return remaining_context(self._model.config, len(prompt) + self._thought_tokens)
