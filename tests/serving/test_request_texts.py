"""What becomes of chunks that arrive faster than they are taken: nothing depends on how many come at once."""

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


class Scripted:
    """An engine that hands chunks of 4 tokens to each text in turn, some steps at a time.

    Args:
        at_once: Steps before it rests; None for all.
        fault: What to tell text 1 of in the end, even if it was given up.
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


def texts_of(engine, **settings):
    """Parts of two texts, and the usage, after all has been taken."""

    async def take():
        settings_of_all = {
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
        texts = RequestTexts(**settings_of_all | settings)
        texts.submit()
        return [part async for part in texts.parts(incremental=incremental)], texts.usage

    return asyncio.run(take())


def said(parts, index):
    return "".join(part.text for part in parts if part.index == index)


@pytest.mark.parametrize("incremental", [True, False])
@pytest.mark.parametrize("at_once", [1, 3, None])
@pytest.mark.parametrize("stops", [(), (" fox",), ("name, and",)])
def test_the_same_however_it_comes(stops, at_once, incremental):
    parts, usage = texts_of(Scripted(at_once), stops=stops, incremental=incremental)
    whole = decode_after(TOKENIZER, [5], WORDS)
    expected = whole.split(stops[0])[0] if stops else whole
    assert [said(parts, index) for index in (0, 1)] == [expected] * 2
    assert [part.finish_reason for part in parts if part.finish_reason] == ["stop", "stop"]
    # The chunk in which the text stops counts, and none behind it.
    until = next(
        end
        for end in (*range(4, len(WORDS), 4), len(WORDS))
        if not stops or stops[0] in decode_after(TOKENIZER, [5], WORDS[:end])
        if stops or end == len(WORDS)
    )
    assert usage["completion_tokens"] == 2 * until


def test_chunks_that_are_shown_come_one_by_one():
    parts, _ = texts_of(Scripted(None), with_chunks=True)
    assert all(len(part.chunks) == 1 for part in parts) and len(parts) == 2 * -(-len(WORDS) // 4)


def test_those_that_are_not_come_together():
    parts, _ = texts_of(Scripted(None))
    assert len(parts) == 2


def test_an_error_of_a_text_that_has_stopped_is_no_matter():
    fault = ValueError("not finite")
    parts, _ = texts_of(Scripted(None, fault), stops=(" a time",))
    assert [part.finish_reason for part in parts if part.finish_reason] == ["stop", "stop"]
    with pytest.raises(ApiError, match="the generation of the text failed"):
        texts_of(Scripted(None, fault))
