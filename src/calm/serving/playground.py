"""The page at /, made of the small files in `page`, and what it needs to know about the model."""

from importlib import resources
from typing import Any

import torch
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException

from calm.core.chunks import as_id_tensor
from calm.models.configuration import CalmConfig
from calm.models.thoughts import thoughts_of
from calm.serving.settings import ServerSettings

_FOLDER = resources.files("calm") / "serving" / "page"
_MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css"}
_FILES = {
    file.name: media_type
    for file in _FOLDER.iterdir()
    for suffix, media_type in _MEDIA_TYPES.items()
    if file.name.endswith(suffix)
}
PAGE_PATHS = ("/", "/page", *(f"/page/{name}" for name in _FILES))
"""Paths that need no key."""
# The page loads nothing from elsewhere, and generated text cannot make it do so.
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src data:; frame-ancestors 'none'",
    "cache-control": "no-cache",
}


def add_playground(app: FastAPI, config: CalmConfig, has_chat: bool, settings: ServerSettings) -> None:
    """Add the page and its files to an application.

    Args:
        app: The application.
        config: The model's configuration.
        has_chat: Whether the model's tokenizer has a chat template.
        settings: Settings and limits.
    """
    about = _describe(config, has_chat, settings)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse((_FOLDER / "index.html").read_text(encoding="utf-8"), headers=_HEADERS)

    @app.get("/page/{name}")
    async def part(name: str) -> Response:
        if name not in _FILES:
            raise HTTPException(404, "there is no such part of the page")
        text = (_FOLDER / name).read_text(encoding="utf-8")
        return Response(text, media_type=_FILES[name], headers=_HEADERS)

    @app.get("/page")
    async def about_the_model() -> dict[str, Any]:
        return about


def _describe(config: CalmConfig, has_chat: bool, settings: ServerSettings) -> dict[str, Any]:
    """What the page needs to know before it has a key."""
    head, thoughts = config.head, thoughts_of(config)
    return {
        "model": settings.name,
        "needs_key": settings.api_key is not None,
        "temperature": settings.temperature,
        "draws": settings.draws,
        "max_draws": settings.max_draws,
        "max_tokens": settings.max_tokens,
        "num_thoughts": None if thoughts is None else thoughts.number,
        "max_thoughts": settings.max_thoughts,
        "chunk_size": config.chunk_size,
        "eos_token_ids": as_id_tensor(config.eos_token_id, torch.device("cpu")).tolist(),
        "head": head.head_type,
        "lowest_temperature": head.lowest_temperature,
        "has_chat": has_chat,
    }
