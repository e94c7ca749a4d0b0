"""Dataclasses as plain data, for JSON, and back; and texts from outside, for Markdown and figures."""

import re
import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar

Schema = TypeVar("Schema")

# Fields of older records by their names since.
RENAMED = {"healed": "training_helped"}


def to_dict(value: Any) -> Any:
    """Return a dataclass as a mapping, without what is not known (None); other values as they are."""
    if is_dataclass(value):
        parts = {name: to_dict(part) for name, part in vars(value).items() if part not in (None, {})}
        return parts | parts.pop("others", {})
    return [to_dict(part) for part in value] if isinstance(value, list | tuple) else value


def from_dict(kind: type[Schema], data: Mapping) -> Schema:
    """Return a mapping as a dataclass, which keeps what it does not know in its field `others`, if it has one.

    Raises:
        ValueError: Something that must be known is missing, or is of another kind.
    """
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
    except TypeError as error:  # names what is missing
        raise ValueError(str(error).replace(f"{kind.__name__}.__init__()", kind.__name__)) from error


def markdown_text(text: str) -> str:
    """Return a text from anywhere as Markdown that shows it as it is, in one line: no markup, HTML or mathematics."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Within a word an underscore is no markup.
    return re.sub(r"([\\`*\[\]|$~])|(?<![^\W_])(_)|(_)(?![^\W_])", r"\\\g<0>", text)


def code_text(text: str) -> str:
    """Return a text from anywhere as it can stand between backticks."""
    return " ".join(text.split()).replace("`", "")


def figure_text(text: str) -> str:
    """Return a text from anywhere as matplotlib shows it as it is, in one line."""
    return " ".join(text.split()).replace("$", r"\$")


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Return a value of JSON as one of type `hint`: numbers may stand for texts."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value)
    outer, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if outer is list and isinstance(value, list):
        return [_convert(inner[0], part, name) for part in value]
    if outer is tuple and isinstance(value, list) and len(value) == len(inner):
        return [_convert(kind, part, name) for kind, part in zip(inner, value, strict=True)]
    if outer is dict and isinstance(value, dict):
        return {key: _convert(inner[1], part, name) for key, part in value.items()}
    accepted: Any = {str: str | int | float, float: int | float}.get(outer, outer)
    if outer is not Any and (not isinstance(value, accepted) or (outer is not bool and isinstance(value, bool))):
        raise ValueError(f"{name} must be of type {getattr(outer, '__name__', outer)}, found {value!r}")
    return str(value) if outer is str else value
