"""`noisekd push` and `noisekd card`: a student for others."""

import argparse

from .options import add_switch, path
from .parser import Command, CommandParser


def add_push_options(parser: CommandParser) -> None:
    """Add the options of `noisekd push`."""
    parser.add_argument("--model", required=True, type=path, metavar="FOLDER", help="folder of the student")
    parser.add_argument(
        "--repo-id", required=True, metavar="ORGANISATION/NAME", help="where to push; made if it is not there"
    )
    add_switch(parser, "--private", "make a new repository private (default: as the organisation says)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: the main one)")
    parser.add_argument(
        "--commit-message",
        default="Upload student",
        metavar="TEXT",
        help="title of the commit (default: Upload student)",
    )


def push(args: argparse.Namespace) -> int:
    """Push a student; see [`hf_noisekd.release.push.push_model`]."""
    from hf_noisekd.release.push import push_model

    url = push_model(
        args.model,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        commit_message=args.commit_message,
    )
    print(f"{url}\nAnybody who may read it can run:\n  noisekd evaluate --model {args.repo_id} --dataset DATASET")
    return 0


def add_card_options(parser: CommandParser) -> None:
    """Add the options of `noisekd card`."""
    parser.add_argument(
        "source", type=path, metavar="SOURCE", help="folder of a student, or a JSON file of the records of several"
    )
    parser.add_argument(
        "--output-dir", type=path, metavar="FOLDER", help="where the card goes (default: SOURCE, if it is a folder)"
    )
    parser.add_argument(
        "--repo-id", metavar="ORGANISATION/NAME", help="where the student is on the Hub (default: as recorded)"
    )
    parser.add_argument(
        "--run", dest="run_name", metavar="NAME", help="which record of a file of several (default: the last one)"
    )


def card(args: argparse.Namespace) -> int:
    """Write a model card; see [`hf_noisekd.release.card.write_model_card`]."""
    from hf_noisekd.models.loading import model_folder
    from hf_noisekd.release.card import write_model_card

    source = args.source
    if not source.exists() and args.output_dir is not None:
        source = model_folder(str(source))[0]  # of the Hub
    print(write_model_card(source, args.output_dir, repo_id=args.repo_id, run=args.run_name))
    return 0


COMMANDS = (
    Command(
        push, add_push_options, "--model FOLDER --repo-id ORGANISATION/NAME [options]", "push a student to the Hub"
    ),
    Command(card, add_card_options, "SOURCE [options]", "write the model card of a student anew"),
)
