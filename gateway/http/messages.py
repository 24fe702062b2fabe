"""A conversation as clients send it, and as chat templates take it.

Knows roles and content: text, or parts of text, which are joined by line ends. What no template
here could show (images, tool calls) is refused by name.
"""

from collections.abc import Mapping, Sequence

from moe_core.errors import RequestError

MAX_MESSAGES = 10_000
UNSERVED = ("tool_calls", "function_call", "audio", "refusal")


def read_messages(value: object) -> list[dict[str, object]]:
    """Messages with role, content and name, where there is one. Raises RequestError."""
    if not isinstance(value, list) or not value:
        raise RequestError("messages: must be a list of messages that is not empty")
    if len(value) > MAX_MESSAGES:
        raise RequestError(f"messages: {len(value)} of them; at most {MAX_MESSAGES}")
    return [_read_message(f"messages[{index}]", each) for index, each in enumerate(value)]


def _read_message(where: str, value: object) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{where}: must be an object with role and content")
    for name in UNSERVED:
        if value.get(name):
            raise RequestError(f"{where}.{name}: is not supported by this server")
    role = value.get("role")
    if not isinstance(role, str):
        raise RequestError(f"{where}.role: must be text, such as 'user'")
    content = value.get("content")
    if content is None and role != "assistant":
        raise RequestError(f"{where}.content: is required")
    message: dict[str, object] = {"role": role, "content": _read_content(where, content)}
    if isinstance(value.get("name"), str):
        message["name"] = value["name"]
    return message


def _read_content(where: str, content: object) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise RequestError(f"{where}.content: must be text or a list of parts")
    parts = enumerate(content)
    return "\n".join(_read_part(f"{where}.content[{index}]", part) for index, part in parts)


def _read_part(where: str, part: object) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or kind != "text":
        raise RequestError(f"{where}: must be a part of type 'text', not {str(kind)[:40]!r}")
    text = part.get("text")
    if not isinstance(text, str):
        raise RequestError(f"{where}.text: must be text")
    return text
