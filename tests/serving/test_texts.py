"""Prompts are encoded as in training, and new tokens decoded as they continue the prompt."""

import pytest
import torch
from other_tokenizers import KINDS
from serving_client import generate_text, serving
from tiny import tiny_model

from calm.models.loading import add_eos_ids
from calm.text.chat import encode_chat
from calm.text.decoding import decode_after
from calm.text.encoding import encode_documents

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", params=["llama with an end", "unigram", "byte-level"])
def served(request):
    torch.manual_seed(4)
    tokenizer = KINDS[request.param]()
    tokenizer.chat_template = CHATML
    model = tiny_model(4, vocab_size=len(tokenizer))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    with serving(model, tokenizer) as (engine, client, _):
        yield model, tokenizer, engine, client


SETTINGS = {"max_tokens": 12, "seed": 3, "temperature": 1.0}


@pytest.mark.parametrize("prompt", ["Once upon a", "The tag </s> ends it, <|eos|> too.", " a\n", "Zoë: <s>"])
def test_texts_match_generate_and_echoes_match_the_prompt(prompt, served):
    model, tokenizer, _, client = served
    text = generate_text(model, tokenizer, prompt, max_new_tokens=12, seed=3, temperature=1.0)
    response = client.completions.create(model="tiny", prompt=prompt, echo=True, **SETTINGS)
    assert response.choices[0].text == prompt + text
    assert response.usage.prompt_tokens == len(encode_documents(tokenizer, [prompt])[0])
    parts = client.completions.create(model="tiny", prompt=prompt, stream=True, **SETTINGS)
    assert "".join(part.choices[0].text for part in parts) == text


def test_token_ids_as_a_prompt_are_used_unchanged(served):
    _, tokenizer, _, client = served
    ids = [*encode_documents(tokenizer, ["Tom: "])[0], tokenizer.eos_token_id, 40, 41]
    response = client.completions.create(model="tiny", prompt=ids, echo=True, **SETTINGS)
    assert response.usage.prompt_tokens == len(ids)
    assert response.choices[0].text.startswith(decode_after(tokenizer, [], ids))


def test_control_tokens_in_messages_are_read_as_plain_text(served):
    """Checked on the token ids that reach the engine."""
    _, tokenizer, engine, client = served
    content = f"Mark {tokenizer.eos_token}{tokenizer.bos_token} 1"
    messages = [{"role": "user", "content": content}]
    prompts, submit = [], engine.submit
    engine.submit = lambda jobs: (prompts.extend(job.prompt for job in jobs), submit(jobs))[1]
    try:
        client.chat.completions.create(model="tiny", messages=messages, **SETTINGS)
    finally:
        engine.submit = submit
    assert prompts == [encode_chat(tokenizer, messages)]
    assert tokenizer.eos_token_id not in prompts[0]


@pytest.mark.parametrize("is_control", [True, False])
def test_end_of_turn_marker_is_not_shown(is_control):
    """Whether it is a control token or a model has learned to write it as plain text."""
    tokenizer = KINDS["byte-level"]()
    tokenizer.chat_template = CHATML
    if is_control:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = tiny_model(4, vocab_size=len(tokenizer))
    add_eos_ids(model, tokenizer)
    written = tokenizer("Yes.<|im_end|>\nuser and more of it", add_special_tokens=False)["input_ids"]
    chunks = iter(torch.tensor(written[: len(written) // 4 * 4]).split(4))
    sample = model.sample_chunks

    def scripted(hidden_PD, settings, *others):
        drawn = sample(hidden_PD, settings, *others)
        return drawn._replace(chunks_RK=next(chunks)[None])

    model.sample_chunks = scripted
    with serving(model, tokenizer) as (_, client, _):
        response = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Well?"}], max_tokens=20
        )
    assert response.choices[0].message.content == "Yes."
    assert response.choices[0].finish_reason == "stop"
