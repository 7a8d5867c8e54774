"""A model class for EleutherAI's evaluation harness (lm-eval), with which a CALM runs generation tasks.

    python -m calm.harness run --model calm --model_args pretrained=runs/demo/model --tasks my_task

or in Python, `lm_eval.simple_evaluate(model=HarnessModel("runs/demo/model"), tasks=[...])`.

Tasks that ask for log-likelihoods get them if the head has them (`sequential`, `decoder`, `parallel`); for
other heads they are refused. As an experiment, multiple choice can be answered by sampling instead
(`choices`): the scores are not likelihoods, and not comparable with those of other models.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from calm.core.chunks import split_into_chunks
from calm.core.random import generators_of_rows, seed_of
from calm.core.seeds import as_seed
from calm.errors import InputError
from calm.extras import not_installed
from calm.models.calm import CalmForCausalLM
from calm.models.generation.prompts import Prompt
from calm.models.heads import LatentHead, Likelihood
from calm.models.loading import load_language_model_and_tokenizer
from calm.models.thoughts import num_tokens_of, thoughts_of
from calm.text.chat import render
from calm.text.decoding import decode_after
from calm.text.encoding import encode_documents, encode_rendering, encode_words, marks_of
from calm.texts import continue_tokens, crop_prompts

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    missing = not_installed("the harness", "lm-eval")
    if __name__ != "__main__":
        raise missing from error
    print(f"calm: error: {missing}", file=sys.stderr)
    sys.exit(2)

Choices = Literal["refuse", "agreement", "energy"]
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "min_p"}


@register_model("calm")
class HarnessModel(LM):
    """A CALM in the harness; if it was trained to think, it does so after each context.

    Args:
        pretrained: Folder of a model or of adapters, or hub name.
        temperature: Used if a task asks for sampling without a temperature. Tasks that ask for greedy
            decoding get temperature 0: the most frequent chunk of a pool, or greedy decoding if the head can.
        num_draws: Size of that pool, and draws per chunk for `choices`.
        batch_size: Texts generated at once.
        max_gen_toks: Maximum new tokens if a task sets no limit.
        seed: Seed of all draws.
        choices: How to answer tasks that ask for log-likelihoods: "refuse" if the model has none; or, as an
            experiment with any model, "agreement": the share of drawn tokens that match the continuation; or
            "energy": minus the energy score of the drawn latents against those of the continuation (paper,
            section 3.2).
    """

    def __init__(
        self,
        pretrained: str,
        temperature: float = 0.5,
        num_draws: int = 64,
        batch_size: int | str = 8,
        max_gen_toks: int = 128,
        seed: int = 1234,
        choices: Choices = "refuse",
        **_: Any,  # What the harness passes to every model: device, max_batch_size.
    ) -> None:
        super().__init__()
        if choices not in ("refuse", "agreement", "energy"):
            raise InputError(f"choices must be refuse, agreement or energy, got '{choices}'.")
        model, self._tokenizer = load_language_model_and_tokenizer(pretrained)
        if not isinstance(model, CalmForCausalLM):
            raise InputError(
                f"'{pretrained}' is not a CALM; use the harness's own model class (hf) for other models."
            )
        self._model, self._choices, self._seed = model, choices, as_seed(seed)
        self._temperature, self._num_draws = temperature, num_draws
        self._batch_size = int(batch_size) if str(batch_size).isdigit() else 8
        self._max_gen_toks, self._thoughts = max_gen_toks, thoughts_of(model.config)
        self._is_chat = False  # Whether contexts come from the chat template.

    @property
    def tokenizer_name(self) -> str:
        """Name for the harness's request cache."""
        return str(self._tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation as prompt text, in which words that look like control tokens are marked."""
        if self._tokenizer.chat_template is None:
            raise InputError("the model has no chat template; leave out --apply_chat_template.")
        self._is_chat = True
        return render(self._tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate the text after each context, up to its first stop string.

        Raises:
            InputError: If a task asks for something that a CALM cannot do.
        """
        texts: list[str] = [""] * len(requests)
        for indices, repeat in self._batches(requests):
            settings = _generation_settings(requests[indices[0]].args[1], self._temperature, self._num_draws)
            stops, budget = settings.pop("until"), settings.pop("max_gen_toks") or self._max_gen_toks
            prompts = self._cropped([self._encode(requests[i].args[0]) for i in indices], budget)
            seed = seed_of(self._seed, repeat) if repeat else self._seed
            tokens = continue_tokens(
                self._model,
                self._tokenizer,
                prompts,
                max_new_tokens=budget,
                seed=seed,
                stop_strings=_outer_stops(stops),
                **settings,
            )
            for i, prompt, new in zip(indices, prompts, tokens.tolist(), strict=True):
                text = decode_after(self._tokenizer, prompt, new)
                ends = [end for stop in stops if (end := text.find(stop)) >= 0]
                texts[i] = text[: min(ends, default=None)]
        return texts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether each of its tokens is the likeliest.

        Unless `choices` is "refuse", these are scores by sampling, for multiple choice.

        Raises:
            InputError: If `choices` is "refuse" and the model has no likelihood.
        """
        if self._choices == "refuse":
            if isinstance(head := self._model.head, Likelihood):
                return [self._log_likelihood(head, *request.args) for request in requests]
            raise InputError(
                "this task asks for log-likelihoods, which this CALM does not have. Run tasks that generate "
                "text (output_type: generate_until), or, as an experiment, set choices=agreement or "
                "choices=energy in the model arguments."
            )
        return [(self._score_draws(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refused: a CALM gives no probability to the first chunk of a document.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "this task asks for perplexities of whole documents, but a CALM predicts nothing before its "
            "second chunk; score it with `calm evaluate` instead."
        )

    def _batches(self, requests: list[Instance]) -> Iterator[tuple[list[int], int]]:
        """Indices of requests with equal settings, in batches, and how often their requests came before.

        A task that wants several texts for a context repeats the request.
        """
        seen: Counter[str] = Counter()
        groups: dict[tuple[str, int], list[int]] = {}
        for index, request in enumerate(requests):
            repeat = seen[repr(request.args)]
            seen[repr(request.args)] += 1
            groups.setdefault((repr(request.args[1]), repeat), []).append(index)
        for (_, repeat), indices in groups.items():
            for start in range(0, len(indices), self._batch_size):
                yield indices[start : start + self._batch_size], repeat

    def _cropped(self, contexts: list[list[int]], budget: int) -> list[list[int]]:
        """Crop contexts on the left, as is usual there, to leave room for thoughts and `budget` tokens."""
        if not all(contexts):
            raise InputError("a context is empty, and the tokenizer has no BOS token.")
        return crop_prompts(self._model, contexts, budget + num_tokens_of(self._thoughts, self._model.config))

    def _encode(self, context: str, continuation: str = "") -> list[int]:
        # A chat template writes control tokens itself, BOS included.
        if self._is_chat:
            return encode_rendering(self._tokenizer, context + marks_of(self._tokenizer).mark(continuation))
        return encode_documents(self._tokenizer, [context + continuation])[0]

    def _read(self, context: str, continuation: str) -> tuple[list[int], int, Tensor, Tensor]:
        """Read a continuation, which starts a new chunk, after a context and its thoughts.

        Both are tokenized as one text; trailing spaces of the context move to the continuation, where
        tokenizers expect them. The harness's own models do the same.

        Returns:
            Tokens of the context; number of tokens of the continuation; the states that its chunks are drawn
            from (P, D); its chunks, with padding at the end (P, K).
        """
        size = self._model.config.chunk_size
        stripped = context.rstrip()
        ids, prompt = self._encode(context, continuation), self._encode(stripped)
        if ids[: len(prompt)] == prompt:
            ids = ids[len(prompt) :]
        else:  # A token spans the boundary.
            ids = encode_words(self._tokenizer, [context[len(stripped) :] + continuation])[0]
        if not ids:
            raise InputError("a continuation is empty, so the task cannot be scored by its choices.")
        [prompt] = self._cropped([prompt], len(ids))
        padded = ids + [self._model.config.pad_token_id or 0] * (-len(ids) % size)
        text = Prompt.of(self._model, prompt).followed_by(self._thoughts, size).with_chunks(padded, size)
        first = text.ids_BT.shape[1] // size - len(padded) // size
        states_PD = text.read(self._model)[0, first - 1 : -1]
        return prompt, len(ids), states_PD, split_into_chunks(text.ids_BT, size)[0, first:]

    @torch.no_grad()
    def _log_likelihood(self, head: Likelihood, context: str, continuation: str) -> tuple[float, bool]:
        _, num_tokens, states_PD, chunks_PK = self._read(context, continuation)
        losses_T = head.token_losses(states_PD, chunks_PK).flatten()[:num_tokens]
        probabilities = head.token_probabilities(states_PD, chunks_PK)
        is_likeliest_PK = probabilities.of_token_PK == probabilities.highest_PK
        return -float(losses_T.double().sum()), bool(is_likeliest_PK.flatten()[:num_tokens].all())

    @torch.no_grad()
    def _score_draws(self, context: str, continuation: str) -> float:
        """How well draws agree with a continuation, each chunk drawn after the true text before it."""
        prompt, num_tokens, states_PD, chunks_PK = self._read(context, continuation)
        rows = [[*prompt, position] for position in range(len(states_PD))]  # A random stream for each.
        generators = generators_of_rows(self._seed, rows, self._model.device)
        if self._choices == "energy":
            latents_NPZ = self._latents(states_PD, generators)
            return -float(_energy_score(latents_NPZ, self._model.autoencoder.encode(chunks_PK).mean))
        drawn_NPK = self._model.draw_chunks(states_PD, self._num_draws, generators)
        is_equal_NT = (drawn_NPK == chunks_PK).flatten(1)[:, :num_tokens]
        return float(is_equal_NT.double().mean())

    def _latents(self, states_PD: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Draws of the next latents, (N, P, Z); if the head draws tokens, their encodings."""
        if isinstance(head := self._model.head, LatentHead):
            return head.sample_latents(states_PD, self._num_draws, generators)
        drawn_NPK = self._model.draw_chunks(states_PD, self._num_draws, generators)
        return self._model.autoencoder.encode(drawn_NPK).mean


def _energy_score(latents_NPZ: Tensor, target_PZ: Tensor) -> Tensor:
    """2 E|z - y| - E|z - z'| over draws z, averaged over chunks; smaller is better."""
    num_draws = len(latents_NPZ)
    to_target = (latents_NPZ - target_PZ).norm(dim=-1).mean(0)
    latents_PNZ = latents_NPZ.transpose(0, 1)
    between_draws = torch.cdist(latents_PNZ, latents_PNZ).sum((-1, -2)) / (num_draws * (num_draws - 1))
    return (2 * to_target - between_draws).mean()


def _generation_settings(requested: dict[str, Any], temperature: float, num_draws: int) -> dict[str, Any]:
    """Arguments of `continue_tokens` for the settings of a task, plus `until` and `max_gen_toks`."""
    unknown = [name for name in requested if name not in _KNOWN]
    if unknown:
        raise InputError(f"a CALM does not support '{unknown[0]}' from this task's generation_kwargs.")
    until = requested.get("until") or []
    settings: dict[str, Any] = {
        "until": [until] if isinstance(until, str) else list(until),
        "max_gen_toks": requested.get("max_gen_toks"),
    }
    # The harness's tasks mean greedy decoding unless they set do_sample.
    if not requested.get("do_sample") or requested.get("temperature") == 0:
        return settings | {"temperature": 0.0, "num_draws": num_draws}
    cutoffs = {name: requested[name] for name in ("top_p", "min_p") if requested.get(name) is not None}
    return settings | {"temperature": requested.get("temperature", temperature), **cutoffs}


def _outer_stops(stops: list[str]) -> list[str]:
    """The stop strings at which generation may end: those that are not inside another.

    One that is ("Q" in " Q:") would end it before the other, which begins earlier, is complete.
    """
    return [stop for stop in stops if stop and not any(stop in other[1:-1] for other in stops)]


def main() -> None:
    """Run the harness's own command line, with `--model calm` added."""
    from lm_eval.__main__ import cli_evaluate  # noqa: PLC0415

    try:
        cli_evaluate()
    except InputError as error:
        print(f"calm: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
