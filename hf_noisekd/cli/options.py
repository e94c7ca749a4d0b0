"""Options of the command line, known without importing torch or transformers.

Names, help texts and defaults of the configuration classes are read off their source. [`CommandParser`] knows the
options of a command, takes them from a YAML file too, and names the nearest one to one that it does not know.
"""

import argparse
import ast
import difflib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ConfigOption:
    """A field of a configuration class, as its source says it.

    Attributes:
        name: Name of the field.
        annotation: Its type.
        help: Its help text, in which argparse's `%%` stands for `%`.
        default: Source text of its default, or None where there is none to tell.
        class_name: The class that has the last word on it.
    """

    name: str
    annotation: str
    help: str
    default: str | None
    class_name: str

    @property
    def is_switch(self) -> bool:
        """Whether the option alone, without a value, means true."""
        return "bool" in self.annotation.split(" | ")

    @property
    def is_list(self) -> bool:
        """Whether the option takes several values; of `None | str | list[str]` HfArgumentParser takes one."""
        kinds = [kind for kind in self.annotation.split(" | ") if kind != "None"]
        return kinds[-1].startswith("list[") and (len(kinds) == 1 or "None" not in self.annotation)


def config_options() -> dict[str, ConfigOption]:
    """Return the options of [`NoiseKDConfig`] by name, without importing it or transformers."""
    transformers = importlib.util.find_spec("transformers")
    if transformers is None or transformers.origin is None:
        raise ModuleNotFoundError("transformers is not installed: run `pip install hf-noisekd`.")
    sources = (
        (Path(transformers.origin).with_name("training_args.py"), ("TrainingArguments",)),
        (Path(__file__).parents[1] / "training" / "config.py", ("ClassifierConfig", "NoiseKDConfig")),
    )
    options = {}
    for path, class_names in sources:
        classes = {
            node.name: node
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.ClassDef)
        }
        for class_name in class_names:
            for option in _fields(classes[class_name]):
                options.pop(option.name, None)  # so that they come in the order of the class that has the last word
                options[option.name] = option
    return options


def _fields(node: ast.ClassDef) -> Iterator[ConfigOption]:
    """Yield the fields that a dataclass declares itself."""
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.value, ast.Call):
            continue
        arguments = {keyword.arg: keyword.value for keyword in statement.value.keywords}
        metadata = arguments.get("metadata")
        texts = (
            {} if metadata is None else dict(zip(map(ast.literal_eval, metadata.keys), metadata.values, strict=True))
        )
        yield ConfigOption(
            name=statement.target.id,
            annotation=ast.unparse(statement.annotation),
            help=ast.literal_eval(texts["help"]) if "help" in texts else "",
            default=_default_text(arguments.get("default")),
            class_name=node.name,
        )


def _default_text(default: ast.expr | None) -> str | None:
    if not isinstance(default, ast.Constant | ast.UnaryOp):
        return None
    value = ast.literal_eval(default)
    return None if value is None or value == "" else _as_text(value)


def _as_text(value) -> str:
    """Return a value of a YAML file as it would stand on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)


class CommandParser(argparse.ArgumentParser):
    """A parser that takes `--max_steps` for `--max-steps`, reads `--config`, and names the nearest option."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

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
        import yaml

        try:
            content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            self.error(f"cannot read the configuration file {path}: {error.strerror}.")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"the configuration file {path} is no YAML: {in_one_line(error)}")
        if not isinstance(content, dict):
            self.error(
                f"the configuration file {path} holds {'nothing' if content is None else type(content).__name__}: it "
                "must map names of options to values, such as `learning_rate: 0.001`."
            )
        tokens = []
        for key, value in content.items():
            option = f"--{key}".replace("_", "-")
            action = self._option_string_actions.get(option)
            # `no_...` and `help` take no value: there is `...: false`, and a file asks for no help.
            if action is None or action.nargs == 0 or action.dest == "config":
                self.error(f"the configuration file {path} has an unknown option {key!r}.{self._nearest(option)}")
            if isinstance(value, list) and action.nargs == "+":
                tokens += [option, *map(_as_text, value)]
            elif value is not None:
                tokens.append(f"{option}={_as_text(value)}")
        return tokens

    def _nearest(self, name: str) -> str:
        nearest = difflib.get_close_matches(name, self._option_string_actions, n=1)
        return f" Did you mean {nearest[0]}?" if nearest else f" `{self.prog} --help` lists all options."


def _with_dashes(token: str) -> str:
    """Return an option in the spelling with dashes; values as they are."""
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") and " " not in name else token


def in_one_line(error: Exception) -> str:
    """Return the message of an error without line breaks, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
