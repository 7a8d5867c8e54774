"""The HTTP application: routes of the OpenAI API, errors in its format, keys, health and metrics."""

import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from transformers import PreTrainedTokenizerBase

from calm.models.calm import CalmForCausalLM
from calm.models.generation.batching import BatchLimits
from calm.serving.bodies import read_body
from calm.serving.endpoint import Endpoint
from calm.serving.engine import Engine
from calm.serving.errors import ApiError, internal_error, quoted
from calm.serving.formats import ChatFormat, CompletionFormat
from calm.serving.hosts import Hosts
from calm.serving.intake import Intake
from calm.serving.metrics import Metrics
from calm.serving.playground import add_playground
from calm.serving.pools import describe_pool
from calm.serving.protocol import ChatRequest, CompletionRequest, PoolRequest
from calm.serving.settings import ServerSettings
from calm.serving.watch import Watch
from calm.serving.writers import ChunkWriter, DraftedWriter

logger = logging.getLogger(__name__)
_NOT_FOUND = HTTPStatus.NOT_FOUND.phrase  # What the router says if no path matches.
_MANY_TOKENS = 10_000  # Answers of at least so many are serialized off the event loop.
# Keeps proxies from buffering the stream.
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def create_app(
    model: CalmForCausalLM | DraftedWriter, tokenizer: PreTrainedTokenizerBase, settings: ServerSettings
) -> FastAPI:
    """The application, for any ASGI server (in one process).

    Args:
        model: A CALM, or a token-level model with a CALM that drafts for it; nothing else may use them.
        tokenizer: Its tokenizer.
        settings: Settings and limits.
    """
    writer = model if isinstance(model, DraftedWriter) else ChunkWriter(model)
    limits = BatchLimits(
        settings.max_rows, settings.draws_at_once, settings.chunks_at_once, settings.prefix_bytes
    )
    engine = Engine(writer, limits, settings.max_waiting)
    metrics = Metrics(engine)
    intake = Intake(
        max(settings.max_bytes, settings.max_body), max(settings.max_client_bytes, settings.max_body)
    )
    endpoint = Endpoint(engine, writer, tokenizer, settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        endpoint.readers.stop()
        engine.stop()

    # FastAPI's own documentation pages would load scripts from elsewhere.
    app = FastAPI(title="calm", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.engine, app.state.intake = engine, intake
    _add_errors(app)
    app.add_middleware(
        Watch, key=settings.api_key, hosts=Hosts(settings.allowed_hosts), intake=intake, metrics=metrics
    )
    description = {"id": settings.name, "object": "model", "created": int(time.time()), "owned_by": "calm"}

    @app.get("/health")
    async def health() -> JSONResponse:
        if engine.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "stopped"}, 503, headers={"retry-after": "1"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [description]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        endpoint.check_name(name)
        return description

    @app.post("/v1/completions", response_model=None, openapi_extra=_openapi_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionRequest, settings.max_body, endpoint.readers)
        answer = await endpoint.complete(body, request.is_disconnected)
        return await _respond(endpoint, answer, body.stream, request)

    @app.post("/v1/chat/completions", response_model=None, openapi_extra=_openapi_body(ChatRequest))
    async def chat(request: Request) -> Response:
        body = await read_body(request, ChatRequest, settings.max_body, endpoint.readers)
        answer = await endpoint.chat(body, request.is_disconnected)
        return await _respond(endpoint, answer, body.stream, request)

    if isinstance(model, DraftedWriter):  # Pools, and the page that shows them, need chunks.
        return app

    @app.post("/v1/calm/pool", openapi_extra=_openapi_body(PoolRequest))
    async def pool(request: Request) -> Response:
        body = await read_body(request, PoolRequest, settings.max_body, endpoint.readers)
        candidates = await describe_pool(endpoint, body, settings, request.is_disconnected)
        return await endpoint.readers.run(lambda: JSONResponse(candidates), request.is_disconnected)

    add_playground(app, model.config, tokenizer.chat_template is not None, settings)
    return app


def _openapi_body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a body."""
    # References inside the schema are relative to its $id.
    schema = {"$id": model.__name__, **model.model_json_schema()}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


async def _respond(
    endpoint: Endpoint, answer: CompletionFormat | ChatFormat, is_stream: bool, request: Request
) -> Response:
    """The response, as one object or as server-sent events."""
    if not is_stream:
        content = await answer.response(request.is_disconnected)
        if content is None:
            return Response(status_code=499)
        if content["usage"]["completion_tokens"] < _MANY_TOKENS:
            return JSONResponse(content)
        return await endpoint.readers.run(lambda: JSONResponse(content), request.is_disconnected)
    events = _server_sent_events(answer, request.scope["request_id"])
    return StreamingResponse(events, media_type="text/event-stream", headers=_STREAM_HEADERS)


async def _server_sent_events(answer: CompletionFormat | ChatFormat, request_id: str) -> AsyncIterator[str]:
    """The events of an answer as text; an error in the middle becomes an event as well."""
    try:
        async for event in answer.events():
            yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    except Exception:
        logger.exception("request %s failed", request_id)
        yield f"data: {json.dumps(internal_error(request_id).body)}\n\n"
    yield "data: [DONE]\n\n"


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        path = quoted(request.scope["path"])
        if error.status_code == 404 and error.detail == _NOT_FOUND:
            return ApiError(f"there is nothing at '{path}'; the API is at /v1.", 404).response()
        if error.status_code != 405:
            return ApiError(f"{error.detail}.", error.status_code).response()
        methods = {method.strip() for method in (error.headers or {}).get("Allow", "").split(",")} - {""}
        methods |= {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
        allowed = {"allow": ", ".join(sorted(methods))}
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=allowed)
        refusal = ApiError(f"'{path}' does not accept {quoted(request.method)}; use {allowed['allow']}.", 405)
        return JSONResponse(refusal.body, refusal.status, headers=allowed)
