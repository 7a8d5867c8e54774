"""A conversation: what the model reads, writes and drops, and the command `calm chat`."""

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


def turns_of(conversation):
    return [(turn["role"], turn["content"]) for turn in conversation.messages]


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
    assert [role for role, _ in turns_of(conversation)] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    conversation.reset()
    assert turns_of(conversation) == [("system", "Be brief.")] and conversation.last is None
    conversation.set_system("")
    assert conversation.messages == []


def test_old_turns_are_dropped_to_make_room(model, tokenizer):
    conversation = Conversation(model, tokenizer, system="S", seed=0, max_new_tokens=40)
    dropped = [conversation.answer(f"Tell me of number {n}, please.", lambda _: None) for n in range(8)]
    assert sum(dropped) > 0 and all(number % 2 == 0 for number in dropped)
    assert turns_of(conversation)[0] == ("system", "S") and turns_of(conversation)[-2][1].startswith(
        "Tell me of number 7"
    )
    num_messages = len(conversation.messages)
    with pytest.raises(InputError, match="leave no room for an answer"):
        conversation.answer("word " * 300, lambda _: None)
    assert len(conversation.messages) == num_messages


def test_interrupted_answer_keeps_what_was_written(model, tokenizer):
    conversation = Conversation(model, tokenizer, seed=0, max_new_tokens=40)
    parts: list[str] = []

    def interrupt(text: str) -> None:
        parts.append(text)
        if len(parts) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.answer("Go", interrupt)
    assert turns_of(conversation) == [("user", "Go"), ("assistant", "".join(parts).strip())]
    conversation.answer("On", lambda _: None)
    assert len(conversation.messages) == 4


def test_model_without_a_chat_template_is_refused(model):
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
    printed = talk(
        monkeypatch, capsys, folder, ["/nonsense", "/temperature 2", "/temperature x", "/help", "/chunks"]
    )
    errors = printed.err.splitlines()
    assert "there is no command '/nonsense'; /help lists them" in errors[0]
    assert "temperature must be at least 0 and at most 1, got 2" in errors[1]
    assert "got 'x'" in errors[2] and "there is no answer yet" in errors[3]
    assert "/system TEXT" in printed.out


def test_alternatives_of_an_answer_include_its_chunks(tokenizer):
    torch.manual_seed(4)
    conversation = Conversation(tiny_model(4, vocab_size=320), tokenizer, seed=1, max_new_tokens=12)
    conversation.answer("Hello", lambda _: None)
    chunks = conversation.alternatives([1.0, 0.5], num_draws=300, max_candidates=5)
    assert conversation.last is not None
    assert [token for chunk, _ in chunks for token in chunk] == conversation.last[1]
    for chunk, alternatives in chunks:
        assert sum(candidate.count for candidate in alternatives.candidates) <= 300
        assert chunk in [list(candidate.tokens) for candidate in alternatives.candidates]


def test_a_chunk_cut_off_by_the_token_limit_is_no_candidate(tokenizer, capsys):
    torch.manual_seed(4)
    conversation = Conversation(tiny_model(4, vocab_size=320), tokenizer, seed=1, max_new_tokens=6)
    conversation.answer("Hello", lambda _: None)
    (full, of_full), (cut, of_cut) = conversation.alternatives([1.0], num_draws=20, max_candidates=1000)
    assert full in [list(candidate.tokens) for candidate in of_full.candidates] and len(cut) == 2
    assert all(candidate.count for candidate in of_cut.candidates)  # Only what was drawn.
    capsys.readouterr()
    print_chunks(conversation)
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert sum(bool(row[2].strip()) for row in rows) == 1


def test_chunks_are_printed_as_a_table(folder, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    out = talk(monkeypatch, capsys, folder, ["Hello", "/chunks"]).out
    assert "T = 1" in out and "T = 0.5" in out and out.count("│") >= 3 * 5


def test_a_token_level_model_has_no_alternatives(tokenizer):
    conversation = Conversation(baseline(), tokenizer, seed=1, max_new_tokens=4)
    conversation.answer("Hello", lambda _: None)
    with pytest.raises(InputError, match="one token at a time"):
        conversation.alternatives([1.0], 10, 1)


def test_a_system_message_changes_the_answer(folder, monkeypatch, capsys):
    plain = talk(monkeypatch, capsys, folder, ["Hello"]).out
    with_system = talk(monkeypatch, capsys, folder, ["Hello"], "--system", "Speak like a cat.").out
    later = talk(monkeypatch, capsys, folder, ["Hi", "/system Speak like a cat.", "Hello"]).out
    assert with_system != plain and later.endswith(with_system)


def test_input_that_is_not_utf_8_is_refused_and_the_chat_continues(folder, monkeypatch, capsys):
    expected = talk(monkeypatch, capsys, folder, ["Hello", "Caf\N{LATIN SMALL LETTER E WITH ACUTE}?"]).out
    lines = b"hello \xff\nHello\n/system a\xff\nCaf\xc3\xa9?\n"
    for encoding in ("utf-8", "ascii"):  # Of the terminal.
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding=encoding))
        main(["chat", str(folder), "--max_new_tokens", "12", "--seed", "5"])
        printed = capsys.readouterr()
        assert printed.out == expected
        first, second = printed.err.splitlines()
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
def test_bad_options_are_refused(folder, capsys, monkeypatch, options, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert message in failure(capsys, "chat", folder, *options)


@pytest.mark.parametrize("number", [None, 0, 12])
def test_a_model_thinks_before_each_answer(number, tokenizer):
    """At temperature 0, after the same thoughts, the chunks of the answer have probability 1."""
    thinker = thinking_model(3, vocab_size=320)
    conversation = Conversation(thinker, tokenizer, seed=3, max_new_tokens=12, num_thoughts=number)
    for question in ("Who are you?", "Why?"):
        conversation.answer(question, lambda _: None, temperature=0.0)
        prompt, written = conversation.last
        settings = {"max_new_tokens": 12, "temperature": 0.0, "num_thoughts": number}
        expected = continue_tokens(thinker, tokenizer, [prompt], **settings)[0].tolist()
        assert expected[: len(written)] == written
        for chunk, alternatives in conversation.alternatives([0.0], num_draws=8, max_candidates=1):
            [answered] = [c for c in alternatives.candidates if list(c.tokens) == chunk]
            assert answered.probabilities == [1.0]


def test_thoughts_take_room_from_the_conversation(tokenizer):
    thinker = thinking_model(3, vocab_size=320)

    def dropped(number):
        conversation = Conversation(thinker, tokenizer, seed=0, max_new_tokens=40, num_thoughts=number)
        return [conversation.answer(f"Number {n}, please.", lambda _: None) for n in range(2)]

    assert (dropped(0), dropped(20)) == ([0, 0], [0, 2])
    conversation = Conversation(thinker, tokenizer, num_thoughts=60)
    with pytest.raises(InputError, match=r"tokens and 248 for thoughts leave no room for an answer"):
        conversation.answer("Hello", lambda _: None)


def test_thoughts_that_a_model_cannot_have_are_refused(tokenizer):
    with pytest.raises(InputError, match="at most 10,000, got 10001"):
        Conversation(tiny_model(4, vocab_size=320), tokenizer, num_thoughts=10_001)
    with pytest.raises(InputError, match="not a transformers LlamaForCausalLM; leave out num_thoughts"):
        Conversation(baseline(), tokenizer, num_thoughts=3)


def test_command_refuses_a_model_without_a_chat_template(capsys):
    assert "no chat template" in failure(capsys, "chat", "stories")
