"""`calm generate` with a tokenizer that puts spaces before words and EOS after texts."""

import pytest
import torch
from other_tokenizers import KINDS
from tiny import tiny_model

from calm.cli import main
from calm.text.decoding import decode_after
from calm.text.encoding import encode_documents


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder, and the model and tokenizer in it."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "small"
    tokenizer = KINDS["llama with an end"]()
    model = tiny_model(4, vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


PROMPT = "A good morning, a"
SETTINGS = ["--seed", "3", "--temperature", "1.0", "--max_new_tokens", "12"]


def test_the_continuation_follows_its_prompt(saved, capsys):
    folder, model, tokenizer = saved
    main(["generate", str(folder), PROMPT, *SETTINGS])
    written = capsys.readouterr().out
    [ids] = encode_documents(tokenizer, [PROMPT])
    out = model.generate(torch.tensor([ids]), seed=3, temperature=1.0, max_new_tokens=12)
    assert written == PROMPT + decode_after(tokenizer, ids, out[0, len(ids) :].tolist()) + "\n"
    main(["generate", str(folder), PROMPT, *SETTINGS, "--stream"])
    assert capsys.readouterr().out == written


def test_a_long_prompt_is_refused_or_cropped_with_a_message(saved, capsys):
    folder, _, _ = saved
    prompt = "one two three four " * 100
    with pytest.raises(SystemExit):
        main(["generate", str(folder), prompt, *SETTINGS])
    refused = capsys.readouterr()
    assert "more than the context of 256; shorten the prompt" in refused.err and not refused.out
    with pytest.raises(SystemExit):
        main(["generate", str(folder), prompt, *SETTINGS, "--stream"])
    assert not capsys.readouterr().out
    main(["generate", str(folder), prompt, *SETTINGS, "--crop"])
    cropped = capsys.readouterr()
    assert cropped.out.startswith(prompt)
    assert "calm: 1 of 1 prompts cropped from the left to their last 244 tokens" in cropped.err
