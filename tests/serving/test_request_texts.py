"""Texts of a request do not depend on how many chunks arrive before they are consumed."""

import asyncio

import pytest
from other_tokenizers import KINDS

from calm.models.generation.rows import Written
from calm.models.generation.sampler_registry import sampler_from
from calm.serving.errors import ApiError
from calm.serving.readers import Readers
from calm.serving.request_texts import RequestTexts
from calm.text.decoding import decode_after

TOKENIZER = KINDS["byte-level"]()
WORDS = TOKENIZER("Once upon a time there was a fox. It had no name, and it was not sad.")["input_ids"]


class ScriptedEngine:
    """An engine that hands chunks of 4 tokens to each text in turn, some steps at a time.

    Args:
        at_once: Steps before it yields to the consumer; None for all.
        fault: Error that text 1 gets shortly before its end, even if it was cancelled.
    """

    def __init__(self, at_once, fault=None):
        self.at_once, self.fault, self.cancelled = at_once, fault, []

    def submit(self, jobs):
        self.task = asyncio.get_running_loop().create_task(self._write(jobs))

    def cancel(self, jobs):
        self.cancelled += jobs

    async def _write(self, jobs):
        chunks = [WORDS[first : first + 4] for first in range(0, len(WORDS), 4)]
        for step, chunk in enumerate(chunks):
            end = "eos" if step == len(chunks) - 1 else None
            for number, job in enumerate(jobs):
                if self.fault is not None and number == 1 and step == len(chunks) - 2:
                    job.deliver(self.fault)
                elif job not in self.cancelled:
                    job.deliver(Written(None, chunk, end, 1, 1.0, False))
            if self.at_once is not None and step % self.at_once == 0:
                await asyncio.sleep(0.01)


def collect_parts(engine, **settings):
    """The parts of two texts, and their usage."""

    async def collect():
        defaults = {
            "engine": engine,
            "tokenizer": TOKENIZER,
            "prompts": [[5], [6]],
            "copies": 1,
            "sampler": sampler_from(),
            "budget": 1000,
            "seed": 1,
            "stops": (),
            "seconds": 20,
            "readers": Readers(TOKENIZER, 4, 20),
        }
        incremental = settings.pop("incremental", True)
        texts = RequestTexts(**defaults | settings)
        texts.submit()
        return [part async for part in texts.parts(incremental=incremental)], texts.usage

    return asyncio.run(collect())


def text_of(parts, index):
    return "".join(part.text for part in parts if part.index == index)


@pytest.mark.parametrize("incremental", [True, False])
@pytest.mark.parametrize("at_once", [1, 3, None])
@pytest.mark.parametrize("stops", [(), (" fox",), ("name, and",)])
def test_texts_do_not_depend_on_when_chunks_arrive(stops, at_once, incremental):
    parts, usage = collect_parts(ScriptedEngine(at_once), stops=stops, incremental=incremental)
    full_text = decode_after(TOKENIZER, [5], WORDS)
    expected = full_text.split(stops[0])[0] if stops else full_text
    assert [text_of(parts, index) for index in (0, 1)] == [expected] * 2
    assert [part.finish_reason for part in parts if part.finish_reason] == ["stop", "stop"]
    # The chunk in which the text stops is counted, and none after it.
    num_counted = next(
        end
        for end in (*range(4, len(WORDS), 4), len(WORDS))
        if not stops or stops[0] in decode_after(TOKENIZER, [5], WORDS[:end])
        if stops or end == len(WORDS)
    )
    assert usage["completion_tokens"] == 2 * num_counted


def test_requested_chunks_come_one_per_part():
    parts, _ = collect_parts(ScriptedEngine(None), with_chunks=True)
    assert all(len(part.chunks) == 1 for part in parts) and len(parts) == 2 * -(-len(WORDS) // 4)


def test_other_chunks_are_merged_into_one_part():
    parts, _ = collect_parts(ScriptedEngine(None))
    assert len(parts) == 2


def test_error_of_a_stopped_text_is_ignored():
    fault = ValueError("not finite")
    parts, _ = collect_parts(ScriptedEngine(None, fault), stops=(" a time",))
    assert [part.finish_reason for part in parts if part.finish_reason] == ["stop", "stop"]
    with pytest.raises(ApiError, match="the generation of the text failed"):
        collect_parts(ScriptedEngine(None, fault))
