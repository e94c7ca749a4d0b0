"""A YAML file of options, read as if it were typed on the command line.

YAML's own idea of a text would make a folder 20240101 of `2024_01_01`, and a text of the number `1e-5`. So a value is
what stands in the file, and only inside a mapping, such as `lr_scheduler_kwargs: {min_lr: 1e-5}`, a number is a number.
"""

import json
import math
from pathlib import Path
from typing import Any

MAX_VALUES = 10_000  # a few lines of anchors can stand for more than a memory holds


def read_options(path: str) -> dict[str, Any]:
    """Return the nodes of a file by the names of their options.

    Raises:
        ValueError: It cannot be read, or says something twice or without an end; the message is half a sentence.
    """
    import yaml

    file = Path(path).expanduser()
    try:
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise OSError(0, "Not a regular file")
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"cannot read the configuration file {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the configuration file {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        kind = "nothing" if root is None else {"SequenceNode": "list", "ScalarNode": "text"}[type(root).__name__]
        raise ValueError(
            f"the configuration file {path} holds {kind}: it must map names of options to values, such as "
            "`learning_rate: 0.001`."
        )
    try:
        _check(root)
    except ValueError as error:
        raise ValueError(f"the configuration file {path} {error}") from error
    return {key.value: value for key, value in root.value}


def words(node: Any, *, several: bool) -> list[str]:
    """Return the words that would stand behind the option; none if it is left empty. `several` if it takes more."""
    if node.id == "scalar":
        return [] if node.style is None and node.tag.endswith(":null") else [node.value]
    if several and node.id == "sequence":
        return [_word(item) for item in node.value]
    if several:
        return [f"{key.value}={_word(value)}" for key, value in node.value]
    return [json.dumps(_plain(node))]


def _check(root: Any) -> None:
    """Raise a `ValueError` if a mapping has a key twice, an anchor holds itself, or there are too many values."""
    count = 0

    def visit(node: Any, around: tuple) -> None:
        nonlocal count
        count += 1
        line = node.start_mark.line + 1
        if node in around:
            raise ValueError(f"has an anchor in line {line} that holds itself: write out what is meant.")
        if count > MAX_VALUES:
            raise ValueError(f"stands for more than {MAX_VALUES:,} values: write out what is meant.")
        if node.id == "mapping":
            seen = set()
            for key, value in node.value:
                if key.id != "scalar":
                    raise ValueError(f"has a key in line {key.start_mark.line + 1} that is no name.")
                name = key.value.replace("-", "_")
                if name in seen:
                    raise ValueError(f"has {key.value!r} twice, again in line {key.start_mark.line + 1}: keep one.")
                seen.add(name)
                visit(value, (*around, node))
        elif node.id == "sequence":
            for item in node.value:
                visit(item, (*around, node))

    visit(root, ())


def _word(node: Any) -> str:
    return node.value if node.id == "scalar" else json.dumps(_plain(node))


def _plain(node: Any) -> Any:
    """Return what a value in a mapping or a list is: a number, true, false or null, and a text where it is quoted."""
    if node.id == "sequence":
        return [_plain(item) for item in node.value]
    if node.id == "mapping":
        return {key.value: _plain(value) for key, value in node.value}
    if node.style is not None:
        return node.value
    words = {"": None, "~": None, "null": None, "true": True, "false": False}
    if node.value.lower() in words:
        return words[node.value.lower()]
    for number in (int, float):
        try:
            value = number(node.value)
        except ValueError:
            continue
        if math.isfinite(value):
            return value
    return node.value
