"""Commands that use models: typed functions whose docstrings are their help.

torch and transformers are imported inside the commands, so that `calm --help` answers at once. Model names
are checked before these imports, so that a typo is reported within two seconds.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calm.commands.checks import (
    check_counts,
    check_draft,
    check_model_exists,
    check_sampler,
    check_thoughts,
    vocabulary_note,
)
from calm.commands.prompts import prompts_of
from calm.errors import InputError
from calm.ranges import DOCUMENT_MB, SAMPLES, SEEDS

if TYPE_CHECKING:
    from calm.data.chunking import BlockSettings

PUBLISHED_POSITIONS = 2048


def evaluate(
    model: str,
    data: list[str],
    context: int | None = None,
    layout: Literal["documents", "packed"] | None = None,
    max_blocks: int | None = None,
    ngrams: list[int] | int | None = None,
    num_draws: int = 2,
    estimator: Literal["best", "draws"] = "best",
    protocol: Literal["published"] | None = None,
    head: dict[str, Any] | None = None,
    text_field: list[str] | str = "text",
    separator: str | None = None,
    max_document_mb: int = 1000,
    seed: int = 1234,
    json: bool = False,
) -> None:
    """Score a model on held-out text: BrierLM, Brier-1 to Brier-4, reconstruction or perplexity.

    Args:
        model: Folder or hub name of a CALM or of any causal language model in transformers.
        data: A prepared folder, whose held-out part is scored, or sources, which are scored in full.
        context: Tokens per block; by default as in the model's recipe, or 1024 for a model without one. It is
            part of the protocol: scores with different contexts are not comparable.
        layout: "documents", or "packed" as in the published evaluation; by default as in the model's recipe.
        max_blocks: Maximum number of blocks to score.
        ngrams: Orders of n-gram floors to print as well, such as [3,5] (needs a prepared folder).
        num_draws: Draws per chunk, at least 2; more give smaller standard errors.
        estimator: best uses probabilities if the model has them; draws scores it from draws only.
        protocol: published is the paper's, and overrides context and layout: packed documents, blocks of
            2048 positions (8192 tokens for K = 4).
        head: Sampling settings of a CALM's head to change, such as '{"num_steps": 2}' (docs/heads.md).
        text_field: Record field that contains the text; several, such as title,text, are joined.
        separator: Line that separates the documents of a plain-text file ("" for a blank line).
        max_document_mb: Maximum length of a document or line in MB (10^6 bytes); each is read into memory.
        seed: Seed of the draws.
        json: Print the scores as one JSON object.
    """
    SEEDS.require("seed", seed)
    DOCUMENT_MB.require("max_document_mb", max_document_mb)
    check_counts(ngrams, context=context, max_blocks=max_blocks)
    check_model_exists(model)
    from calm.data.chunking import BlockSettings
    from calm.data.options import ReadingOptions
    from calm.data.prepared import held_out_data
    from calm.evaluation.held_out import score_model
    from calm.models.hyperparameters import chunk_size_of
    from calm.models.loading import load_language_model_and_tokenizer
    from calm.report.figures import as_json, values_of_scorecard
    from calm.report.tables import print_scorecard

    network, tokenizer = load_language_model_and_tokenizer(model, head)
    settings = _blocks_of(model)
    settings = replace(settings, block_size=context or settings.block_size, layout=layout or settings.layout)
    if protocol == "published":
        positions = PUBLISHED_POSITIONS * chunk_size_of(network.config)
        settings = BlockSettings(positions, "packed")
    options = ReadingOptions(text_field=text_field, separator=separator, max_document_mb=max_document_mb)
    card = score_model(
        network,
        held_out_data(data, tokenizer, options),
        settings,
        ngrams=[ngrams] if isinstance(ngrams, int) else ngrams,
        num_blocks=max_blocks,
        seed=seed,
        num_draws=num_draws,
        estimator=estimator,
    )
    if json:
        conditions = {
            "model": model,
            "layout": settings.layout,
            "seed": seed,
            "draws": num_draws,
            "estimator": estimator,
        }
        print(as_json({**conditions, **values_of_scorecard(card)}))
    else:
        print_scorecard(card)


def _blocks_of(model: str) -> "BlockSettings":
    """How a model's recipe lays out text; without a recipe that can be read, in blocks of 1024 tokens."""
    from calm.comparison.costs import blocks_of_run
    from calm.data.chunking import BlockSettings
    from calm.models.shipped import folder_of

    try:
        return blocks_of_run(Path(folder_of(model)), 1024)
    except InputError:  # A recipe of another version.
        return BlockSettings(1024)


