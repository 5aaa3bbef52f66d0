"""Chat templates in Jinja, rendered as transformers renders them, with what is said by whom.

transformers' own renderer is private and imports torch where that is installed; what it promises
to templates is little: a sandbox, `{% generation %}`, `tojson` and `raise_exception`, and lines
that hold only a block leave no whitespace.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Noncharacters of Unicode, which no text to be exchanged may hold.
OPEN, CLOSE = "\U000ffffe", "\U000fffff"

# As open-instruct encodes a conversation, and with it the published LLaMA Pro - Instruct. The
# contents are trimmed, so that an answer begins at a new token whatever it begins with.
LLAMA_PRO = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>\\n' }}
        {%- generation %}
            {{- message['content'] | trim }}{{ eos_token }}
        {%- endgeneration %}
        {%- if add_generation_prompt or not loop.last %}
            {{- '\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""


class TemplateError(Exception):
    """The template is malformed, or refuses these messages."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, str],
    add_generation_prompt: bool,
) -> str:
    """The text of a conversation, with OPEN and CLOSE round what the assistant says.

    Args:
      tokens: `bos_token` and its like.
      add_generation_prompt: end with the opened turn of the assistant.

    Raises:
      TemplateError: as its name says. The date (`strftime_now`) is not given to a template, as the
        same data would be other tokens tomorrow.
    """
    compiled = _compiled(template)
    try:
        return compiled.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **tokens,
        )
    except Exception as error:  # a template is a program: it fails in any way
        raise TemplateError(f"{error}" or type(error).__name__) from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"line {error.lineno}: {error}") from error


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what stands between is the assistant's."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (OPEN, CLOSE)]
        # A variable set within is not seen outside.
        return [marks[0], nodes.Scope(body, lineno=line), marks[1]]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
