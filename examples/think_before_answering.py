"""Where does a path of three steps end? A model that thinks three times finds out; one that pauses does not.

    python examples/think_before_answering.py thinking

Two models of chunks of four tokens, 0.2 million parameters each, learn from the same questions, steps and
labels in a minute each. One reads its own last state between question and answer, the other the same token
three times.
"""

import argparse
from pathlib import Path

from transformers import set_seed

from calm import CalmAutoencoder, CalmForCausalLM, FinetuningRecipe, finetune, train_tokenizer
from calm.data.tasks import write_items
from calm.storage.disk import read_json_lines
from calm.training.build import autoencoder_config, language_model_config, special_tokens_of
from calm.training.finetuning_recipe import AnswerSettings, ExampleSettings, ThoughtSettings
from calm.training.recipe import (
    AutoencoderSettings,
    LanguageModelSettings,
    OptimizerSettings,
    Recipe,
    TrainingSettings,
)

HOPS, ASKED = 3, 100


def new_model(folder: Path) -> None:
    """Write questions, and a model that knows nothing."""
    write_items(folder / "path.jsonl", "path", HOPS, seed=0, number=8000, held_out=False)
    write_items(folder / "held_out.jsonl", "path", HOPS, seed=0, number=ASKED, held_out=True)
    records = read_json_lines(folder / "path.jsonl")[:500]
    tokenizer = train_tokenizer((" ".join([one["prompt"], *one["steps"]]) for one in records), 330)
    recipe = Recipe(
        language_model=LanguageModelSettings(
            hidden_size=64,
            intermediate_size=160,
            num_layers=2,
            num_heads=4,
            embedding_initializer_range=0.5,
            head={"head_type": "sequential", "rank": 64},
        ),
        autoencoder=AutoencoderSettings(kind="codes", latent_size=64),
    )
    set_seed(1)
    special = special_tokens_of(tokenizer)
    autoencoder = CalmAutoencoder(autoencoder_config(recipe, len(tokenizer), special))
    model = CalmForCausalLM(language_model_config(recipe, autoencoder.config, special))
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    model.save_pretrained(folder / "new")
    tokenizer.save_pretrained(folder / "new")


def share_of_right_answers(folder: Path, mode: str) -> float:
    """Train the model with thoughts ("state") or pauses ("pause") in the place of all steps, and ask it."""
    recipe = FinetuningRecipe(
        seed=2,
        model=str(folder / "new"),
        examples=ExampleSettings(
            sources=str(folder / "path.jsonl"), validation_sources=str(folder / "held_out.jsonl"), context=96
        ),
        thoughts=ThoughtSettings(mode=mode, stages=HOPS, first_stage=HOPS, supervised=True),  # type: ignore[arg-type]
        training=TrainingSettings(
            steps=450,
            batch_tokens=64 * 96,
            evaluate_every=0,
            save_every=0,
            optimizer=OptimizerSettings(
                name="muon", learning_rate=2e-2, adamw_learning_rate=5e-3, warmup_steps=50, schedule="linear"
            ),
        ),
        answers=AnswerSettings(number=ASKED),
    )
    finetune(recipe, folder / mode)
    answers = read_json_lines(folder / mode / "answers.jsonl")
    right: int = sum(one["after"].split() == one["completion"].split() for one in answers)
    return right / ASKED


def main() -> None:
    """Train both and print what they get right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder to write")
    folder = parser.parse_args().output
    folder.mkdir(parents=True)
    new_model(folder)
    for mode, words in (("state", "thoughts"), ("pause", "pauses")):
        print(f"with {words}: {share_of_right_answers(folder, mode):.0%} right, by chance 25%")


if __name__ == "__main__":
    main()
