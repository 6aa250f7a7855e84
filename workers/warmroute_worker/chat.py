"""Chat messages to a prompt: the model folder's own Jinja template, in a sandbox.

Imports neither torch nor transformers. The dialect is that of transformers' `apply_chat_template`, for which these
templates are written: block trimming, `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, loop
controls.
"""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


class ChatTemplate:
    """Renders messages for one model."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: bos_token, eos_token ... as text. Raises ValueError for a template that Jinja refuses."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid (line {error.lineno}: {error.message})") from error
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate | None:
        """None when the model has none. Raises ValueError with one line for one that cannot be used."""
        config = _json_object(folder / "tokenizer_config.json")
        special_tokens = {
            name: token["content"] if isinstance(token, dict) else token
            for name, token in {**_json_object(folder / "special_tokens_map.json"), **config}.items()
            if name.endswith("_token") and isinstance(token, (str, dict))
        }
        source = _source(folder, config)
        return None if source is None else cls(source, special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that asks for the assistant's next message.

        Raises ValueError with one line when the template refuses these messages.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error


def _source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Where transformers looks, in its order: a file of its own (v5 and late v4), then tokenizer_config.json."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    template = config.get("chat_template") or _json_object(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
