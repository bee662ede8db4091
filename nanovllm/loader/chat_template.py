"""Chat templates: Jinja text that turns messages into the prompt a model was trained on.

Templates come from strangers, so they run in Jinja's immutable sandbox. Options and helpers are those of Hugging
Face's `apply_chat_template`, whose behaviour templates are written against.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanovllm.config import unknown_name_error

logger = logging.getLogger(__name__)
_OWN_ARGUMENTS = {"messages", "add_generation_prompt"}  # of `LLM.chat`, not of the template alone


class ChatTemplate:
    """One template, or several by name, of which "default" and "tool_use" have a meaning."""

    def __init__(self, source: str | Mapping[str, str]) -> None:
        """ValueError for a template that does not compile."""
        sources = {"default": source} if isinstance(source, str) else dict(source)
        environment = _environment()
        try:
            self._templates = {name: environment.from_string(text) for name, text in sources.items()}
            read = [meta.find_undeclared_variables(environment.parse(text)) for text in sources.values()]
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template has a syntax error on line {error.lineno}: {error.message}") from error
        self.variables = frozenset().union(*read) - environment.globals.keys() - _OWN_ARGUMENTS
        self._said: set[str] = set()

    def check_names(self, given: Mapping[str, Any]) -> None:
        """TypeError for a misspelt variable; one that no template reads is said once. None asks for nothing.

        A client that sends `enable_thinking` to every model is right to expect an answer of those that never think.
        """
        for name in (name for name, value in given.items() if value is not None and name not in self.variables):
            if name in _OWN_ARGUMENTS or difflib.get_close_matches(name, self.variables, n=1, cutoff=0.8):
                raise unknown_name_error("chat_template_kwargs", name, sorted(self.variables))
            if name not in self._said:
                self._said.add(name)
                reads = ", ".join(sorted(self.variables)) or "none"
                logger.warning(
                    "the chat template reads no variable %r, so it changes nothing (it reads: %s)", name, reads
                )

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> str:
        """The prompt's text. ValueError when the template refuses or cannot handle the messages."""
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ValueError(f"the model has no default chat template, only {', '.join(self._templates)}")
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f'a message is a dictionary with "role" and "content", got {message!r}')
        given = {"messages": list(messages), "tools": tools, "documents": None, **variables}
        try:
            return self._templates[name].render(given)
        except Exception as error:  # a stranger's program may raise anything
            raise ValueError(f"the chat template cannot render these messages: {error}") from error


def read_chat_template(override: str | None, directory: Path | None, configured: Any) -> ChatTemplate | None:
    """The template to use: the user's (text or path), chat_template.jinja, or the one that the config carries.

    `configured` is a text, or a list of {"name", "template"}; None when there is no template at all.
    """
    if override is not None:
        is_path = "{" not in override and "\n" not in override
        if is_path and not Path(override).expanduser().is_file():
            raise FileNotFoundError(f"chat_template={override!r} is neither a template (it has no braces) nor a file")
        return ChatTemplate(Path(override).expanduser().read_text(encoding="utf-8") if is_path else override)
    if directory is not None:
        file = directory / "chat_template.jinja"
        if file.is_file():
            return ChatTemplate(file.read_text(encoding="utf-8"))
        legacy = directory / "chat_template.json"
        if configured is None and legacy.is_file():
            configured = json.loads(legacy.read_text(encoding="utf-8")).get("chat_template")
    try:
        if isinstance(configured, list):
            configured = {entry["name"]: entry["template"] for entry in configured}
        return ChatTemplate(configured) if configured else None
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"the model's chat_template is no text and no list of names and templates: {configured!r:.80}; "
            "pass chat_template=..."
        ) from error


class _Generation(Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja's own filter, escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
