"""The verbs of the command line, each a typed function whose docstring is its help.

Imports of torch and transformers happen inside the verbs, so that `calm --help` answers at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from calm.errors import InputError
from calm.training.recipe import Recipe

PUBLISHED_POSITIONS = 2048


def demo(output: str = "runs/demo", overwrite: bool = False, recipe: str = "demo") -> None:
    """Train on the embedded stories, score the model, and let it write.

    Args:
        output: Folder of the run.
        overwrite: Remove what is in that folder first.
        recipe: Recipe to follow.
    """
    from calm.demo import run_demo

    run_demo(Path(output), recipe_name=recipe, overwrite=overwrite)


def prepare(
    sources: list[str],
    output: str,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    text_field: str = "text",
    separator: str | None = None,
    validation: list[str] | str | None = None,
    validation_fraction: float = 0.02,
    seed: int = 0,
    num_proc: int | None = None,
    overwrite: bool = False,
) -> None:
    """Turn text into a prepared folder: tokenizer, tokenized training and held-out documents.

    Args:
        sources: Files (.txt, .jsonl, .parquet; plain, .gz, .xz, .zst, .bz2), folders, or hub datasets.
        output: Folder to write.
        tokenizer: Folder, tokenizer.json or hub name; none trains a byte-level BPE on the text.
        vocab_size: Size of a trained vocabulary.
        text_field: Field of the text in .jsonl, .parquet and hub datasets.
        separator: Line that parts the documents of a .txt file ("" for a blank line).
        validation: Sources of held-out text; none holds out a part of the sources.
        validation_fraction: Share of documents held out.
        seed: Changes which documents are held out.
        num_proc: Processes; none takes all cores.
        overwrite: Replace the output folder.
    """
    from calm.data.prepare import prepare as run
    from calm.data.sources import ReadingOptions

    data = run(
        sources,
        Path(output),
        options=ReadingOptions(text_field=text_field, separator=separator),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation_sources=[validation] if isinstance(validation, str) else validation or [],
        validation_fraction=validation_fraction,
        seed=seed,
        num_proc=num_proc,
        overwrite=overwrite,
    )
    print(
        f"{output}: {len(data.train)} training and {len(data.validation)} held-out documents, "
        f"{data.vocab_size} token ids"
    )


def train(recipe: Recipe, output: str, resume: bool = False, overwrite: bool = False) -> None:
    """Follow a recipe: prepare the text, train the autoencoder, then the language model.

    Args:
        recipe: The recipe.
        output: Folder of the run.
        resume: Go on with the run in that folder.
        overwrite: Remove what is in that folder first.
    """
    from calm.training.processes import processes
    from calm.training.stages import train as run

    model = run(recipe, Path(output), resume=resume, overwrite=overwrite)
    if processes().is_main_process:
        print(f"model: {model}")


def evaluate(
    model: str,
    data: list[str],
    context: int = 1024,
    layout: Literal["documents", "packed"] = "documents",
    max_blocks: int | None = None,
    ngrams: list[int] | int | None = None,
    num_draws: int = 2,
    estimator: Literal["best", "draws"] = "best",
    protocol: Literal["published"] | None = None,
    head: dict[str, Any] | None = None,
    text_field: str = "text",
    separator: str | None = None,
    seed: int = 1234,
) -> None:
    """Score a model on held-out text: BrierLM, Brier-1 to Brier-4, reconstruction or perplexity.

    Args:
        model: Folder or hub name of a CALM or of any causal language model of transformers.
        data: A prepared folder (its held-out part is scored), or sources that are scored whole.
        context: Tokens per block; part of the protocol, scores of other contexts do not compare.
        layout: "documents", or "packed" as in the published evaluation.
        max_blocks: Score this many blocks at most.
        ngrams: Orders of n-gram floors to print beside, such as [3,5] (needs a prepared folder).
        num_draws: Draws of each chunk, at least 2; more give smaller errors.
        estimator: best uses probabilities where a model has them; draws scores it as a CALM is scored.
        protocol: published is the paper's, whatever context and layout say: packed documents, blocks of
            2048 positions (8192 tokens for K = 4).
        head: Draw from the head of a CALM in another way, such as '{"num_steps": 2}' (docs/heads.md).
        text_field: Field of the text in .jsonl, .parquet and hub datasets.
        separator: Line that parts the documents of a .txt file ("" for a blank line).
        seed: Seed of the draws.
    """
    from calm.data.prepare import held_out_data
    from calm.data.sources import ReadingOptions
    from calm.evaluation.held_out import score_model
    from calm.models.loading import load_language_model_and_tokenizer
    from calm.report.tables import print_scorecard

    network, tokenizer = load_language_model_and_tokenizer(model, head)
    if protocol == "published":
        context, layout = PUBLISHED_POSITIONS * getattr(network.config, "chunk_size", 1), "packed"
    options = ReadingOptions(text_field=text_field, separator=separator)
    print_scorecard(
        score_model(
            network,
            held_out_data(data, tokenizer, options),
            context=context,
            layout=layout,
            ngrams=[ngrams] if isinstance(ngrams, int) else ngrams,
            num_blocks=max_blocks,
            seed=seed,
            num_draws=num_draws,
            estimator=estimator,
        )
    )


def compare(
    runs: list[str] | None = None,
    output: str = "runs/compare",
    recipe: str | None = None,
    chunk_sizes: list[int] | None = None,
    no_baseline: bool = False,
    budget: float = 1.0,
    data: str | None = None,
    context: int | None = None,
    max_blocks: int | None = None,
    temperature: float = 0.5,
    overwrite: bool = False,
) -> None:
    """Score models on the same text, and set quality against cost: a table and an HTML report.

    Args:
        runs: Folders of runs, or model folders, to compare.
        output: Folder of report.html and report.json, and of the runs that are trained here.
        recipe: Train this recipe first, at several chunk sizes with equal operations.
        chunk_sizes: Those chunk sizes; 1, 2, 4 and 8 if none are given.
        no_baseline: Train no autoregressive model beside them.
        budget: Share of the recipe's operations that each of them gets.
        data: Prepared folder whose held-out part is scored; that of the first run if none is given.
        context: Tokens per block; that of the recipe, or 512.
        max_blocks: Score this many blocks at most.
        temperature: Low temperature of the texts and of the cost that is shown.
        overwrite: Replace a report that is there. Runs are never replaced; unfinished ones go on.
    """
    from calm.comparison.ladder import train_ladder
    from calm.comparison.measures import Measures, compare
    from calm.data.folders import check_file
    from calm.report.comparison import print_comparison, write_comparison
    from calm.report.pages import new_figure
    from calm.training.recipe_files import read_recipe

    folders = [Path(run) for run in runs or []]
    report = Path(output) / "report.html"
    for file in (report, report.with_suffix(".json")):
        check_file(file, overwrite)
    new_figure(1, 1)  # Fails now, not after hours, where matplotlib is missing.
    Measures(low=temperature)
    if recipe is not None:
        ladder = read_recipe(recipe)
        context = context or ladder.data.context
        sizes = [1, 2, 4, 8] if chunk_sizes is None else chunk_sizes
        folders += train_ladder(ladder, sizes, Path(output), baseline=not no_baseline, budget=budget)
    elif not folders:
        raise InputError("name runs to compare, or a --recipe to train.")
    measures = Measures(context=context or 512, num_blocks=max_blocks, low=temperature)
    comparison = compare(folders, Path(data) if data else None, measures)
    report.parent.mkdir(parents=True, exist_ok=True)
    print_comparison(comparison)
    write_comparison(comparison, report)
    print(f"report: {report}")


def ablate(
    question: str,
    output: str = "runs/ablation",
    recipe: str = "demo",
    seeds: list[int] | None = None,
    only: list[str] | None = None,
    max_blocks: int | None = None,
) -> None:
    """Train a recipe with each of several settings, over several seeds, and write the table.

    Args:
        question: Shipped name or .yaml file of an ablation: a question, and the settings that answer it.
        output: Folder of the runs and their table. Finished runs are kept, stopped ones go on.
        recipe: What is common to all runs; one that names no text takes the embedded stories.
        seeds: Seeds of the runs, such as [1,2,3]; 1 and 2 if none are given.
        only: Names of the settings that are compared; all if none are given.
        max_blocks: Score this many held-out blocks at most.
    """
    from calm.comparison.ablation import read_ablation, run_ablation
    from calm.report.ablation import print_ablation, write_ablation
    from calm.training.recipe_files import read_recipe

    folder = Path(output) / Path(question).stem
    table = run_ablation(
        read_ablation(question),
        read_recipe(recipe),
        seeds or [1, 2],
        folder,
        only=only or [],
        num_blocks=max_blocks,
    )
    print_ablation(table)
    write_ablation(table, folder / "ablation.md")
    print(f"table: {folder / 'ablation.md'}")


def generate(
    model: str,
    prompt: list[str],
    max_new_tokens: int = 128,
    temperature: float = 0.5,
    sampler: Literal["exact", "pool"] = "exact",
    num_draws: int = 200,
    max_draws: int = 200,
    top_p: float = 1.0,
    min_p: float = 0.0,
    head: dict[str, Any] | None = None,
    seed: int | None = None,
    stream: bool = False,
) -> None:
    """Continue prompts.

    Args:
        model: Folder or hub name of a CALM or of any causal language model of transformers.
        prompt: Text to continue; more than one are written as a batch.
        max_new_tokens: Most tokens of a continuation.
        temperature: From 0 to 1; lower is more fluent and less varied, 0 the commonest chunk of a pool.
        sampler: exact follows the tempered law wherever max_draws suffice; pool approximates it.
        num_draws: Pool of draws of the pool sampler, and of both at temperature 0.
        max_draws: Most draws a chunk of the exact sampler.
        top_p: Pool only: keep the commonest chunks that make up this share of the pool.
        min_p: Pool only: drop chunks less frequent than this share of the commonest.
        head: Draw from the head of a CALM in another way, such as '{"num_steps": 2}' (docs/heads.md).
        seed: Makes the text repeatable.
        stream: Print the text as it is written.
    """
    from calm.generation import continue_texts
    from calm.models.loading import load_language_model_and_tokenizer

    if stream and len(prompt) > 1:
        raise InputError("--stream takes one prompt at a time.")
    network, tokenizer = load_language_model_and_tokenizer(model, head)
    if stream:
        print(prompt[0], end="", flush=True)
    texts = continue_texts(
        network,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        sampler=sampler,
        num_draws=num_draws,
        max_draws=max_draws,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stream=stream,
    )
    if not stream:
        print("\n\n".join(start + text for start, text in zip(prompt, texts, strict=True)))


def import_published(
    autoencoder: str, model: str, out: str, tokenizer: str | None = None, overwrite: bool = False
) -> None:
    """Turn a released checkpoint into a model folder.

    Args:
        autoencoder: Folder of the released autoencoder.
        model: Folder of the released language model.
        out: Folder to write.
        tokenizer: Folder, tokenizer.json or hub name of its tokenizer, to put inside.
        overwrite: Replace the output folder.
    """
    from calm.data.folders import written_whole
    from calm.data.tokenizer import load_tokenizer
    from calm.models.published import load_published

    with written_whole(Path(out), overwrite) as folder:
        network = load_published(Path(autoencoder), Path(model))
        if tokenizer is not None:
            tokens = load_tokenizer(tokenizer)
            if len(tokens) > network.config.vocab_size:
                raise InputError(
                    f"the tokenizer '{tokenizer}' has {len(tokens)} tokens, more than the model's "
                    f"{network.config.vocab_size}; give the tokenizer that the model was trained with."
                )
            tokens.save_pretrained(folder)
        network.save_pretrained(folder)
    parameters = sum(p.numel() for p in network.parameters())
    head, size = network.config.head.head_type, network.config.chunk_size
    print(f"{out}: {head} head, K = {size}, {parameters:,} parameters")


def flops(
    target: str,
    draws: float = 200,
    positions: int = 2048,
    vocab_size: int | None = None,
    published: bool = False,
    head: dict[str, Any] | None = None,
) -> None:
    """Count parameters, training operations and the true cost of a token, by part.

    Args:
        target: Model folder, or a recipe (shipped name or .yaml file).
        draws: Draws of a chunk at low temperature: the size of the pool, or the mean of what the exact
            sampler makes (generate counts them).
        positions: Positions of the context that attention sees.
        vocab_size: Token ids of a recipe whose tokenizer is not here.
        published: Count the head's work on the hidden state with every draw, as the paper does.
        head: Draw from the head of a CALM in another way, such as '{"num_steps": 2}' (docs/heads.md).
    """
    from calm.flops import Work, cost_of
    from calm.models.loading import change_head, load_config
    from calm.report.tables import print_costs
    from calm.training.configurations import model_config
    from calm.training.recipe_files import read_recipe

    if Path(target).is_dir():
        config = load_config(Path(target))
    else:
        config = model_config(read_recipe(target), vocab_size)
    if head:
        change_head(config, head)
    size = getattr(config, "chunk_size", 1)
    print_costs(
        f"operations per token; K = {size}, {config.vocab_size:,} token ids, {positions:,} positions",
        cost_of(config, Work(positions, condition_per_draw=published)),
        cost_of(config, Work(positions, draws, published)) if config.model_type == "calm" else None,
        draws,
    )


def doctor() -> None:
    """Tell which hardware, dtype and attention would be used here, and why."""
    from calm.doctor import examine

    for line in examine():
        print(line)


VERBS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "prepare": prepare,
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "ablate": ablate,
    "generate": generate,
    "import": import_published,
    "flops": flops,
    "doctor": doctor,
}
