"""The command `noisekd` itself: which commands there are, and their exit codes."""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import NamedTuple

from . import deploy, distill, measure, options, publish
from .parser import CommandParser, in_one_line
from .stopping import Terminated, exit_code, raising_at_sigterm
from .text import showing_log

EPILOG = """\
examples:
  noisekd info --teacher resnet18.a1_in1k
  noisekd distill --teacher MODEL --keep 0.5 --output-dir student --max-steps 2000
  noisekd distill --teacher resnet18.a1_in1k --keep 0.75 --images FOLDER --output-dir student --max-hours 0.5
  noisekd push --model student --repo-id organisation/student
  noisekd evaluate --model organisation/student --dataset FOLDER_OR_HUB_ID --split test

`noisekd COMMAND --help` lists the options of a command.
"""


class Command(NamedTuple):
    """What is known of a command."""

    name: str
    run: Callable[[argparse.Namespace], int]
    add_options: Callable[[CommandParser], None]
    help: str
    examples: str = ""


COMMANDS = (
    Command("distill", distill.distill, distill.distill_options, "train a student with noise"),
    Command("evaluate", measure.evaluate, measure.evaluate_options, "measure a model on labelled images"),
    Command("info", measure.info, measure.info_options, "say whether a model can be a teacher; if not, exit code 1"),
    Command(
        "recalibrate",
        deploy.recalibrate,
        deploy.recalibrate_options,
        "re-estimate running statistics, without data or from some real images",
        deploy.RECALIBRATE_EXAMPLES,
    ),
    Command(
        "export",
        deploy.export,
        deploy.export_options,
        "write a model as one file for other runtimes",
        deploy.EXPORT_EXAMPLES,
    ),
    Command("convert", deploy.convert, deploy.convert_options, "save a model, or a file of weights, as a folder"),
    Command("push", publish.push, publish.push_options, "push a student to the Hub"),
    Command("card", publish.card, publish.card_options, "write the model card of a student anew"),
)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command, with its `run` and its `parser`; wrong usage and help are a `SystemExit`."""
    parser = CommandParser(
        prog="noisekd",
        usage="noisekd COMMAND [options]",
        description="Distill a CNN into a smaller one with pure noise: no images, no labels, no generator network.",
        epilog=EPILOG,
    )
    text = f"hf_noisekd {version('hf-noisekd')}"
    parser.add_argument("--version", action="version", version=text, help="print the version")
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND [options]", required=True, title="commands", prog="noisekd"
    )
    tokens = list(argv)
    place = next((index for index, token in enumerate(tokens) if not token.startswith("-")), len(tokens))
    for command in COMMANDS:
        description = f"{command.help[0].upper()}{command.help[1:]}."
        subparser = subparsers.add_parser(
            command.name, help=command.help, description=description, epilog=command.examples
        )
        if tokens[place : place + 1] != [command.name]:
            continue  # another command: `distill` would import transformers
        subparser.set_defaults(run=command.run, parser=subparser)
        help = "YAML file of options, such as `output_dir: student`; those of the command line go over it"
        subparser.add_argument("--config", metavar="FILE", help=help)
        options.add_switch(subparser, "--debug", "show where an error comes from (default: false)")
        command.add_options(subparser)
        required = [action for action in subparser._actions if action.required]
        words = [word for action in required for word in (*action.option_strings, str(action.metavar))]
        subparser.usage = " ".join([subparser.prog, *words, "[options]"])
        tokens[place + 1 :] = subparser.expand(tokens[place + 1 :])
    args, rest = parser.parse_known_args(tokens)
    if rest:
        args.parser.error(f"unexpected: {' '.join(rest)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of some words, by default those of this process after `noisekd`, and return its exit code."""
    prog, debug, args = "noisekd", False, None
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        prog, debug = args.parser.prog, args.debug
        with raising_at_sigterm(), showing_log(args.parser.in_options):
            return args.run(args)
    except (KeyboardInterrupt, Terminated) as stop:
        beginning = "\n" if sys.stderr.isatty() else ""  # below a progress bar, and what Ctrl-C is echoed as
        print(f"{beginning}{prog}: interrupted{str(stop) or '.'}", file=sys.stderr)
        return exit_code(stop)
    except SystemExit as stop:
        if not isinstance(stop.code, int):
            raise
        return stop.code  # of argparse, which has printed why
    except Exception as error:
        if debug:
            raise
        message = args.parser.in_options(in_one_line(error)) if args else in_one_line(error)
        is_usage = type(error).__name__ == "UsageError"
        if args and is_usage:
            args.parser.print_usage(sys.stderr)
        elif not _says_all(error):
            message = f"{type(error).__name__}: {message} (--debug shows where it comes from)"
        print(f"{prog}: error: {message}", file=sys.stderr)
        return 2 if is_usage else 1


def _says_all(error: Exception) -> bool:
    """Whether the message of an error is enough for the user: of the system, of the Hub, or of this package."""
    if isinstance(error, OSError) or type(error).__module__.startswith(("huggingface_hub", "httpx")):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    raised_in = str(frame.f_globals.get("__package__")).partition(".")[0]
    return raised_in in ("hf_noisekd", __package__) and isinstance(
        error, ValueError | RuntimeError | ArithmeticError | ImportError
    )


if __name__ == "__main__":
    sys.exit(main())
