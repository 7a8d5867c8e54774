"""calm in lm-eval: generation tasks, likelihoods if the head has them, and choices by sampling otherwise."""

import json
import string
import subprocess
import sys

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from other_tokenizers import KINDS
from tiny import thinking_model, tiny_model

from calm.core.chunks import align_to_chunks, split_into_chunks
from calm.data.examples import set_chat_template
from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer
from calm.errors import InputError
from calm.harness import HarnessModel, _energy_score, main
from calm.models.loading import load_language_model_and_tokenizer
from calm.models.thoughts import THOUGHT, thoughts_of
from calm.text.chat import encode_chat
from calm.text.decoding import decode_after
from calm.text.encoding import encode_documents
from calm.texts import continue_texts, continue_tokens

TASKS = {
    "texts": "output_type: generate_until\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: ['e'], max_gen_toks: 12}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
    "choices": "output_type: multiple_choice\ndoc_to_target: 0\ndoc_to_choice: '{{choices}}'\n"
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("models") / "small"
    tokenizer = train_tokenizer(stories(0, 20), 320)
    set_chat_template(tokenizer, None)
    tiny_model(4, vocab_size=320).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tasks_in(folder, records):
    """Tasks of the harness on a local file, so that nothing is downloaded."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\n"
            f"test_split: test\ndoc_to_text: '{{{{question}}}}'\nmetadata: {{version: 1}}\n{text}"
        )
    return TaskManager(include_path=str(folder), include_defaults=False)


def test_generation_task_scores_the_answers(folder, tmp_path):
    """Three of four targets are what the model writes."""
    model, tokenizer = load_language_model_and_tokenizer(str(folder))
    questions = ["Once upon", "One day", "A cat and a dog", "Then"]
    texts = [
        continue_texts(model, tokenizer, [q], max_new_tokens=12, temperature=0, num_draws=16, seed=7)[0]
        for q in questions
    ]
    assert any("e" in text for text in texts)
    answers = [text.split("e")[0] for text in texts]
    answers[1] += "wrong"
    manager = tasks_in(
        tmp_path,
        [{"question": q, "answer": a, "choices": ["x"]} for q, a in zip(questions, answers, strict=True)],
    )
    harness = HarnessModel(str(folder), num_draws=16, seed=7)
    results = lm_eval.simple_evaluate(model=harness, tasks=["texts"], task_manager=manager, bootstrap_iters=0)
    assert results["results"]["texts"]["exact_match,none"] == 0.75


def instance(*arguments):
    return Instance("generate_until", {}, arguments, 0)


def test_each_request_is_generated_with_its_own_settings(folder):
    harness = HarnessModel(str(folder), batch_size=2, seed=3)
    model, tokenizer = load_language_model_and_tokenizer(str(folder))
    sampled = {"do_sample": True, "temperature": 0.7, "max_gen_toks": 9}
    requests = [
        instance(f"text {n}", sampled if n % 2 else {"until": "zzz", "max_gen_toks": 5}) for n in range(7)
    ]
    for number, text in enumerate(harness.generate_until(requests)):
        settings = (
            {"max_new_tokens": 9, "temperature": 0.7}
            if number % 2
            else {"max_new_tokens": 5, "temperature": 0, "num_draws": 64}
        )
        assert [text] == continue_texts(model, tokenizer, [f"text {number}"], seed=3, **settings)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1.0}])
@pytest.mark.parametrize(
    ("until", "costs_less"),
    [("e", False), (list(string.printable), True), (["e", "zzz"], False), (["zzz", ""], False), ([], False)],
)
def test_stop_strings_cut_the_text_and_end_generation_early(until, costs_less, sampling, folder, monkeypatch):
    """The text is that of the full budget, cut; generation ends when every text of a batch can be cut."""
    harness, lengths = HarnessModel(str(folder), num_draws=16, seed=3), []

    def continue_and_count(*arguments, **settings):
        tokens = continue_tokens(*arguments, **settings)
        lengths.append(tokens.shape[1])
        return tokens

    def texts_until(stops):
        settings = {"until": stops, "max_gen_toks": 40, **sampling}
        return harness.generate_until([instance(f"Once upon {n}", settings) for n in range(4)])

    monkeypatch.setattr("calm.harness.continue_tokens", continue_and_count)
    for text, full in zip(texts_until(until), texts_until([]), strict=True):
        assert text == full[: min((full.find(stop) for stop in until if stop in full), default=None)]
    assert lengths[1] == 40 and (lengths[0] < 20 or not costs_less)


def test_the_stop_string_that_begins_first_counts(folder):
    """Even if another one, inside it, is complete earlier."""
    harness = HarnessModel(str(folder), seed=3)
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 40}
    [full] = harness.generate_until([instance("Once upon", settings)])
    for start in range(len(full) - 8):
        stops = [full[start + 1 : start + 3], full[start : start + 8]]
        [text] = harness.generate_until([instance("Once upon", {"until": stops, **settings})])
        assert text == full[: min(map(full.find, stops))], stops


@pytest.mark.parametrize("batch_size", [1, 3])
def test_repeated_requests_get_different_texts(folder, batch_size):
    """Whatever the batch size; the first text is that of a single request."""
    harness = HarnessModel(str(folder), batch_size=batch_size, seed=3)
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 9}
    texts = harness.generate_until([instance("a text", sampled)] * 4)
    assert len(set(texts)) == 4
    assert texts[0] == harness.generate_until([instance("a text", sampled)])[0]
    assert texts == HarnessModel(str(folder), seed=3).generate_until([instance("a text", sampled)] * 4)


def test_long_contexts_are_cropped_on_the_left(folder):
    harness, (model, tokenizer) = HarnessModel(str(folder)), load_language_model_and_tokenizer(str(folder))
    [text] = harness.generate_until([instance("word " * 500, {"max_gen_toks": 8})])
    [prompt] = encode_documents(tokenizer, ["word " * 500])
    prompt = prompt[8 - 256 :]  # Of the context of 256 tokens.
    settings = {"max_new_tokens": 8, "temperature": 0.0, "num_draws": 64, "seed": 1234}
    tokens = continue_tokens(model, tokenizer, [prompt], **settings)
    assert text == decode_after(tokenizer, prompt, tokens[0].tolist())


def test_unsupported_settings_are_refused(folder):
    harness = HarnessModel(str(folder))
    with pytest.raises(InputError, match="300 new tokens leave no room"):
        harness.generate_until([instance("word", {"max_gen_toks": 300})])
    with pytest.raises(InputError, match="does not support 'num_beams'"):
        harness.generate_until([instance("word", {"num_beams": 3})])


@pytest.mark.parametrize("kind", ["llama with an end", "unigram", "byte-level"])
def test_contexts_are_read_as_in_training(kind, tmp_path, monkeypatch):
    """No EOS after a context; control tokens only from the template; the space belongs to the next word."""
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    torch.manual_seed(4)
    model = tiny_model(4, vocab_size=len(tokenizer), head_config={"head_type": "sequential"})
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    harness = HarnessModel(str(tmp_path / "model"), temperature=1.0)
    context = f"Once {tokenizer.eos_token} upon a"
    settings = {"max_new_tokens": 9, "temperature": 1.0, "seed": 1234}
    [text] = harness.generate_until([instance(context, {"do_sample": True, "max_gen_toks": 9})])
    assert [text] == continue_texts(harness._model, harness._tokenizer, [context], **settings)
    for continuation in (" time", "time", "</s>"):
        prompt, number, _, chunks = harness._read(context, continuation)
        assert [prompt] == encode_documents(tokenizer, [context])
        read = chunks.flatten()[:number].tolist()
        assert decode_after(tokenizer, prompt, read) == continuation and tokenizer.eos_token_id not in read
    messages = [{"role": "user", "content": context}]
    rendered = harness.apply_chat_template(messages)
    assert harness._encode(rendered) == encode_chat(tokenizer, messages)
    assert tokenizer.eos_token_id not in harness._read(rendered, "</s><|eos|>")[3]


def test_likelihoods_are_refused_if_the_head_has_none(folder, tmp_path):
    manager = tasks_in(tmp_path, [{"question": "q", "answer": "a", "choices": ["x", "y"]}])
    harness = HarnessModel(str(folder))
    with pytest.raises(InputError, match="asks for log-likelihoods, which this CALM does not have"):
        lm_eval.simple_evaluate(model=harness, tasks=["choices"], task_manager=manager)
    with pytest.raises(InputError, match="perplexities"):
        harness.loglikelihood_rolling([instance("text")])


def test_likelihoods_are_sums_over_tokens_and_decide_choices(folder, tmp_path, monkeypatch):
    """Against the losses of all tokens at each position; in a task, the likelier choice is taken."""
    torch.manual_seed(4)
    model = tiny_model(4, vocab_size=320, head_config={"head_type": "sequential"})
    tokenizer = load_language_model_and_tokenizer(str(folder))[1]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "sequential")
    harness = HarnessModel(str(tmp_path / "sequential"))
    context, continuation = "Once upon a", " time there was nobody in"

    def log_probabilities_after(ids, written):
        """Of each token of the vocabulary, from its loss as the next token."""
        seen = torch.tensor([ids + written[: len(written) // 4 * 4]])
        tokens, mask = align_to_chunks(seen, torch.ones_like(seen), 4, 0)
        state = model.hidden_states_of_chunks(tokens, mask.repeat_interleave(4, 1))[:, -1]
        begun = written[len(written) // 4 * 4 :]
        chunks = torch.tensor([[*begun, token, *[0] * (3 - len(begun))] for token in range(320)])
        return -model.head.token_losses(state.expand(320, -1), chunks)[:, len(begun)].detach()

    ids = tokenizer(context)["input_ids"]
    words = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    assert len(words) % 4 and len(words) > 4
    total = sum(float(log_probabilities_after(ids, words[:n])[word]) for n, word in enumerate(words))
    [(score, is_greedy)] = harness.loglikelihood([instance(context, continuation)])
    assert score == pytest.approx(total, rel=1e-5) and not is_greedy
    best: list[int] = []
    for _ in range(6):
        best.append(int(log_probabilities_after(ids, best).argmax()))

    # The best tokens are not valid UTF-8, so "best" stands for them.
    def tokens_of(text, continuation=""):
        return ids + best if continuation.endswith("best") else tokenizer(text + continuation)["input_ids"]

    with monkeypatch.context() as patch:
        patch.setattr(harness, "_encode", tokens_of)
        [(likeliest, is_greedy)] = harness.loglikelihood([instance(context, "best")])
    assert is_greedy and likeliest > score
    likelier, other = "zq!zq!", "time there was nobody in"  # It has fewer tokens.
    choices = [
        {"question": context, "answer": "", "choices": pair}
        for pair in ([likelier, other], [other, likelier])
    ]
    manager = tasks_in(tmp_path, choices)
    results = lm_eval.simple_evaluate(
        model=harness, tasks=["choices"], task_manager=manager, bootstrap_iters=0
    )
    first, second = results["samples"]["choices"]
    assert first["filtered_resps"][1][0] == second["filtered_resps"][0][0] == pytest.approx(score)
    assert first["filtered_resps"][0][0] > score
    assert (first["acc"], second["acc"]) == (1, 0)  # The task's answer is the first of the two.
    # A space belongs to the word after it.
    moved = harness.loglikelihood([instance(f"{context} ", continuation[1:])])
    assert moved == harness.loglikelihood([instance(context, continuation)])


def test_agreement_chooses_what_the_model_writes(folder, tmp_path):
    model, tokenizer = load_language_model_and_tokenizer(str(folder))
    questions = [f"Story {n} begins" for n in range(8)]
    written = continue_texts(
        model, tokenizer, questions, max_new_tokens=8, temperature=0, num_draws=200, seed=1
    )
    records = [
        {"question": q, "answer": "", "choices": [text, "zq" * 5, "!!??"]}
        for q, text in zip(questions, written, strict=True)
    ]
    manager = tasks_in(tmp_path, records)
    harness = HarnessModel(str(folder), choices="agreement", num_draws=200)
    results = lm_eval.simple_evaluate(
        model=harness, tasks=["choices"], task_manager=manager, bootstrap_iters=0
    )
    assert results["results"]["choices"]["acc,none"] >= 0.75


def test_agreement_is_the_share_of_drawn_tokens(folder):
    """Against draws of each chunk after the context and the chunks before it."""
    harness = HarnessModel(str(folder), choices="agreement", num_draws=2000)
    model, tokenizer = load_language_model_and_tokenizer(str(folder))
    context, continuation = "Once upon", " a time there"
    [(score, is_greedy)] = harness.loglikelihood([instance(context, continuation)])
    assert not is_greedy
    prompt = tokenizer(context)["input_ids"]
    ids = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    shares = []
    for start in range(0, len(ids), 4):
        seen = torch.tensor([prompt + ids[:start]])
        tokens, mask = align_to_chunks(seen, torch.ones_like(seen), 4, 0)
        hidden = model.hidden_states_of_chunks(tokens, mask.repeat_interleave(4, 1))[:, -1]
        drawn = model.draw_chunks(hidden, 2000)[:, 0]
        expected = torch.tensor(ids[start : start + 4])
        shares += (drawn[:, : len(expected)] == expected).double().mean(0).tolist()
    assert score == pytest.approx(sum(shares) / len(shares), abs=0.02)


def test_energy_score_matches_a_sum_over_pairs_of_draws():
    """And draws around the target have a better score than draws elsewhere."""
    generator = torch.Generator().manual_seed(0)
    draws, target = torch.randn(7, 3, 5, generator=generator), torch.randn(3, 5, generator=generator)
    expected = 0.0
    for chunk in range(3):
        to_target = sum(float((z[chunk] - target[chunk]).norm()) for z in draws) / 7
        pairs = [float((a[chunk] - b[chunk]).norm()) for a in draws for b in draws]
        expected += (2 * to_target - sum(pairs) / (7 * 6)) / 3
    assert float(_energy_score(draws, target)) == pytest.approx(expected, rel=1e-5)
    assert _energy_score(draws * 0.1 + target, target) < _energy_score(draws * 0.1 - target, target)


def test_energy_prefers_the_text_whose_latents_are_drawn(folder, monkeypatch):
    """With a head whose draws are close to the encoding of one continuation."""
    harness = HarnessModel(str(folder), choices="energy", num_draws=16)
    tokenizer, autoencoder = harness._tokenizer, harness._model.autoencoder
    ids = tokenizer(" a cat", add_special_tokens=False)["input_ids"]
    chunk = torch.tensor([ids + [0] * (-len(ids) % 4)])[:, :4]
    mean = autoencoder.encode(chunk).mean.detach()
    noise = torch.randn(16, 1, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        harness._model.head,
        "sample_latents",
        lambda states, *_: mean + 0.01 * noise.expand(-1, len(states), -1),
    )
    right, wrong = harness.loglikelihood([instance("One", " a cat"), instance("One", "zq")])
    assert right[0] > wrong[0]


@pytest.fixture(scope="module")
def thinker(folder, tmp_path_factory):
    """A folder with a model that was trained to think and has a likelihood."""
    folder, tokenizer = tmp_path_factory.mktemp("thinker"), load_language_model_and_tokenizer(str(folder))[1]
    thinking_model(3, vocab_size=320).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_was_trained_to_think_thinks_before_it_answers(thinker):
    harness, (model, tokenizer) = HarnessModel(str(thinker)), load_language_model_and_tokenizer(str(thinker))
    settings = {"max_new_tokens": 12, "temperature": 0.0, "num_draws": 64}
    [expected, without] = [
        continue_texts(model, tokenizer, ["Once upon"], num_thoughts=number, **settings)[0]
        for number in (3, 0)
    ]
    requested = {"until": ["zzzz"], "max_gen_toks": 12}
    assert harness.generate_until([instance("Once upon", requested)]) == [expected] != [without]
    [text] = harness.generate_until([instance("word " * 500, requested)])
    [prompt] = encode_documents(tokenizer, ["word " * 500])
    prompt = prompt[12 + 5 * 4 - 256 :]  # Three thoughts and two markers take five chunks of the context.
    tokens = continue_tokens(model, tokenizer, [prompt], num_thoughts=3, **settings)
    assert text == decode_after(tokenizer, prompt, tokens[0].tolist())


def test_likelihoods_are_those_after_the_thoughts(thinker):
    harness, (model, tokenizer) = HarnessModel(str(thinker)), load_language_model_and_tokenizer(str(thinker))
    context, continuation = "Once upon", " a time there"
    [(score, _)] = harness.loglikelihood([instance(context, continuation)])
    thoughts, size = thoughts_of(model.config), 4
    prompt = tokenizer(context)["input_ids"]
    ids = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    front = [*[0] * (-len(prompt) % size), *prompt, *thoughts.tokens(size)]
    ids_with_thoughts = torch.tensor([[*front, *ids, *[0] * (-len(ids) % size)]])
    mask = torch.ones_like(ids_with_thoughts)
    mask[:, : -len(prompt) % size] = 0
    with torch.no_grad():
        states = model(
            ids_with_thoughts.masked_fill(ids_with_thoughts == THOUGHT, 0),
            attention_mask=mask,
            is_thought=ids_with_thoughts[:, ::size] == THOUGHT,
        ).last_hidden_state
        first = len(front) // size
        chunks = split_into_chunks(ids_with_thoughts, size)[0, first:]
        losses = model.head.token_losses(states[0, first - 1 : -1], chunks).flatten()[: len(ids)]
    assert score == pytest.approx(-float(losses.sum()), rel=1e-4)


def test_bad_arguments_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="choices must be refuse, agreement or energy, got 'best'"):
        HarnessModel(str(folder), choices="best")
    with pytest.raises(InputError, match="there is no model"):
        HarnessModel(str(tmp_path))


def test_lm_eval_runs_from_the_command_line(folder, tmp_path):
    tasks_in(tmp_path, [{"question": "Once", "answer": "b", "choices": ["x", "y"]}])
    command = [sys.executable, "-m", "calm.harness", "run", "--model", "calm"]
    command += ["--include_path", str(tmp_path), "--model_args", f"pretrained={folder},num_draws=8"]
    done = subprocess.run([*command, "--tasks", "texts"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "exact_match" in done.stdout


def test_a_refusal_is_one_sentence_on_the_command_line(monkeypatch, capsys):
    def refuse():
        raise InputError("this task asks for log-likelihoods.")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refuse)
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    assert capsys.readouterr().err == "calm: error: this task asks for log-likelihoods.\n"
