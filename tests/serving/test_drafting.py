"""A model of tokens that a CALM drafts for, over HTTP."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from drafts import deciding_model, drafting_model
from serving_client import PROMPT, alone, serving, wait_until
from tiny import EOS
from toy import failure

from calm.models.drafting.batching import DraftedBatch, TokenSampler
from calm.models.drafting.draft import ChunkDrafter
from calm.models.generation.rows import Failed
from calm.models.language_model import language_model
from calm.models.thoughts import Thoughts
from calm.serving.writers import DraftedWriter

MODEL = deciding_model(320, max_position_embeddings=256)
MODEL.generation_config.eos_token_id = EOS
DRAFT = drafting_model(vocab_size=320)


@pytest.fixture(scope="module")
def running(tokenizer):
    with serving(DraftedWriter(MODEL, DRAFT, 2), tokenizer) as server:
        yield server


def post(server, path="/v1/completions", **changes):
    body = {"model": "tiny", "prompt": PROMPT, **changes}
    return httpx.post(server[2] + path, json=body, timeout=30)


WAYS = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.6, "top_p": 0.8},
    {"temperature": 1.5},
    {"temperature": 1.0, "min_p": 0.2},
]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_texts_are_those_of_generate_in_any_company(running, tokenizer, how):
    expected = (
        alone(MODEL, tokenizer, PROMPT, draft=DRAFT, draft_chunks=2, max_new_tokens=12, seed=1, **how)
        if how["temperature"] <= 1
        else None
    )
    with ThreadPoolExecutor(8) as threads:
        asked = [
            threads.submit(post, running, max_tokens=12, seed=seed, **how) for seed in (1, 2, 3, 1, 4, 1)
        ]
        texts = [one.result().json()["choices"][0]["text"] for one in asked]
    assert texts[0] == texts[3] == texts[5] and expected in (None, texts[0])
    assert how["temperature"] == 0 or len(set(texts)) == 4


def test_what_a_models_own_configuration_asks_for_is_done_here_too(tokenizer):
    model = deciding_model(320, max_position_embeddings=256)
    model.generation_config.repetition_penalty, model.generation_config.eos_token_id = 1.7, EOS
    how = {"temperature": 0.0, "seed": 1}
    ids = tokenizer(PROMPT)["input_ids"]
    batch = DraftedBatch(model, DRAFT, 2)
    row, written = batch.join(ids, TokenSampler(temperature=0.0), 12, 1), []
    while not row.has_ended:
        written += [token for one in batch.step() for token in one.tokens]
    text = tokenizer.decode(written)
    assert text == alone(model, tokenizer, PROMPT, draft=DRAFT, draft_chunks=2, max_new_tokens=12, **how)
    assert text != alone(MODEL, tokenizer, PROMPT, draft=DRAFT, draft_chunks=2, max_new_tokens=12, **how)


def test_a_temperature_of_next_to_nothing_is_none(running):
    greedy, near = (
        post(running, max_tokens=12, temperature=temperature).json() for temperature in (0, 1e-300)
    )
    assert near["choices"][0]["text"] == greedy["choices"][0]["text"]


def test_tokens_that_the_tokenizer_has_and_the_model_has_not_are_refused(tokenizer):
    with serving(DraftedWriter(deciding_model(300, max_position_embeddings=256), DRAFT), tokenizer) as server:
        answer = post(server, prompt=[5, 310], max_tokens=2)
    assert len(tokenizer) > 310 and answer.status_code == 400
    assert "must be between 0 and 299" in answer.json()["error"]["message"]


def test_copies_of_a_prompt_differ(running, tokenizer):
    choices = post(running, n=3, max_tokens=12, seed=1, temperature=1).json()["choices"]
    texts = [one["text"] for one in choices]
    assert len(set(texts)) == 3
    assert texts[0] == alone(
        MODEL, tokenizer, PROMPT, draft=DRAFT, draft_chunks=2, max_new_tokens=12, seed=1, temperature=1.0
    )


def test_streams_and_rounds_are_told(running):
    _, client, _ = running
    how = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "seed": 1, "temperature": 1}
    whole = client.completions.create(**how).choices[0].text
    parts = [event.choices[0].text for event in client.completions.create(stream=True, **how)]
    assert "".join(parts) == whole and len(parts) > 1
    [choice] = post(running, return_chunks=True, **how).json()["choices"]
    rounds = choice["chunks"]
    assert sum(len(one["token_ids"]) for one in rounds) == 12 > len(rounds)
    assert all(0 <= one["agreement"] <= 1 for one in rounds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "pool"}, "'sampler' applies only to models that generate chunks"),
        ({"num_draws": 5}, "'num_draws' applies only to models that generate chunks"),
        ({"temperature": 2.5}, "temperature must lie between 0 and 2, got 2.5"),
        ({"num_thoughts": 2}, "not trained to think"),
        ({"prompt": "a " * 400}, "shorten the prompt"),
    ],
)
def test_what_cannot_be_honoured_is_said(running, changes, message):
    answer = post(running, **changes)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_there_is_no_playground_and_there_are_no_pools(running):
    for path in ("/", "/page"):
        assert httpx.get(running[2] + path).status_code == 404
    assert post(running, "/v1/calm/pool").status_code == 404


def test_texts_end_where_the_model_ends_them(tokenizer):
    model = deciding_model(320, max_position_embeddings=256)
    model.generation_config.eos_token_id = [EOS, 7]
    batch = DraftedBatch(model, DRAFT)
    with torch.no_grad():
        model.lm_head.weight[7] = 4 * model.lm_head.weight.norm(dim=1).max() * torch.randn(16).double()
    row = batch.join([1, 5, 6], TokenSampler(temperature=1.0), 200, seed=0)
    tokens = []
    while not row.has_ended:
        tokens += [token for one in batch.step() for token in one.tokens]
    assert (
        len(batch) == 0 and tokens[-1] in (EOS, 7) and not {EOS, 7} & set(tokens[:-1]) and len(tokens) < 200
    )


def test_texts_end_where_generate_ends_them():
    # The prompt repeats itself, so the first draft is copied from it.
    model, prompt = deciding_model(320, max_position_embeddings=256), [1, 5, 6, 7] * 3
    model.generation_config.top_k = 1  # Both set it aside.
    how = {"temperature": 1.0, "seed": 0, "max_new_tokens": 30, "draft": DRAFT}
    free = language_model(model).generate(torch.tensor([prompt]), **how)[0, 12:].tolist()
    model.config.eos_token_id, model.generation_config.eos_token_id = free[4], free[15]
    batch, tokens = DraftedBatch(model, DRAFT), []
    row = batch.join(prompt, TokenSampler(temperature=1.0), 30, seed=0)
    while not row.has_ended:
        tokens += [token for one in batch.step() for token in one.tokens]
    assert tokens == language_model(model).generate(torch.tensor([prompt]), **how)[0, 12:].tolist()
    assert tokens == free[: free.index(free[15]) + 1]


def test_long_prompts_are_read_in_pieces_and_change_nothing():
    prompt = torch.randint(3, 320, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    texts = []
    for tokens_at_once in (1000, 7):
        batch = DraftedBatch(MODEL, DRAFT, tokens_at_once=tokens_at_once)
        row = batch.join(prompt, TokenSampler(temperature=0.0), 10, seed=0)
        steps, tokens = 0, []
        while not row.has_ended:
            tokens += [token for one in batch.step() for token in one.tokens]
            steps += 1
        texts.append(tokens)
        assert (steps > 12) == (tokens_at_once == 7)
    assert texts[0] == texts[1]


def test_rows_take_turns_and_leave(monkeypatch):
    batch = DraftedBatch(MODEL, DRAFT, max_rows=2)
    rows = [batch.join([1, 5, 6], TokenSampler(), 30, seed=seed) for seed in range(3)]
    seen = [batch.step()[0].row for _ in range(4)]
    assert seen == [rows[0], rows[1]] * 2 and len(batch) == 3
    batch.drop(rows[0])
    assert len(batch) == 2 and {batch.step()[0].row for _ in range(2)} == set(rows[1:])
    draft = ChunkDrafter.draft

    def failing(self, text, *others):
        if len(text) % 2:
            raise RuntimeError("no memory")
        return draft(self, text, *others)

    monkeypatch.setattr(ChunkDrafter, "draft", failing)
    failed = []
    while not failed:
        failed = [one for one in batch.step() if isinstance(one, Failed)]
    monkeypatch.undo()
    assert failed[0].row.has_ended and len(batch) <= 1
    while len(batch):
        batch.step()
    assert all(row.has_ended for row in rows)


def test_who_leaves_frees_its_place(tokenizer):
    with serving(DraftedWriter(MODEL, DRAFT), tokenizer, max_rows=1, max_tokens=200) as (engine, client, _):
        stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200, stream=True)
        next(iter(stream))
        stream.close()
        wait_until(lambda: engine.num_rows == 0)
        assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3, temperature=0).choices


def test_models_that_cannot_be_drafted_for_are_refused(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thinker = deciding_model(320)
    thinker.config.thoughts = Thoughts(2, 1, 2, scale=1.0).as_dict()
    for name, model in (("model", MODEL), ("thinker", thinker), ("draft", DRAFT)):
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    assert "'model' is not a CALM" in failure(capsys, "serve", "model")
    assert "'thinker' was trained to think, which --draft does not support" in failure(
        capsys, "serve", "thinker", "--draft", "draft"
    )
    assert "a CALM already generates whole chunks" in failure(capsys, "serve", "draft", "--draft", "draft")
    assert "name one with --draft" in failure(capsys, "serve", "model", "--draft_chunks", "2")
