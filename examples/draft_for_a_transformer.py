"""The CALM of the package writes ahead for a Transformer, whose texts stay the same and come in fewer passes.

    python examples/draft_for_a_transformer.py runs/drafting

The Transformer is trained here on the embedded stories, with the tokens of the CALM `stories`, in a minute.
With one of your own, leave that out, and train a draft for it (docs/drafting.md).
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from calm import load_language_model_and_tokenizer, read_recipe, train, with_settings
from calm.data.stories import write_stories
from calm.models.drafting.generate import Drafting
from calm.models.drafting.loading import load_draft
from calm.models.shipped import folder_of
from calm.text.encoding import encode_documents

PROMPT, NEW_TOKENS = "Once upon a time", 120


def trained_transformer(folder: Path, stories: int, steps: int) -> Path:
    """A Llama of tokens that has read some stories."""
    run = folder / "transformer"
    if not (run / "model/config.json").exists():
        write_stories(folder / "stories.jsonl", 0, stories)
        settings: dict[str, Any] = {
            "data.sources": str(folder / "stories.jsonl"),
            "data.tokenizer": str(folder_of("stories")),
            "language_model.training.steps": steps,
            "language_model.training.batch_tokens": 2048,
            "language_model.training.evaluate_every": steps,
        }
        train(with_settings(read_recipe("demo_baseline"), settings), run)
    return run / "model"


def main() -> None:
    """Write the same text with and without a draft."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--stories", type=int, default=3000, help="what the Transformer learns from")
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args()

    folder = trained_transformer(arguments.output, arguments.stories, arguments.steps)
    loaded: Any = load_language_model_and_tokenizer(str(folder))
    model, tokenizer = loaded
    drafting = Drafting(load_draft("stories", model, tokenizer))
    prompt_1T = torch.tensor(encode_documents(tokenizer, [PROMPT]), device=model.device)
    for temperature in (0.0, 1.0):
        how: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None}
        how |= {"do_sample": True, "top_k": 0} if temperature else {"do_sample": False}
        torch.manual_seed(1)
        begun = time.perf_counter()
        alone_1T = model.generate(prompt_1T, **how)
        between = time.perf_counter()
        drafted = model.generate(prompt_1T, custom_generate=drafting, return_dict_in_generate=True, **how)
        seconds = time.perf_counter() - between
        print(
            f"T = {temperature:g}: {drafted.num_rounds} passes instead of {NEW_TOKENS}, "
            f"{seconds:.2f} s instead of {between - begun:.2f}; "
            f"{drafted.num_accepted} of {drafted.num_drafted} drafted tokens stayed"
        )
        if temperature == 0:
            same = drafted.sequences.tolist() == alone_1T.tolist()
            print("the text is the same" if same else "the text differs by rounding")
    print(tokenizer.decode(drafted.sequences[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
