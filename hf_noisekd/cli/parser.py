"""A parser of options that also reads them from a YAML file, and names the nearest one to one that it does not know."""

import argparse
import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

# A word of Python with its value, if any; not in a path, and not in quotation marks.
ARGUMENT = r"""(?<![\w/.'"-])(\w+)(?:=('[^']*'|\w+(?:\.\w+)*))?(?![\w/'"=]|[.-]\w)"""


class CommandParser(argparse.ArgumentParser):
    """A parser that takes `--max_steps` for `--max-steps`, reads `--config`, and names the nearest option."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def expand(self, tokens: Sequence[str]) -> list[str]:
        """Return the tokens in the spelling that the parser knows, with those of the configuration file before them."""
        tokens = [_with_dashes(token) for token in tokens]
        for token in tokens[: tokens.index("--") if "--" in tokens else None]:
            name = token.partition("=")[0]
            # argparse, too, takes a word with a space in it for a value.
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                self.error(f"unknown option {name}.{self._nearest(name)}")
        finder = argparse.ArgumentParser(prog=self.prog, usage=self.usage, add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        config = finder.parse_known_args(tokens)[0].config
        return tokens if config is None else [*self._read_config(config), *tokens]

    def _read_config(self, path: str) -> list[str]:
        from yaml import YAMLError

        from .config_file import read_options, words

        try:
            options = read_options(path)
        except (OSError, ValueError, YAMLError) as error:
            self.error(f"cannot read the configuration file {path}: {in_one_line(error)}")
        tokens = []
        for key, value in options.items():
            option = f"--{key}".replace("_", "-")
            action = self._option_string_actions.get(option)
            # `no_...` and `help` take no value: there is `...: false`, and a file asks for no help.
            if action is None or action.nargs == 0 or action.dest == "config":
                self.error(f"the configuration file {path} has an unknown option {key!r}.{self._nearest(option)}")
            several = action.nargs == "+"
            values = words(value, several=several)
            if several and values:
                tokens += [option, *values]
            else:
                tokens += [f"{option}={word}" for word in values]
        return tokens

    def in_options(self, message: str) -> str:
        """Return a message in which arguments of Python, `output_dir` or `keep=0.5`, are options of the command line.

        What is in a path or in quotation marks is none. An option of the form `eval_NAME` may be called `NAME`.
        """
        options: dict[str, str] = {}
        for action in self._actions:
            for option in action.option_strings[:1]:
                options.setdefault(action.dest, option)  # `--no-...` of a switch comes second

        def option_of(found: re.Match) -> str:
            name, value = found[1], found[2]
            is_first = found.start() == 0 and message.startswith(f"{name} is ")
            if "_" not in name and value is None and not is_first:
                return found[0]  # a word of English
            named = options.get(name, options.get(f"eval_{name}"))
            return found[0] if named is None else " ".join(filter(None, [named, value and value.strip("'")]))

        return re.sub(ARGUMENT, option_of, message)

    def _nearest(self, name: str) -> str:
        nearest = difflib.get_close_matches(name, self._option_string_actions, n=1)
        return f" Did you mean {nearest[0]}?" if nearest else f" `{self.prog} --help` lists all options."


def _with_dashes(token: str) -> str:
    """Return an option in the spelling with dashes; values as they are."""
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") and " " not in name else token


def as_text(value: Any) -> str:
    """Return a value as it would stand on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)


def in_one_line(error: Exception) -> str:
    """Return the message of an error without line breaks, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
