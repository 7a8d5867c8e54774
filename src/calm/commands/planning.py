"""`calm plan`. torch and transformers are imported inside the function."""

from typing import Any

from calm.commands.checks import vocabulary_note
from calm.ranges import Range

_SHARE = Range(0, 1, includes_low=False)
_LINKS = Range(0, 10**9, includes_low=False)
_VOCABULARIES = Range(1, 10**7)


def plan(
    target: str,
    devices: str,
    memory: float | None = None,
    flops: float | None = None,
    bandwidth: float | None = None,
    watts: float | None = None,
    utilisation: float = 0.4,
    link: float = 50,
    vocab_size: int | None = None,
    settings: dict[str, Any] | None = None,
    json: bool = False,
) -> None:
    """Predict whether a run fits, how long it takes and what bounds it: memory, time, energy, serving.

    Args:
        target: A recipe of train or finetune (shipped name or .yaml file).
        devices: Devices, such as 8xH100; or a count, such as 4, with their numbers in the next four options.
        memory: Memory per device in GiB.
        flops: Dense matrix products per device in TFLOP/s, in the recipe's precision.
        bandwidth: Memory bandwidth per device in GB/s.
        watts: Power per device in W.
        utilisation: Share of these FLOP/s that training reaches. An assumption: measure it (a run logs it).
        link: GB/s that each device sends to others. An assumption: 50 is one 400 Gbit/s port per device.
        vocab_size: Vocabulary size, for a recipe whose tokenizer is not available here.
        settings: Recipe settings to change, such as '{"language_model.sharded": true}'.
        json: Print the numbers as one JSON object, in bytes, seconds, tokens and FLOPs.
    """
    from calm.planning.devices import CardFigures, devices_of

    cards = devices_of(devices, CardFigures(memory, flops, bandwidth, watts))
    _SHARE.require("utilisation", utilisation)
    _LINKS.require("link", link)
    if vocab_size is not None:
        _VOCABULARIES.require("vocab_size", vocab_size)
    from calm.planning.pace import SpeedAssumptions
    from calm.planning.plan import make_plan
    from calm.planning.tables import print_plan
    from calm.report.figures import as_json
    from calm.training.finetuning_recipe import FinetuningRecipe
    from calm.training.recipe import Recipe
    from calm.training.recipe_files import read_recipe_of, with_settings
    from calm.training.recipe_settings import kind_of_recipe

    recipe: Recipe | FinetuningRecipe = read_recipe_of(kind_of_recipe(target), target)
    if settings:
        recipe = with_settings(recipe, settings)
    planned = make_plan(recipe, cards, SpeedAssumptions(utilisation, link * 1e9), vocab_size)
    if json:
        print(as_json({"recipe": target, **planned.as_figures()}))
        return
    print_plan(planned)
    if (note := vocabulary_note(recipe, vocab_size)) is not None:
        print(note)
