"""Parse the messages of a chat into roles and texts. Errors name the value at fault."""

from typing import Any

from calm.serving.errors import error_at, json_type, quoted

ROLES = ("developer", "system", "user", "assistant", "tool", "function")
_MAX_MESSAGES = 4096
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
        raise error_at("messages", f"must be an array of messages, got {json_type(value)}.")
    if not value:
        raise error_at("messages", "must contain at least one message.")
    if len(value) > _MAX_MESSAGES:
        raise error_at("messages", f"may contain at most {_MAX_MESSAGES} messages, got {len(value)}.")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _read_message(message: Any, param: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise error_at(param, f"must be an object with a role and content, got {json_type(message)}.")
    role = message.get("role")
    if not isinstance(role, str):
        problem = f"got {json_type(role)}" if "role" in message else "it is missing"
        raise error_at(f"{param}.role", f"must be a string, but {problem}.")
    if role not in ROLES:
        raise error_at(f"{param}.role", f"must be one of {', '.join(ROLES)}; got '{quoted(role)}'.")
    return {"role": role, "content": _read_content(message, role, f"{param}.content")}


def _read_content(message: dict[str, Any], role: str, param: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and role in _MAY_BE_NULL:
        refusal = message.get("refusal")
        return refusal if isinstance(refusal, str) else ""
    if isinstance(content, list):
        if not content:
            raise error_at(param, 'an array of parts must contain at least one; for no text, give "".')
        return "".join(_read_part(part, role, f"{param}[{index}]") for index, part in enumerate(content))
    problem = "it is missing" if "content" not in message else f"got {json_type(content)}"
    hint = "; it may be null only in assistant and function messages" if content is None else ""
    raise error_at(param, f"must be a string or an array of text parts, but {problem}{hint}.")


def _read_part(part: Any, role: str, param: str) -> str:
    if not isinstance(part, dict):
        raise error_at(
            param, f'must be an object such as {{"type": "text", "text": "..."}}, got {json_type(part)}.'
        )
    kind = part.get("type")
    if kind != "text" and not (kind == "refusal" and role == _ASSISTANT):
        which = f"of type '{quoted(kind)}'" if isinstance(kind, str) else "without a type"
        raise error_at(param, f"a part {which} is not supported; this model reads text parts only.")
    if not isinstance(part.get(kind), str):
        raise error_at(f"{param}.{kind}", f"must be a string, got {json_type(part.get(kind))}.")
    text: str = part[kind]
    return text
