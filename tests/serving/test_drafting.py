"""A token-level model for which a CALM drafts, over HTTP."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from drafts import deciding_model, drafting_model
from serving_client import PROMPT, generate_text, serving, wait_until
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
def drafting_server(tokenizer):
    with serving(DraftedWriter(MODEL, DRAFT, 2), tokenizer) as server:
        yield server


def post(server, path="/v1/completions", **changes):
    body = {"model": "tiny", "prompt": PROMPT, **changes}
    return httpx.post(server.url + path, json=body, timeout=30)


def finish(batch, row):
    """Step until a row, the only one of its batch, has ended; its new tokens."""
    tokens = []
    while not row.has_ended:
        tokens += [token for result in batch.step() for token in result.tokens]
    return tokens


SAMPLING = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.6, "top_p": 0.8},
    {"temperature": 1.5},
    {"temperature": 1.0, "min_p": 0.2},
]


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_concurrent_texts_match_generate(drafting_server, tokenizer, sampling):
    expected = (
        generate_text(
            MODEL, tokenizer, PROMPT, draft=DRAFT, draft_chunks=2, max_new_tokens=12, seed=1, **sampling
        )
        if sampling["temperature"] <= 1
        else None
    )
    with ThreadPoolExecutor(8) as threads:
        futures = [
            threads.submit(post, drafting_server, max_tokens=12, seed=seed, **sampling)
            for seed in (1, 2, 3, 1, 4, 1)
        ]
        texts = [future.result().json()["choices"][0]["text"] for future in futures]
    assert texts[0] == texts[3] == texts[5] and expected in (None, texts[0])
    assert sampling["temperature"] == 0 or len(set(texts)) == 4


def test_generation_config_of_the_model_is_honoured(tokenizer):
    model = deciding_model(320, max_position_embeddings=256)
    model.generation_config.repetition_penalty, model.generation_config.eos_token_id = 1.7, EOS
    settings = {"temperature": 0.0, "seed": 1}
    ids = tokenizer(PROMPT)["input_ids"]
    batch = DraftedBatch(model, DRAFT, 2)
    row = batch.join(ids, TokenSampler(temperature=0.0), 12, 1)
    text = tokenizer.decode(finish(batch, row))
    assert text == generate_text(
        model, tokenizer, PROMPT, draft=DRAFT, draft_chunks=2, max_new_tokens=12, **settings
    )
    assert text != generate_text(
        MODEL, tokenizer, PROMPT, draft=DRAFT, draft_chunks=2, max_new_tokens=12, **settings
    )


def test_tiny_temperature_is_greedy(drafting_server):
    greedy, nearly_greedy = (
        post(drafting_server, max_tokens=12, temperature=temperature).json() for temperature in (0, 1e-300)
    )
    assert nearly_greedy["choices"][0]["text"] == greedy["choices"][0]["text"]


def test_token_ids_beyond_the_models_vocabulary_are_refused(tokenizer):
    with serving(DraftedWriter(deciding_model(300, max_position_embeddings=256), DRAFT), tokenizer) as server:
        response = post(server, prompt=[5, 310], max_tokens=2)
    assert len(tokenizer) > 310 and response.status_code == 400
    assert "must be between 0 and 299" in response.json()["error"]["message"]


def test_several_texts_for_a_prompt_differ(drafting_server, tokenizer):
    choices = post(drafting_server, n=3, max_tokens=12, seed=1, temperature=1).json()["choices"]
    texts = [choice["text"] for choice in choices]
    assert len(set(texts)) == 3
    assert texts[0] == generate_text(
        MODEL, tokenizer, PROMPT, draft=DRAFT, draft_chunks=2, max_new_tokens=12, seed=1, temperature=1.0
    )


def test_stream_matches_the_text_and_rounds_are_reported(drafting_server):
    _, client, _ = drafting_server
    arguments = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "seed": 1, "temperature": 1}
    text = client.completions.create(**arguments).choices[0].text
    parts = [event.choices[0].text for event in client.completions.create(stream=True, **arguments)]
    assert "".join(parts) == text and len(parts) > 1
    [choice] = post(drafting_server, return_chunks=True, **arguments).json()["choices"]
    rounds = choice["chunks"]
    assert sum(len(chunk["token_ids"]) for chunk in rounds) == 12 > len(rounds)
    assert all(0 <= chunk["agreement"] <= 1 for chunk in rounds)


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
def test_unsupported_arguments_are_refused(drafting_server, changes, message):
    response = post(drafting_server, **changes)
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_token_models_have_neither_playground_nor_pools(drafting_server):
    for path in ("/", "/page"):
        assert httpx.get(drafting_server.url + path).status_code == 404
    assert post(drafting_server, "/v1/calm/pool").status_code == 404


def test_texts_end_at_any_eos_token_of_the_model(tokenizer):
    model = deciding_model(320, max_position_embeddings=256)
    model.generation_config.eos_token_id = [EOS, 7]
    batch = DraftedBatch(model, DRAFT)
    with torch.no_grad():
        model.lm_head.weight[7] = 4 * model.lm_head.weight.norm(dim=1).max() * torch.randn(16).double()
    row = batch.join([1, 5, 6], TokenSampler(temperature=1.0), 200, seed=0)
    tokens = finish(batch, row)
    assert (
        len(batch) == 0 and tokens[-1] in (EOS, 7) and not {EOS, 7} & set(tokens[:-1]) and len(tokens) < 200
    )


def test_texts_end_where_generate_ends_them():
    # The prompt repeats itself, so the first draft is copied from it.
    model, prompt = deciding_model(320, max_position_embeddings=256), [1, 5, 6, 7] * 3
    model.generation_config.top_k = 1  # Ignored by both.
    settings = {"temperature": 1.0, "seed": 0, "max_new_tokens": 30, "draft": DRAFT}
    without_eos = language_model(model).generate(torch.tensor([prompt]), **settings)[0, 12:].tolist()
    model.config.eos_token_id, model.generation_config.eos_token_id = without_eos[4], without_eos[15]
    batch = DraftedBatch(model, DRAFT)
    tokens = finish(batch, batch.join(prompt, TokenSampler(temperature=1.0), 30, seed=0))
    assert tokens == language_model(model).generate(torch.tensor([prompt]), **settings)[0, 12:].tolist()
    assert tokens == without_eos[: without_eos.index(without_eos[15]) + 1]


def test_reading_prompts_in_pieces_changes_nothing():
    prompt = torch.randint(3, 320, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    texts = []
    for tokens_at_once in (1000, 7):
        batch = DraftedBatch(MODEL, DRAFT, tokens_at_once=tokens_at_once)
        row = batch.join(prompt, TokenSampler(temperature=0.0), 10, seed=0)
        steps, tokens = 0, []
        while not row.has_ended:
            tokens += [token for result in batch.step() for token in result.tokens]
            steps += 1
        texts.append(tokens)
        assert (steps > 12) == (tokens_at_once == 7)
    assert texts[0] == texts[1]


def test_rows_take_turns_and_can_be_dropped_or_fail(monkeypatch):
    batch = DraftedBatch(MODEL, DRAFT, max_rows=2)
    rows = [batch.join([1, 5, 6], TokenSampler(), 30, seed=seed) for seed in range(3)]
    first_rows = [batch.step()[0].row for _ in range(4)]
    assert first_rows == [rows[0], rows[1]] * 2 and len(batch) == 3
    batch.drop(rows[0])
    assert len(batch) == 2 and {batch.step()[0].row for _ in range(2)} == set(rows[1:])
    draft = ChunkDrafter.draft

    def failing(self, text, *others):
        if len(text) % 2:
            raise RuntimeError("no memory")
        return draft(self, text, *others)

    monkeypatch.setattr(ChunkDrafter, "draft", failing)
    failures = []
    while not failures:
        failures = [result for result in batch.step() if isinstance(result, Failed)]
    monkeypatch.undo()
    assert failures[0].row.has_ended and len(batch) <= 1
    while len(batch):
        batch.step()
    assert all(row.has_ended for row in rows)


def test_disconnect_frees_the_row(tokenizer):
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
