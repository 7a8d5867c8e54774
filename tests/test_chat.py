"""A conversation: what the model reads, writes and forgets, and the command around it."""

import io
import sys

import pytest
import torch
from tiny import thinking_model, tiny_model
from toy import failure
from transformers import LlamaConfig, LlamaForCausalLM

from calm.chat import Conversation
from calm.cli import main
from calm.commands.chatting import print_chunks
from calm.data.examples import set_chat_template
from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer
from calm.errors import InputError
from calm.text.chat import encode_chat
from calm.texts import continue_tokens


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(stories(0, 20), 320)
    set_chat_template(tokenizer, None)
    return tokenizer


def baseline():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = LlamaConfig(vocab_size=320, max_position_embeddings=256, **sizes, **special)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=["calm", "autoregressive"])
def model(request):
    torch.manual_seed(4)
    return tiny_model(4, vocab_size=320) if request.param == "calm" else baseline()


def said(conversation):
    return [(one["role"], one["content"]) for one in conversation.messages]


def test_each_answer_is_what_the_model_writes_after_the_conversation(model, tokenizer):
    conversation = Conversation(model, tokenizer, system="Be brief.", seed=3, max_new_tokens=12)
    shown: list[str] = []
    for question in ("Who are you?", "Why?"):
        shown.clear()
        assert conversation.answer(question, shown.append, temperature=0.5) == 0
        before, answer = conversation.messages[:-1], conversation.messages[-1]
        assert answer == {"role": "assistant", "content": "".join(shown).strip()}
        assert before[-1] == {"role": "user", "content": question}
        prompt = encode_chat(tokenizer, before)
        assert conversation.last is not None and conversation.last[0] == prompt
        new = continue_tokens(
            model, tokenizer, [prompt], max_new_tokens=12, seed=3 + len(before), temperature=0.5
        )
        written = conversation.last[1]
        assert new[0].tolist()[: len(written)] == written
    assert [role for role, _ in said(conversation)] == ["system", "user", "assistant", "user", "assistant"]
    conversation.reset()
    assert said(conversation) == [("system", "Be brief.")] and conversation.last is None
    conversation.set_system("")
    assert conversation.messages == []


def test_old_turns_make_room(model, tokenizer):
    conversation = Conversation(model, tokenizer, system="S", seed=0, max_new_tokens=40)
    forgotten = [conversation.answer(f"Tell me of number {n}, please.", lambda _: None) for n in range(8)]
    assert sum(forgotten) > 0 and all(number % 2 == 0 for number in forgotten)
    assert said(conversation)[0] == ("system", "S") and said(conversation)[-2][1].startswith(
        "Tell me of number 7"
    )
    kept = len(conversation.messages)
    with pytest.raises(InputError, match="leave no room for an answer"):
        conversation.answer("word " * 300, lambda _: None)
    assert len(conversation.messages) == kept


def test_what_was_written_before_an_interruption_stays(model, tokenizer):
    conversation = Conversation(model, tokenizer, seed=0, max_new_tokens=40)
    heard: list[str] = []

    def interrupt(text: str) -> None:
        heard.append(text)
        if len(heard) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.answer("Go", interrupt)
    assert said(conversation) == [("user", "Go"), ("assistant", "".join(heard).strip())]
    conversation.answer("On", lambda _: None)
    assert len(conversation.messages) == 4


