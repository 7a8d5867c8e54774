"""Messages of a chat: what they may contain, and where an error is reported."""

import openai
import pytest

from calm.serving.errors import ApiError
from calm.serving.messages import ROLES, read_messages


def user(content):
    return {"role": "user", "content": content}


TEXT = {"type": "text", "text": "a"}
BEFORE = [user("a"), {"role": "assistant", "content": "b"}]
INVALID = {
    "no parts": (user([]), ".content", "must contain at least one"),
    "null": (user(None), ".content", "null only in assistant and function"),
    "missing": ({"role": "user"}, ".content", "it is missing"),
    "null of a system": (
        {"role": "system", "content": None},
        ".content",
        "null only in assistant and function",
    ),
    "null of a tool": (
        {"role": "tool", "content": None},
        ".content",
        "null only in assistant and function",
    ),
    "no parts of an assistant": (
        {"role": "assistant", "content": []},
        ".content",
        "must contain at least one",
    ),
    "a number": (user(3), ".content", "got a number"),
    "an object": (user({"text": "a"}), ".content", "got an object"),
    "a string as a part": (user([TEXT, "a"]), ".content[1]", "must be an object such as"),
    "null as a part": (user([None]), ".content[0]", "must be an object such as"),
    "no text": (user([{"type": "text"}]), ".content[0].text", "must be a string, got null"),
    "a number as text": (user([TEXT, {"type": "text", "text": 3}]), ".content[1].text", "got a number"),
    "no type": (user([{"text": "a"}]), ".content[0]", "without a type"),
    "an image": (
        user([TEXT, {"type": "image_url", "image_url": {}}]),
        ".content[1]",
        "'image_url'",
    ),
    "sound": (user([{"type": "input_audio", "input_audio": {}}]), ".content[0]", "reads text parts only"),
    "a file": (user([{"type": "file", "file": {}}]), ".content[0]", "reads text parts only"),
    "a user's refusal": (user([{"type": "refusal", "refusal": "a"}]), ".content[0]", "reads text parts only"),
    "no role": ({"content": "a"}, ".role", "it is missing"),
    "a role that is no string": ({"role": 3, "content": "a"}, ".role", "got a number"),
    "an unknown role": ({"role": "robot", "content": "a"}, ".role", "must be one of developer, system, user"),
    "capitals": ({"role": "User", "content": "a"}, ".role", "got 'User'"),
    "a string": ("hello", "", "must be an object with a role and content, got a string"),
}


@pytest.mark.parametrize(("message", "location", "reason"), INVALID.values(), ids=INVALID)
def test_error_names_the_faulty_part(message, location, reason):
    with pytest.raises(ApiError) as raised:
        read_messages([*BEFORE, message])
    error = raised.value.body["error"]
    assert error["param"] == f"messages[2]{location}"
    assert error["message"].startswith(f"messages[2]{location}: ") and reason in error["message"]


@pytest.mark.parametrize("value", [[], {}, "a", 3])
def test_messages_must_be_a_nonempty_array(value):
    with pytest.raises(ApiError, match="messages: must"):
        read_messages(value)


def test_number_of_messages_is_limited():
    with pytest.raises(ApiError, match="at most 4096 messages"):
        read_messages([user("a")] * 4097)


@pytest.mark.parametrize("role", ROLES)
def test_every_role_of_the_api_is_accepted(role):
    message = {"role": role, "name": "x", "tool_call_id": "1", "content": [TEXT, TEXT]}
    assert read_messages([message]) == [{"role": role, "content": "aa"}]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None}, ""),
        ({"content": None, "tool_calls": [{"id": "1"}]}, ""),
        ({}, ""),
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": [{"type": "refusal", "refusal": "No."}, TEXT]}, "No.a"),
        ({"content": ""}, ""),
    ],
)
def test_assistant_messages_may_be_empty_or_refusals(message, text):
    assert read_messages([{"role": "assistant", **message}]) == [{"role": "assistant", "content": text}]


def test_function_messages_may_be_null():
    message = {"role": "function", "name": "f", "content": None}
    assert read_messages([message]) == [{"role": "function", "content": ""}]


def test_message_of_a_response_is_accepted_in_the_next_request(server):
    """Clients append it with all its fields."""
    _, client, _ = server
    messages = [user("Hello")]
    response = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
    messages = [*messages, response.choices[0].message.model_dump(), user("More")]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=4).choices
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=[*messages, user([])])
    assert raised.value.param == "messages[3].content"
