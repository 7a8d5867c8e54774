"""The HTTP side: routes of the OpenAI API, errors as it words them, keys, health and metrics."""

import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from calm.core.temperature import TemperatureSettings
from calm.models.calm import CalmForCausalLM
from calm.serving.engine import Engine
from calm.serving.metrics import Metrics
from calm.serving.pools import describe_pool
from calm.serving.protocol import ApiError, ChatRequest, CompletionRequest, PoolRequest
from calm.serving.requests import Endpoint

logger = logging.getLogger(__name__)
# Answered without a key.
_OPEN_PATHS = ("/health", "/", "/page", "/page/playground.js", "/page/playground.css")
_PAGE_PARTS = {"playground.js": "text/javascript", "playground.css": "text/css"}
# The page takes nothing from elsewhere, and text that the model wrote cannot make it.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src data:; frame-ancestors 'none'",
    "cache-control": "no-cache",
}


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What a server allows.

    Args:
        name: The model's name in requests.
        api_key: What requests must show; None for no key.
        defaults: How chunks are sampled where a request says nothing.
        max_rows: Texts that are written at the same time.
        max_waiting: Texts that wait; more are refused with 429.
        max_tokens: Most new tokens of a text.
        max_draws: Most draws of a chunk.
        max_body: Bytes of a request.
        seconds: How long a request may take.
    """

    name: str
    api_key: str | None = None
    defaults: TemperatureSettings = field(default_factory=TemperatureSettings)
    max_rows: int = 16
    max_waiting: int = 256
    max_tokens: int = 4096
    max_draws: int = 1000
    max_body: int = 1 << 20
    seconds: float = 300.0


def create_app(
    model: CalmForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: ServerSettings
) -> FastAPI:
    """The application, for any ASGI server (in one process).

    Args:
        model: A CALM, which the application has to itself.
        tokenizer: Its tokenizer.
        settings: What is allowed.
    """
    engine = Engine(model, settings.max_rows, settings.max_waiting)
    metrics = Metrics(engine)
    endpoint = Endpoint(engine, model, tokenizer, settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    # Its own pages of documentation would load scripts from elsewhere.
    app = FastAPI(
        title="calm", lifespan=lifespan, docs_url=None, redoc_url=None, max_body_size=settings.max_body
    )
    app.state.engine = engine
    _add_errors(app)
    app.add_middleware(_Watch, settings=settings, metrics=metrics)
    described = {"id": settings.name, "object": "model", "created": int(time.time()), "owned_by": "calm"}

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = engine.is_alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        endpoint.check_name(name)
        return described

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(endpoint.complete(body), body.stream, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _answer(endpoint.chat(body), body.stream, request)

    @app.post("/v1/calm/pool")
    async def pool(body: PoolRequest) -> dict[str, Any]:
        return await describe_pool(endpoint, body, settings.max_draws)

    _add_playground(app, settings)
    return app


def _add_playground(app: FastAPI, settings: ServerSettings) -> None:
    """The page at /, of small files that lie beside this one."""
    folder = resources.files("calm") / "serving" / "page"

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse((folder / "index.html").read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    @app.get("/page/{name}")
    async def part(name: str) -> Response:
        if name not in _PAGE_PARTS:
            raise HTTPException(404, "there is no such part of the page")
        text = (folder / name).read_text(encoding="utf-8")
        return Response(text, media_type=_PAGE_PARTS[name], headers=_PAGE_HEADERS)

    @app.get("/page")
    async def about() -> dict[str, Any]:
        """What the page must know before it has a key."""
        return {
            "model": settings.name,
            "needs_key": settings.api_key is not None,
            "temperature": settings.defaults.temperature,
            "max_draws": settings.max_draws,
        }


async def _answer(answer: Any, is_stream: bool, request: Request) -> Response:
    """An answer as one object or as server-sent events."""
    if not is_stream:
        whole = await answer.whole(request.is_disconnected)
        return JSONResponse(whole) if whole is not None else Response(status_code=499)
    return StreamingResponse(
        _events(answer), media_type="text/event-stream", headers={"cache-control": "no-cache"}
    )


async def _events(answer: Any) -> AsyncIterator[str]:
    """Each part as an event; an error in the middle is an event too."""
    try:
        async for piece in answer.pieces():
            yield f"data: {json.dumps(piece, ensure_ascii=False)}\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    yield "data: [DONE]\n\n"


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def of_ours(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(RequestValidationError)
    async def of_fields(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] == "json_invalid" or not path:
            said = ApiError("the body is no JSON object; send one, with content-type application/json.")
        else:
            said = ApiError(f"'{path[0]}': {first['msg']}.", param=path[0])
        return JSONResponse(said.body, said.status)

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> JSONResponse:
        said = ApiError(f"{error.detail}.", error.status_code)
        return JSONResponse(said.body, said.status, headers=error.headers)

    @app.exception_handler(Exception)
    async def of_nobody(_: Request, error: Exception) -> JSONResponse:
        logger.error("an answer failed", exc_info=error)
        said = ApiError("the server made a mistake; its log has more.", 500, "server_error")
        return JSONResponse(said.body, said.status)


class _Watch:
    """Asks for the key, and counts requests when their answers have ended."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._key, self._metrics = app, settings.api_key, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # Gone before there was an answer.

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._is_known(scope):
                await self._app(scope, receive, note)
            else:
                await _REFUSAL(scope, receive, note)
        except Exception:
            status = 500
            raise
        finally:
            # Never what was asked for: labels must be few.
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started)

    def _is_known(self, scope: Scope) -> bool:
        if self._key is None or scope["path"] in _OPEN_PATHS:
            return True
        shown = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ")
        return secrets.compare_digest(shown.encode(), self._key.encode())


_REFUSAL = JSONResponse(
    ApiError(
        "the API key is missing or wrong; send 'Authorization: Bearer KEY'.",
        kind="authentication_error",
        code="invalid_api_key",
    ).body,
    401,
)
