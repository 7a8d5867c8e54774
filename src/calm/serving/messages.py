"""Parse the messages of a chat: roles and texts. Errors say where the fault is."""

from typing import Any

from calm.serving.errors import at, json_type, quoted

ROLES = ("developer", "system", "user", "assistant", "tool", "function")
_MOST_MESSAGES = 4096
_ASSISTANT = "assistant"
_MAY_BE_NULL = (_ASSISTANT, "function")


def read_messages(value: Any) -> list[dict[str, str]]:
    """Role and text of each message, as chat templates expect them.

    Args:
        value: The request's `messages`.

    Raises:
        ApiError: If it is not a list of text messages.
    """
    if not isinstance(value, list):
        raise at("messages", f"must be an array of messages, got {json_type(value)}.")
    if not value:
        raise at("messages", "must contain at least one message.")
    if len(value) > _MOST_MESSAGES:
        raise at("messages", f"may contain at most {_MOST_MESSAGES} messages, got {len(value)}.")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _read_message(message: Any, place: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise at(place, f"must be an object with a role and content, got {json_type(message)}.")
    role = message.get("role")
    if not isinstance(role, str):
        found = f"got {json_type(role)}" if "role" in message else "it is missing"
        raise at(f"{place}.role", f"must be a string, but {found}.")
    if role not in ROLES:
        raise at(f"{place}.role", f"must be one of {', '.join(ROLES)}; got '{quoted(role)}'.")
    return {"role": role, "content": _read_content(message, role, f"{place}.content")}


def _read_content(message: dict[str, Any], role: str, place: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and role in _MAY_BE_NULL:
        refusal = message.get("refusal")
        return refusal if isinstance(refusal, str) else ""
    if isinstance(content, list):
        if not content:
            raise at(place, 'an array of parts must contain at least one; for no text, give "".')
        return "".join(_read_part(part, role, f"{place}[{index}]") for index, part in enumerate(content))
    found = "it is missing" if "content" not in message else f"got {json_type(content)}"
    more = "; it may be null only in assistant and function messages" if content is None else ""
    raise at(place, f"must be a string or an array of text parts, but {found}{more}.")


def _read_part(part: Any, role: str, place: str) -> str:
    if not isinstance(part, dict):
        raise at(
            place, f'must be an object such as {{"type": "text", "text": "..."}}, got {json_type(part)}.'
        )
    kind = part.get("type")
    if kind != "text" and not (kind == "refusal" and role == _ASSISTANT):
        said = f"of type '{quoted(kind)}'" if isinstance(kind, str) else "without a type"
        raise at(place, f"a part {said} is not supported; this model reads text parts only.")
    if not isinstance(part.get(kind), str):
        raise at(f"{place}.{kind}", f"must be a string, got {json_type(part.get(kind))}.")
    text: str = part[kind]
    return text
