"""The commands that import, share and serve models: each a typed function whose docstring is its help.

Imports of torch and transformers happen inside the commands, so that `calm --help` answers at once.
"""

from pathlib import Path
from typing import Any

from calm.commands.checks import check_counts, check_draft, look_for
from calm.errors import InputError
from calm.terminal import as_text


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
    check_counts(ngrams, max_blocks=max_blocks)
    if private and push is None:
        raise InputError("--private is for a repository on the hub; name it with --push or leave it out.")
    name, license, about = (None if one is None else as_text(one) for one in (name, license, about))
    from calm.sharing import check_export, check_push, write_card
    from calm.sharing import export as copy
    from calm.sharing import push as upload

    # Before the model is scored, which may take long, and before its card is written.
    check_export(None if export is None else Path(export), dtype)
    if push is not None:
        check_push(push)
    card = write_card(
        Path(run),
        name=name or push,
        license_name=license,
        about=about,
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
    max_thoughts: int = 64,
    draws_at_once: int = 4096,
    chunks_at_once: int = 128,
    prefix_bytes: int = 1 << 28,
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
    draft: str | None = None,
    draft_chunks: int | None = None,
) -> None:
    """Answer requests of the OpenAI API with a CALM, or with another model that a CALM drafts for.

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
        max_request_tokens: Most tokens of all texts of a request together: prompts, thoughts, new ones.
        max_draws: Most draws of a chunk.
        max_thoughts: Most thoughts before a text, of a model that was trained to think.
        draws_at_once: Draws of all texts together that are held in memory; with more, texts take turns.
        chunks_at_once: Chunks of prompts that are read between two chunks of the texts.
        prefix_bytes: Memory for beginnings of prompts that may come again; 0 keeps none.
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
        draft: Folder or hub name of a CALM that writes ahead for a model of tokens (docs/drafting.md).
        draft_chunks: Chunks that it writes ahead; 1 if none is given.
    """
    check_draft(draft, draft_chunks)
    look_for(model)
    if draft is not None:
        look_for(draft)
    from calm.serving.run import run_server

    run_server(
        model,
        host,
        port,
        head,
        name=name,
        api_key_file=api_key_file,
        temperature=temperature,
        draft=draft,
        draft_chunks=draft_chunks,
        max_rows=max_rows,
        max_waiting=max_waiting,
        max_tokens=max_tokens,
        max_request_tokens=max_request_tokens,
        max_draws=max_draws,
        max_thoughts=max_thoughts,
        draws_at_once=draws_at_once,
        chunks_at_once=chunks_at_once,
        prefix_bytes=prefix_bytes,
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
