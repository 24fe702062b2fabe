"""A model directory's chat template: where it is, and how it is rendered.

Knows Jinja and what templates written for transformers expect of it: `raise_exception`,
`strftime_now`, `tojson`, loop controls, the `generation` block and the special tokens' texts.
Knows no request. Templates run in a sandbox that lets them change nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_core.checkpoint.json_files import parse_object, read_bytes
from moe_core.errors import CheckpointError, RequestError

MAX_FILE_BYTES = 16 * 1024 * 1024
RESERVED = frozenset({"messages", "add_generation_prompt", "tools", "documents"})


class ChatTemplate:
    """`tokens`: the texts of bos_token, eos_token and their like, by these names."""

    def __init__(self, source: str, tokens: Mapping[str, str], where: str) -> None:
        """Raises CheckpointError, naming `where` it is from, for a template with a mistake."""
        self._tokens = dict(tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{where}: is no chat template: {error}") from error

    @classmethod
    def from_directory(cls, directory: Path) -> "ChatTemplate | None":
        """From chat_template.jinja, else from tokenizer_config.json; None where neither has one.
        Raises CheckpointError for files that cannot be read."""
        config = _tokenizer_config(directory / "tokenizer_config.json")
        path = directory / "chat_template.jinja"
        if path.exists():
            content = read_bytes(path, MAX_FILE_BYTES)
            try:
                return cls(content.decode(), _special_tokens(config), str(path))
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path}: is not UTF-8: {error}") from error
        source = _default_template(config.get("chat_template"))
        if source is None:
            return None
        return cls(source, _special_tokens(config), str(directory / "tokenizer_config.json"))

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt's text. `variables` are the template's own, chat_template_kwargs to clients.
        Raises RequestError for messages that the template refuses or cannot use."""
        given = variables or {}
        if taken := RESERVED & given.keys():
            raise RequestError(f"chat_template_kwargs: {min(taken)} cannot be set there")
        try:
            return self._template.render(
                {
                    **self._tokens,
                    **given,
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise RequestError(
                f"messages: the model's chat template refuses them: {error}"
            ) from None


class _GenerationBlock(Extension):
    """{% generation %} marks what an assistant wrote, for training; here it only shows it."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    # HTML escapes, as jinja2's own filter makes, are nothing for a model.
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., object]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(functions)
    return environment


def _to_json(
    value: Any,  # noqa: ANN401 - whatever a template has
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)


def _tokenizer_config(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    return parse_object(read_bytes(path, MAX_FILE_BYTES), str(path))


def _default_template(found: object) -> str | None:
    """Older checkpoints hold several, each with a name."""
    if isinstance(found, str):
        return found
    named = found if isinstance(found, list) else []
    by_name = {each.get("name"): each.get("template") for each in named if isinstance(each, dict)}
    default = by_name.get("default")
    return default if isinstance(default, str) else None


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """A token is written as its text or as an object with its content."""
    tokens = {}
    for name, value in config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[name] = text
    return tokens