def generate(
    model: str,
    prompt: list[str] = [],  # noqa: B006 (it is not changed)
    file: str | None = None,
    samples: int = 1,
    max_new_tokens: int | None = None,
    temperature: float = 0.5,
    sampler: str | None = None,
    num_draws: int = 200,
    max_draws: int = 200,
    top_p: float = 1.0,
    min_p: float = 0.0,
    num_thoughts: int | None = None,
    head: dict[str, Any] | None = None,
    seed: int | None = None,
    draft: str | None = None,
    draft_chunks: int | None = None,
    stream: bool = False,
    crop: bool = False,
    json: bool = False,
) -> None:
    """Continue prompts.

    Args:
        model: Folder or hub name of a CALM or of any causal language model in transformers.
        prompt: Texts to continue; several are generated as one batch.
        file: File with more prompts, one per line; in a .jsonl file, each line is a string, or an object with
            a "prompt"; - reads lines from standard input.
        samples: Continuations per prompt.
        max_new_tokens: Maximum tokens of a continuation; by default 128, or fewer if the context ends first.
        temperature: From 0 to 1; lower is more fluent and less varied; 0 takes the most frequent chunk of a
            pool, or decodes greedily if the head can.
        sampler: exact follows the tempered distribution as long as max_draws suffice; pool approximates it;
            head is one draw from a head that takes a temperature itself; or the name of an installed sampler.
            By default pool with top_p or min_p, else head if possible, else exact.
        num_draws: Pool size of the pool sampler, and of the exact one at temperature 0.
        max_draws: Maximum draws per chunk of the exact sampler.
        top_p: Pool only: keep the most frequent chunks that make up this share of the pool.
        min_p: Pool only: drop chunks with less than this share of the most frequent chunk's draws.
        num_thoughts: Thoughts after each prompt, which are not shown; by default as many as the model was
            trained with; 0 for none.
        head: Sampling settings of a CALM's head to change, such as '{"num_steps": 2}' (docs/heads.md).
        seed: Makes the text reproducible.
        draft: Folder or hub name of a CALM to use as draft model for another model: the same distribution,
            and at temperature 0 the same text, in fewer steps (docs/drafting.md).
        draft_chunks: Chunks per draft; 1 by default.
        stream: Print the text as it is generated, one prompt after another.
        crop: Keep the end of a prompt that is too long for the context; without this, it is an error.
        json: Print one JSON object: model, temperature, seed, and the prompt and text of each sample.
    """
    if seed is not None:
        SEEDS.require("seed", seed)
    SAMPLES.require("samples", samples)
    if stream and (json or samples > 1):
        raise InputError(
            f"--stream prints one text at a time; leave out {'--json' if json else '--samples'}."
        )
    check_sampler(sampler)
    check_thoughts(num_thoughts=num_thoughts)
    check_draft(draft, draft_chunks)
    prompts = prompts_of(prompt, file)
    check_model_exists(model)
    if draft is not None:
        check_model_exists(draft)
    from calm.models.drafting.loading import load_draft
    from calm.models.loading import load_language_model_and_tokenizer
    from calm.report.figures import as_json
    from calm.texts import continue_texts

    network, tokenizer = load_language_model_and_tokenizer(model, head)
    drafts: dict[str, Any] = {} if draft is None else {"draft": load_draft(draft, network, tokenizer)}
    if draft_chunks is not None:
        drafts["draft_chunks"] = draft_chunks
    continuations = continue_texts(
        network,
        tokenizer,
        prompts,
        num_return_sequences=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        sampler=sampler,
        num_draws=num_draws,
        max_draws=max_draws,
        top_p=top_p,
        min_p=min_p,
        num_thoughts=num_thoughts,
        seed=seed,
        stream=stream,
        crop=crop,
        **drafts,
    )
    repeated = [text for text in prompts for _ in range(samples)]
    generated = list(zip(repeated, continuations, strict=True))
    if json:
        records = [{"prompt": prompt, "text": text} for prompt, text in generated]
        print(as_json({"model": model, "temperature": temperature, "seed": seed, "samples": records}))
    elif not stream:
        print("\n\n".join(prompt + text for prompt, text in generated))


