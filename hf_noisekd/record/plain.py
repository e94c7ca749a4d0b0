"""Dataclasses as plain data for JSON, and back; and texts escaped for Markdown and figures."""

import re
import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar

Schema = TypeVar("Schema")

# Renamed fields of older records.
RENAMED = {"healed": "training_helped"}


def to_dict(value: Any) -> Any:
    """Return a dataclass as a mapping, without fields that are None or empty; other values as they are."""
    if is_dataclass(value):
        parts = {name: to_dict(part) for name, part in vars(value).items() if part not in (None, {})}
        return parts | parts.pop("others", {})
    return [to_dict(part) for part in value] if isinstance(value, list | tuple) else value


def from_dict(kind: type[Schema], data: Mapping) -> Schema:
    """Return a mapping as a dataclass, with unknown keys in `others`, if any; a `ValueError` if it does not fit."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{kind.__name__} must be a mapping, found {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    known = {}
    for name, value in data.items():
        name = RENAMED.get(name, name)
        if name in hints and value is not None:
            known[name] = _convert(hints[name], value, f"{kind.__name__}.{name}")
    if "others" in hints:
        known["others"] = {name: value for name, value in data.items() if name not in hints}
    try:
        return kind(**known)
    except TypeError as error:  # names the missing field
        raise ValueError(str(error).replace(f"{kind.__name__}.__init__()", kind.__name__)) from error


def markdown_text(text: str) -> str:
    """Return a text escaped for Markdown, in one line: no markup, HTML or mathematics."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Within a word an underscore is no markup.
    return re.sub(r"([\\`*\[\]|$~])|(?<![^\W_])(_)|(_)(?![^\W_])", r"\\\g<0>", text)


def code_text(text: str) -> str:
    """Return a text that can stand between backticks."""
    return " ".join(text.split()).replace("`", "")


def figure_text(text: str) -> str:
    """Return a text escaped for matplotlib, in one line."""
    return " ".join(text.split()).replace("$", r"\$")


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Return a value of JSON as one of type `hint`; numbers become texts where a text is expected."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value)
    if typing.get_origin(hint) is list and isinstance(value, list):
        return [_convert(typing.get_args(hint)[0], part, name) for part in value]
    kind: Any = typing.get_origin(hint) or hint
    if kind not in (Any, tuple) and not isinstance(value, {str: str | int | float, float: int | float}.get(kind, kind)):
        raise ValueError(f"{name} must be of type {kind.__name__}, found {value!r}")
    return str(value) if hint is str else value