def test_a_model_without_a_template_does_not_chat(model):
    with pytest.raises(InputError, match="no chat template"):
        Conversation(model, train_tokenizer(stories(0, 20), 320))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(4)
    tiny_model(4, vocab_size=320).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def talk(monkeypatch, capsys, folder, lines, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    main(["chat", str(folder), "--max_new_tokens", "12", "--seed", "5", *options])
    return capsys.readouterr()


def test_lines_are_answered_and_commands_obeyed(folder, monkeypatch, capsys):
    first = talk(monkeypatch, capsys, folder, ["Hello", "", "/exit", "never"]).out
    again = talk(
        monkeypatch, capsys, folder, ["/temperature 1", "Hello", "/reset", "/temperature 0.5", "Hello"]
    )
    assert first.strip() and again.out.endswith(first) and again.err == ""
    told = talk(
        monkeypatch, capsys, folder, ["/nonsense", "/temperature 2", "/temperature x", "/help", "/chunks"]
    )
    errors = told.err.splitlines()
    assert "there is no command '/nonsense'; /help lists them" in errors[0]
    assert "temperature must be at least 0 and at most 1, got 2" in errors[1]
    assert "got 'x'" in errors[2] and "there is no answer yet" in errors[3]
    assert "/system TEXT" in told.out


def test_chunks_of_an_answer_open(folder, tokenizer, monkeypatch, capsys):
    torch.manual_seed(4)
    calm = tiny_model(4, vocab_size=320)
    conversation = Conversation(calm, tokenizer, seed=1, max_new_tokens=12)
    conversation.answer("Hello", lambda _: None)
    found = conversation.alternatives([1.0, 0.5], num_draws=300, max_candidates=5)
    assert conversation.last is not None
    assert [token for chunk, _ in found for token in chunk] == conversation.last[1]
    for chunk, alternatives in found:
        assert sum(one.count for one in alternatives.candidates) <= 300
        assert chunk in [list(one.tokens) for one in alternatives.candidates]
    cut = Conversation(calm, tokenizer, seed=1, max_new_tokens=6)
    cut.answer("Hello", lambda _: None)
    (whole, of_whole), (part, of_part) = cut.alternatives([1.0], num_draws=20, max_candidates=1000)
    assert whole in [list(one.tokens) for one in of_whole.candidates] and len(part) == 2
    assert all(one.count for one in of_part.candidates)  # A part of a chunk is none that was never drawn.
    capsys.readouterr()
    print_chunks(cut)
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert sum(bool(row[2].strip()) for row in rows) == 1
    monkeypatch.setenv("COLUMNS", "200")
    out = talk(monkeypatch, capsys, folder, ["Hello", "/chunks"]).out
    assert "T = 1" in out and "T = 0.5" in out and out.count("│") >= 3 * 5
    with pytest.raises(InputError, match="one token at a time"):
        plain = Conversation(baseline(), tokenizer, seed=1, max_new_tokens=4)
        plain.answer("Hello", lambda _: None)
        plain.alternatives([1.0], 10, 1)


def test_a_system_message_is_read(folder, monkeypatch, capsys):
    plain = talk(monkeypatch, capsys, folder, ["Hello"]).out
    told = talk(monkeypatch, capsys, folder, ["Hello"], "--system", "Speak like a cat.").out
    later = talk(monkeypatch, capsys, folder, ["Hi", "/system Speak like a cat.", "Hello"]).out
    assert told != plain and later.endswith(told)


def test_what_is_not_utf_8_is_refused_and_the_chat_goes_on(folder, monkeypatch, capsys):
    expected = talk(monkeypatch, capsys, folder, ["Hello", "Caf\N{LATIN SMALL LETTER E WITH ACUTE}?"]).out
    lines = b"hello \xff\nHello\n/system a\xff\nCaf\xc3\xa9?\n"
    for encoding in ("utf-8", "ascii"):  # As terminals of two kinds are read.
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding=encoding))
        main(["chat", str(folder), "--max_new_tokens", "12", "--seed", "5"])
        told = capsys.readouterr()
        assert told.out == expected
        first, second = told.err.splitlines()
        assert first.startswith("calm: the text 'hello ") and second.startswith("calm: the text '/system a")
        assert first.endswith("is not UTF-8.") and second.endswith("is not UTF-8.")
    assert "is not UTF-8" in failure(capsys, "chat", folder, "--system", "a\udcff")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "1.5"], "temperature must be"),
        (["--max_new_tokens", "0"], "max_new_tokens must be"),
        (["--sampler", "nonsense"], "nonsense"),
    ],
)
def test_bad_options(folder, capsys, monkeypatch, options, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert message in failure(capsys, "chat", folder, *options)


@pytest.mark.parametrize("number", [None, 0, 12])
def test_a_model_thinks_before_each_answer(number, tokenizer):
    """At temperature 0 the chunks of the answer are all that could have come after these thoughts."""
    thinker = thinking_model(3, vocab_size=320)
    conversation = Conversation(thinker, tokenizer, seed=3, max_new_tokens=12, num_thoughts=number)
    for question in ("Who are you?", "Why?"):
        conversation.answer(question, lambda _: None, temperature=0.0)
        prompt, written = conversation.last
        how = {"max_new_tokens": 12, "temperature": 0.0, "num_thoughts": number}
        expected = continue_tokens(thinker, tokenizer, [prompt], **how)[0].tolist()
        assert expected[: len(written)] == written
        for chunk, alternatives in conversation.alternatives([0.0], num_draws=8, max_candidates=1):
            [own] = [one for one in alternatives.candidates if list(one.tokens) == chunk]
            assert own.probabilities == [1.0]


def test_thoughts_take_room_in_a_chat(tokenizer):
    thinker = thinking_model(3, vocab_size=320)

    def forgotten(number):
        conversation = Conversation(thinker, tokenizer, seed=0, max_new_tokens=40, num_thoughts=number)
        return [conversation.answer(f"Number {n}, please.", lambda _: None) for n in range(2)]

    assert (forgotten(0), forgotten(20)) == ([0, 0], [0, 2])
    conversation = Conversation(thinker, tokenizer, num_thoughts=60)
    with pytest.raises(InputError, match=r"tokens and 248 for thoughts leave no room for an answer"):
        conversation.answer("Hello", lambda _: None)


def test_thoughts_that_a_model_cannot_take(tokenizer):
    with pytest.raises(InputError, match="at most 10,000, got 10001"):
        Conversation(tiny_model(4, vocab_size=320), tokenizer, num_thoughts=10_001)
    with pytest.raises(InputError, match="not a transformers LlamaForCausalLM; leave out num_thoughts"):
        Conversation(baseline(), tokenizer, num_thoughts=3)


def test_a_model_that_continues_texts_only(capsys):
    assert "no chat template" in failure(capsys, "chat", "stories")