def flops(
    target: str,
    draws: float | None = None,
    positions: int = 2048,
    thoughts: int | None = None,
    vocab_size: int | None = None,
    published: bool = False,
    head: dict[str, Any] | None = None,
    json: bool = False,
) -> None:
    """Count parameters, training FLOPs and the true cost of a token, by part.

    Args:
        target: Model folder, GGUF file, name of a shipped model, or a recipe (shipped name or .yaml file).
        draws: Draws per chunk at low temperature: the pool size, or the mean number of draws of the exact
            sampler (generate counts them). By default 200, or 1 for a head that takes a temperature itself.
        positions: Positions of the context that attention sees.
        thoughts: Also show what this many thoughts add to an answer; by default as many as the model was
            trained with.
        vocab_size: Vocabulary size to count, for a recipe whose tokenizer is not available here or not named
            yet; by default its tokenizer's, or data.vocab_size if it names none.
        published: Count the head's work on the hidden state for every draw, as the paper does.
        head: Sampling settings of a CALM's head to change, such as '{"num_steps": 2}' (docs/heads.md).
        json: Print the numbers as one JSON object.
    """
    check_thoughts(thoughts=thoughts)
    from calm.flops import Work, cost_of, cost_of_thoughts, teaching_flops
    from calm.hub.gguf import is_gguf
    from calm.models.hyperparameters import chunk_size_of
    from calm.models.loading import change_head, config_of, load_config
    from calm.models.missing import nearby_models_hint
    from calm.models.shipped import folder_of
    from calm.models.thoughts import thoughts_of
    from calm.report.figures import as_json, values_of_costs
    from calm.report.tables import print_costs
    from calm.training.build import model_config
    from calm.training.continuing import with_inherited_parts
    from calm.training.recipe_files import read_recipe
    from calm.training.recipe_settings import find_recipe
    from calm.training.teacher import teacher_config

    folder = Path(folder_of(target))
    teacher, note = None, None
    if folder.is_dir():
        config = load_config(folder)
    elif is_gguf(target):
        config = config_of(target)
    else:
        try:
            find_recipe(target)
        except InputError as error:
            raise InputError(str(error).rstrip(".?") + nearby_models_hint(target)) from error
        recipe = with_inherited_parts(read_recipe(target))
        config, teacher = model_config(recipe, vocab_size), teacher_config(recipe)
        note = vocabulary_note(recipe, vocab_size)
    if head:
        change_head(config, head)
    size, is_calm = chunk_size_of(config), config.model_type == "calm"
    if draws is None:
        draws = 200 if is_calm and config.head.lowest_temperature == 1 else 1
    cost = cost_of(config, Work(positions, condition_per_draw=published))
    if teacher is not None:
        cost.training["teacher"] = teaching_flops(teacher, positions * size)
    cost_with_draws = cost_of(config, Work(positions, draws, published)) if is_calm and draws != 1 else None
    if thoughts is None and (trained := thoughts_of(config)) is not None:
        thoughts = trained.number
    thinking = cost_of_thoughts(config, thoughts, positions) if thoughts else None
    if json:
        sizes = {"chunk_size": size, "vocab_size": config.vocab_size, "positions": positions}
        print(as_json({**sizes, **values_of_costs(cost, cost_with_draws, draws, thinking)}))
    else:
        title = f"FLOPs per token; K = {size}, {config.vocab_size:,} token ids, {positions:,} positions"
        title += f" ({positions * size:,} tokens)" if size > 1 else ""
        print_costs(title if note is None else f"{title}\n{note}", cost, cost_with_draws, draws, thinking)


def compile_steps(
    model: str,
    rows: Literal["one", "many", "all"] = "all",
    temperature: float = 1.0,
    json: bool = False,
) -> None:
    """Compile a CALM's generation steps for this processor; they are used from then on.

    The text stays the same. Takes about a minute, needs a C++ compiler, and keeps the result, which contains
    the weights, in CALM_CACHE or the user's cache (docs/guides/compile.md).

    Args:
        model: Folder or hub name of a CALM.
        rows: one for a single text at a time, many for batches, or all for both.
        temperature: Temperature of draws from a head that takes one itself; all samplers of other heads draw
            at 1.
        json: Print the folder and the speeds as one JSON object.

    Examples:
        calm compile stories
        calm compile runs/a --rows one
    """
    check_model_exists(model)
    from dataclasses import asdict

    from calm.compiling import MANY, compile_model
    from calm.models.loading import load_language_model_and_tokenizer
    from calm.progress import announce
    from calm.report.figures import as_json

    network, _ = load_language_model_and_tokenizer(model)
    batch_sizes = {"one": [1], "many": [MANY], "all": [1, MANY]}[rows]
    folder, speeds = compile_model(
        network, batch_sizes, [temperature], lambda name: announce(f"compile: {name} (ten to thirty seconds)")
    )
    if json:
        print(as_json({"model": model, "folder": str(folder), "tokens_per_second": [*map(asdict, speeds)]}))
        return
    for speed in speeds:
        print(
            f"{speed.rows} text{'s' * (speed.rows > 1)} at once: {speed.compiled:,.0f} tokens/s compiled, "
            f"{speed.eager:,.0f} before"
        )
    print(f"saved in {folder}")


def doctor(json: bool = False) -> None:
    """Show which hardware, dtype and attention would be used here, and why.

    Args:
        json: Print it as one JSON object.
    """
    from calm.doctor import examine
    from calm.report.figures import as_json

    groups = examine()
    if json:
        print(as_json(groups))
    else:
        parts = ["\n".join(f"{name:<12} {text}" for name, text in group.items()) for group in groups.values()]
        print("\n\n".join(parts))
