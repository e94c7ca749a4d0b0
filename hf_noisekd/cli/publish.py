"""`noisekd push` and `noisekd card`: a student for others."""

import argparse

from .options import add_switch, path
from .parser import CommandParser


def push_options(parser: CommandParser) -> None:
    add = parser.add_argument
    add("--model", required=True, type=path, metavar="FOLDER", help="folder of the student")
    add("--repo-id", required=True, metavar="ORGANISATION/NAME", help="where to push; made if it is not there")
    add_switch(parser, "--private", "make a new repository private (default: as the organisation says)")
    add("--revision", metavar="BRANCH", help="branch to commit to (default: the main one)")
    help = "replace another model there, its card and its weights; one of this package always is (default: false)"
    add_switch(parser, "--overwrite", help, dest="hub_overwrite")  # as in messages
    add("--commit-message", default="Upload student", metavar="TEXT", help="title of the commit (default: %(default)s)")


def push(args: argparse.Namespace) -> int:
    """Push a student; see [`hf_noisekd.release.push.push_model`]."""
    from hf_noisekd.release.push import push_model

    url = push_model(
        args.model,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        commit_message=args.commit_message,
        hub_overwrite=args.hub_overwrite,
    )
    print(f"{url}\nAnybody who may read it can run:\n  noisekd evaluate --model {args.repo_id} --dataset DATASET")
    return 0


def card_options(parser: CommandParser) -> None:
    add = parser.add_argument
    add("source", type=path, metavar="SOURCE", help="folder of a student; with --output-dir a Hub id, too")
    add("--output-dir", type=path, metavar="FOLDER", help="where the card goes (default: SOURCE)")
    add("--repo-id", metavar="ORGANISATION/NAME", help="where the student is on the Hub (default: as recorded)")


def card(args: argparse.Namespace) -> int:
    """Write a model card; see [`hf_noisekd.release.card.write_model_card`]."""
    from hf_noisekd.models.loading import model_folder
    from hf_noisekd.release.card import write_model_card
    from hf_noisekd.release.hub import check_repo_id

    if args.repo_id is not None:
        try:
            check_repo_id(args.repo_id)
        except ValueError as error:
            args.parser.error(f"--repo-id: {error}")
    source = args.source
    if not source.exists() and args.output_dir is not None:
        source = model_folder(str(source))[0]  # of the Hub
    print(write_model_card(source, args.output_dir, repo_id=args.repo_id))
    return 0
