"""The commands that use models: each a typed function whose docstring is its help.

Imports of torch and transformers happen inside the commands, so that `calm --help` answers at once. Names of
models are looked at before them: a mistyped one is answered in two seconds.
"""

from pathlib import Path
from typing import Any, Literal

from calm.errors import InputError
from calm.ranges import BLOCKS, DOCUMENT_MB, ORDERS, SEEDS
from calm.terminal import as_text

PUBLISHED_POSITIONS = 2048


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
    max_document_mb: int = 1000,
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
        max_document_mb: Longest document or line in MB (10^6 bytes): they are read into memory whole.
        seed: Seed of the draws.
    """
    SEEDS.require("seed", seed)
    DOCUMENT_MB.require("max_document_mb", max_document_mb)
    _check_counts(ngrams, context=context, max_blocks=max_blocks)
    _look_for(model)
    from calm.data.prepared import held_out_data
    from calm.data.reading import ReadingOptions
    from calm.evaluation.held_out import score_model
    from calm.models.loading import load_language_model_and_tokenizer
    from calm.report.tables import print_scorecard

    network, tokenizer = load_language_model_and_tokenizer(model, head)
    if protocol == "published":
        context, layout = PUBLISHED_POSITIONS * getattr(network.config, "chunk_size", 1), "packed"
    options = ReadingOptions(text_field=text_field, separator=separator, max_document_mb=max_document_mb)
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


def generate(
    model: str,
    prompt: list[str],
    max_new_tokens: int | None = None,
    temperature: float = 0.5,
    sampler: str | None = None,
    num_draws: int = 200,
    max_draws: int = 200,
    top_p: float = 1.0,
    min_p: float = 0.0,
    head: dict[str, Any] | None = None,
    seed: int | None = None,
    stream: bool = False,
    crop: bool = False,
) -> None:
    """Continue prompts.

    Args:
        model: Folder or hub name of a CALM or of any causal language model of transformers.
        prompt: Text to continue; more than one are written as a batch.
        max_new_tokens: Most tokens of a continuation; 128, or as many as fit, if none is given.
        temperature: From 0 to 1; lower is more fluent and less varied; 0 is the most frequent chunk of a
            pool, or greedy decoding where a head can.
        sampler: exact follows the tempered distribution wherever max_draws suffice; pool approximates it;
            head is one draw of a head that takes a temperature itself; or the name of an installed one. None
            for pool with top_p or min_p, else head where there is one, else exact.
        num_draws: Pool of draws of the pool sampler, and of the exact one at temperature 0.
        max_draws: Most draws a chunk of the exact sampler.
        top_p: Pool only: keep the most frequent chunks that make up this share of the pool.
        min_p: Pool only: drop chunks less frequent than this share of the most frequent.
        head: Draw from the head of a CALM in another way, such as '{"num_steps": 2}' (docs/heads.md).
        seed: Makes the text repeatable.
        stream: Print the text as it is written.
        crop: Keep the end of a prompt that is too long for the context; without it that is an error.
    """
    if seed is not None:
        SEEDS.require("seed", seed)
    if stream and len(prompt) > 1:
        raise InputError("--stream takes one prompt at a time.")
    if sampler not in (None, "exact", "pool", "head"):
        from calm.models.writing.sampler_registry import check_name

        check_name(sampler)
    prompt = [as_text(text) for text in prompt]
    _look_for(model)
    from calm.models.loading import load_language_model_and_tokenizer
    from calm.texts import continue_texts

    network, tokenizer = load_language_model_and_tokenizer(model, head)
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
        crop=crop,
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
    from calm.data.tokenizer import load_tokenizer
    from calm.models.published import load_published
    from calm.storage.folders import check_spared, written_whole
    from calm.storage.ours import MODEL

    check_spared(Path(out), [autoencoder, model, *([tokenizer] if tokenizer else [])])
    with written_whole(Path(out), MODEL if overwrite else None) as folder:
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
    draws: float | None = None,
    positions: int = 2048,
    vocab_size: int | None = None,
    published: bool = False,
    head: dict[str, Any] | None = None,
) -> None:
    """Count parameters, training FLOPs and the true cost of a token, by part.

    Args:
        target: Model folder, name of a model of the package, or a recipe (shipped name or .yaml file).
        draws: Draws of a chunk at low temperature: the size of the pool, or the mean of what the exact
            sampler makes (generate counts them). 200, or 1 for a head that takes a temperature itself.
        positions: Positions of the context that attention sees.
        vocab_size: Token ids of a recipe whose tokenizer is not here.
        published: Count the head's work on the hidden state with every draw, as the paper does.
        head: Draw from the head of a CALM in another way, such as '{"num_steps": 2}' (docs/heads.md).
    """
    from calm.flops import Work, cost_of
    from calm.models.loading import change_head, load_config
    from calm.models.missing import models_near
    from calm.models.shipped import folder_of
    from calm.report.tables import print_costs
    from calm.training.build import model_config
    from calm.training.recipe_files import read_recipe
    from calm.training.recipe_settings import find_recipe

    folder = Path(folder_of(target))
    if folder.is_dir():
        config = load_config(folder)
    else:
        try:
            find_recipe(target)
        except InputError as error:
            raise InputError(str(error).rstrip(".?") + models_near(target)) from error
        config = model_config(read_recipe(target), vocab_size)
    if head:
        change_head(config, head)
    size, is_calm = getattr(config, "chunk_size", 1), config.model_type == "calm"
    if draws is None:
        draws = 200 if is_calm and config.head.lowest_temperature == 1 else 1
    print_costs(
        f"FLOPs per token; K = {size}, {config.vocab_size:,} token ids, {positions:,} positions",
        cost_of(config, Work(positions, condition_per_draw=published)),
        cost_of(config, Work(positions, draws, published)) if is_calm and draws != 1 else None,
        draws,
    )


def doctor() -> None:
    """Tell which hardware, dtype and attention would be used here, and why."""
    from calm.doctor import examine

    for line in examine():
        print(line)


def share(
    run: str,
    push: str | None = None,
    private: bool = False,
    name: str | None = None,
    license: str | None = None,
    about: str | None = None,
    ngrams: list[int] | int | None = None,
    max_blocks: int | None = None,
    export: str | None = None,
    dtype: str = "bfloat16",
) -> None:
    """Write the model card of a run from what it knows and scores, and upload its model if asked to.

    Args:
        run: Folder of a run of `calm train` or `calm finetune`.
        push: Name on the hub, "owner/name", to upload the model folder to.
        private: Make a new repository there private.
        name: Of the model on its card; that on the hub, or that of the run's folder if none is given.
        license: Identifier of a licence that the hub knows, such as mit.
        about: A paragraph of your own for the card.
        ngrams: Orders of n-gram floors on the card of a trained model, such as [3,5].
        max_blocks: Score this many held-out blocks at most, for a trained model.
        export: Folder for a copy of the model with its card, in fewer bytes.
        dtype: Type of the weights in that copy: float32, bfloat16 or float16.
    """
    _check_counts(ngrams, max_blocks=max_blocks)
    from calm.sharing import check_push, write_card
    from calm.sharing import export as copy
    from calm.sharing import push as upload

    if push is not None:
        check_push(push)
    card = write_card(
        Path(run),
        name=name or push,
        license_name=license,
        about=None if about is None else as_text(about),
        ngrams=[ngrams] if isinstance(ngrams, int) else ngrams,
        num_blocks=max_blocks,
    )
    print(f"card: {card}")
    if export is not None:
        copy(card.parent, Path(export), dtype)
        print(f"copy: {export}")
    if push is not None:
        print(f"model: {upload(card.parent, push, is_private=private)}")


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key_file: str | None = None,
    temperature: float = 0.5,
    max_rows: int = 16,
    max_waiting: int = 256,
    max_tokens: int = 4096,
    max_request_tokens: int = 1 << 18,
    max_draws: int = 1000,
    draws_at_once: int = 4096,
    max_body: int = 1 << 20,
    max_bytes: int = 1 << 26,
    max_client_bytes: int = 1 << 24,
    max_connections: int = 512,
    max_client_connections: int = 128,
    seconds: float = 300.0,
    header_seconds: float = 20.0,
    body_seconds: float = 60.0,
    write_seconds: float = 60.0,
    template_seconds: float = 5.0,
    allowed_hosts: list[str] | str | None = None,
    head: dict[str, Any] | None = None,
) -> None:
    """Answer requests of the OpenAI API with a CALM.

    Args:
        model: Folder of a model or of adapters, or hub name.
        host: Address to listen at; the default is reached from this machine only.
        port: Port to listen at; 0 takes a free one.
        name: The model's name in requests; that of its folder if none is given.
        api_key_file: File with the key that requests must show; the environment variable CALM_API_KEY is
            another way.
        temperature: Where a request says none.
        max_rows: Texts that are written at the same time.
        max_waiting: Texts that wait for their turn; more are refused.
        max_tokens: Most new tokens of a text.
        max_request_tokens: Most tokens of all texts of a request together, prompts and new ones.
        max_draws: Most draws of a chunk.
        draws_at_once: Draws of all texts together that are held in memory; with more, texts take turns.
        max_body: Most bytes of a request.
        max_bytes: Most bytes of all requests that are not answered yet.
        max_client_bytes: The same for one address.
        max_connections: Most connections; fewer where the system does not allow as many open files.
        max_client_connections: The same for one address, which behind a proxy is the proxy's.
        seconds: How long a request may take.
        header_seconds: How long the head of a request may take.
        body_seconds: How long its body may take.
        write_seconds: How long a client may leave what has been sent to it.
        template_seconds: How long the chat template of the model may take.
        allowed_hosts: Name or names that the server may be called by, such as '[a.org, b.org]', beside
            addresses, localhost and this machine's own name; '*' is any.
        head: Draw from the head in another way, such as '{"num_steps": 2}' (docs/heads.md).
    """
    _look_for(model)
    from calm.serving.run import run_server

    run_server(
        model,
        host,
        port,
        head,
        name=name,
        api_key_file=api_key_file,
        temperature=temperature,
        max_rows=max_rows,
        max_waiting=max_waiting,
        max_tokens=max_tokens,
        max_request_tokens=max_request_tokens,
        max_draws=max_draws,
        draws_at_once=draws_at_once,
        max_body=max_body,
        max_bytes=max_bytes,
        max_client_bytes=max_client_bytes,
        max_connections=max_connections,
        max_client_connections=max_client_connections,
        seconds=seconds,
        header_seconds=header_seconds,
        body_seconds=body_seconds,
        write_seconds=write_seconds,
        template_seconds=template_seconds,
        allowed_hosts=[allowed_hosts] if isinstance(allowed_hosts, str) else allowed_hosts or [],
    )


def _look_for(model: str) -> None:
    """Raise InputError for a model that is not there, before torch is imported."""
    from calm.models.missing import look_for

    look_for(model)


def _check_counts(ngrams: list[int] | int | None, **counts: int | None) -> None:
    """Raise InputError for an order of n-grams, or another number, that is out of range."""
    for order in [ngrams] if isinstance(ngrams, int) else ngrams or []:
        ORDERS.require("ngrams", order)
    for name, number in counts.items():
        if number is not None:
            BLOCKS.require(name, number)
