"""A YAML file of options, read as if it were typed on the command line.

YAML's own idea of a text would make a folder 20240101 of `2024_01_01`, and a text of the number `1e-5`. So a value is
what stands in the file, and only inside a mapping, such as `lr_scheduler_kwargs: {min_lr: 1e-5}`, a number is a number.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import yaml


class _Plain(str):  # a text that is not quoted, and so may mean a number, true, false or null
    pass


class _Loader(yaml.BaseLoader):
    """A loader to whom all that is no list and no mapping is a text, and that takes no key twice."""

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        return node.value if node.style else _Plain(node.value)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)
        names = [key.value.replace("-", "_") for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if names[index] in names[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"found {key.value!r} twice", key.start_mark)
        return mapping


def read_options(path: str) -> dict[str, Any]:
    """Return the values of a file by the names of their options."""
    options = yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), _Loader)
    if not isinstance(options, dict):
        raise ValueError("it must map options to values, such as `learning_rate: 0.001`.")
    return options


def words(value: Any, *, several: bool) -> list[str]:
    """Return the words that would stand behind the option; none if it is left empty. `several` if it takes more."""
    if isinstance(value, _Plain) and _meant(value) is None:
        return []
    if several and isinstance(value, dict):
        return [f"{key}={_word(part)}" for key, part in value.items()]
    return [_word(part) for part in (value if several and isinstance(value, list) else [value])]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(_meant(value))


def _meant(value: Any) -> Any:
    """Return a value with its numbers, true, false and null in place of the texts that mean them."""
    if isinstance(value, dict):
        return {key: _meant(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_meant(part) for part in value]
    if not isinstance(value, _Plain):
        return value
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(value)
    return {"": None, "~": None, "null": None, "true": True, "false": False}.get(value.lower(), value)
