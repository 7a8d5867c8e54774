"""Commands that import, share and serve models: typed functions whose docstrings are their help.

torch and transformers are imported inside the commands, so that `calm --help` answers at once.
"""

from pathlib import Path
from typing import Any

from calm.commands.checks import check_counts, check_draft, check_model_exists
from calm.errors import InputError
from calm.serving.settings import ServerSettings
from calm.terminal import as_text


def import_published(
    autoencoder: str, model: str, out: str, tokenizer: str | None = None, overwrite: bool = False
) -> None:
    """Convert a released checkpoint to a model folder.

    Args:
        autoencoder: Folder of the released autoencoder.
        model: Folder of the released language model.
        out: Output folder.
        tokenizer: Its tokenizer (as in `calm prepare`), to include in the model folder.
        overwrite: Replace the output folder.
    """
    from calm.data.tokenizer import load_tokenizer
    from calm.models.published import load_published
    from calm.models.shipped import tokenizer_of
    from calm.storage.folders import atomic_folder, check_inputs_outside
    from calm.storage.ours import MODEL

    check_inputs_outside(Path(out), [autoencoder, model, *([tokenizer] if tokenizer else [])])
    with atomic_folder(Path(out), MODEL if overwrite else None) as folder:
        network = load_published(Path(autoencoder), Path(model))
        if tokenizer is not None:
            tokens = load_tokenizer(tokenizer_of(tokenizer))
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
    """Write the model card of a run, with its facts and scores, and upload its model if asked to.

    Args:
        run: Folder of a run of `calm train` or `calm finetune`.
        push: Name on the hub, "owner/name", to upload the model folder to.
        private: Make a new repository there private.
        name: The model's name on the card; by default its name on the hub, or that of the run folder.
        license: Identifier of a license that the hub knows, such as mit.
        about: A paragraph of your own for the card.
        ngrams: Orders of n-gram floors on the card of a trained model, such as [3,5].
        max_blocks: Maximum number of held-out blocks to score, for a trained model.
        export: Folder for a smaller copy of the model, with its card.
        dtype: Dtype of the weights in that copy: float32, bfloat16 or float16.
    """
    check_counts(ngrams, max_blocks=max_blocks)
    if private and push is None:
        raise InputError("--private requires a hub repository; name one with --push, or leave --private out.")
    name, license, about = (None if text is None else as_text(text) for text in (name, license, about))
    from calm.sharing import check_export, check_push, write_card
    from calm.sharing import export as copy
    from calm.sharing import push as upload

    # Check before the model is scored, which may take long, and before its card is written.
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
    max_rows: int = ServerSettings.max_rows,
    max_waiting: int = ServerSettings.max_waiting,
    max_tokens: int = ServerSettings.max_tokens,
    max_request_tokens: int = ServerSettings.max_request_tokens,
    max_draws: int = ServerSettings.max_draws,
    max_thoughts: int = ServerSettings.max_thoughts,
    draws_at_once: int = ServerSettings.draws_at_once,
    chunks_at_once: int = ServerSettings.chunks_at_once,
    prefix_bytes: int = ServerSettings.prefix_bytes,
    max_body: int = ServerSettings.max_body,
    max_bytes: int = ServerSettings.max_bytes,
    max_client_bytes: int = ServerSettings.max_client_bytes,
    max_connections: int = ServerSettings.max_connections,
    max_client_connections: int = ServerSettings.max_client_connections,
    seconds: float = ServerSettings.seconds,
    header_seconds: float = ServerSettings.header_seconds,
    body_seconds: float = ServerSettings.body_seconds,
    write_seconds: float = ServerSettings.write_seconds,
    template_seconds: float = ServerSettings.template_seconds,
    allowed_hosts: list[str] | str | None = None,
    head: dict[str, Any] | None = None,
    draft: str | None = None,
    draft_chunks: int | None = None,
) -> None:
    """Serve the OpenAI API with a CALM, or with another model that a CALM drafts for.

    Args:
        model: Model folder, adapter folder or hub name.
        host: Address to listen on; the default is reachable from this machine only.
        port: Port to listen on; 0 picks a free one.
        name: The model's name in requests; that of its folder by default.
        api_key_file: File with the key that requests must send; alternatively, set the environment variable
            CALM_API_KEY.
        temperature: Default temperature of requests.
        max_rows: Texts generated at once.
        max_waiting: Texts that may wait in the queue; more are refused.
        max_tokens: Maximum new tokens per text.
        max_request_tokens: Maximum total tokens of a request: prompts, thoughts and new tokens.
        max_draws: Maximum draws per chunk.
        max_thoughts: Maximum thoughts before a text, for a model that was trained to think.
        draws_at_once: Draws of all texts held in memory at once; beyond that, texts take turns.
        chunks_at_once: Prompt chunks prefilled between two generation steps.
        prefix_bytes: Memory of the prefix cache; 0 turns it off.
        max_body: Maximum bytes of a request.
        max_bytes: Maximum bytes of all unanswered requests.
        max_client_bytes: The same for one address.
        max_connections: Maximum connections; fewer if the system allows fewer open files.
        max_client_connections: The same for one address; behind a proxy, all come from the proxy.
        seconds: Seconds that a request may take.
        header_seconds: Seconds that the headers of a request may take.
        body_seconds: Seconds that its body may take.
        write_seconds: Seconds that a client may leave a response unread.
        template_seconds: Seconds that rendering the model's chat template may take.
        allowed_hosts: Host name or names that the server answers to, such as '[a.org, b.org]', besides IP
            addresses, localhost and this machine's own name; '*' allows any.
        head: Sampling settings of the head to change, such as '{"num_steps": 2}' (docs/heads.md).
        draft: Folder or hub name of a CALM that drafts for a token-level model (docs/drafting.md).
        draft_chunks: Chunks per draft; 1 by default.
    """
    check_draft(draft, draft_chunks)
    check_model_exists(model)
    if draft is not None:
        check_model_exists(draft)
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
