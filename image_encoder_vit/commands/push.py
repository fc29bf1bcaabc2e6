"""
Publishes a folder with the image encoder on the Hub: weights, settings, code and card in one commit. Before anything
leaves, a fresh process loads the folder with its own code and must come to the same outputs. With --layout, the weights
alone go out under another family's names, to the Hub or, with --export-to, to a file.
"""

import argparse
import sys
from collections.abc import Sequence

from ..support import visible
from ..weights.export import export_weights
from ..weights.layouts import EXPORT_LAYOUTS
from ..weights.native_folder import export_native_folder
from ..weights.push import Pushed, push
from .frame import run_command
from .options import add_option, command_parser

NATIVE_FOLDER = "transformers-folder"


def main(argv: Sequence[str] | None = None) -> int:
    after_interrupt = "the same command can be given again"
    return run_command(push_encoder, parse_arguments(argv), after_interrupt=after_interrupt)


def push_encoder(arguments: argparse.Namespace) -> int:
    if arguments.export_to is not None:
        if arguments.layout == NATIVE_FOLDER:
            names = export_native_folder(arguments.model_dir, arguments.export_to)
        else:
            names = export_weights(arguments.model_dir, arguments.export_to, arguments.layout)
        print(f"Wrote {len(names)} tensors in the layout {arguments.layout} to {arguments.export_to}")
        return 0
    pushed = push(
        arguments.model_dir,
        arguments.repo_id,
        private=arguments.private or None,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
        dry_run=arguments.dry_run,
        layout=arguments.layout,
        token=arguments.token,
    )
    report(pushed, arguments.dry_run)
    return 0


def report(pushed: Pushed, is_dry_run: bool) -> None:
    """Prints what was published, or would be."""
    for name, size in pushed.files.items():
        print(f"{size:>13,} bytes  {visible(name)}")
    if pushed.left_out:
        print(f"Left out: {', '.join(map(visible, pushed.left_out))}")
    for notice in pushed.notices:
        print(f"note: {visible(notice)}", file=sys.stderr)
    if is_dry_run:
        card = "\n".join(map(visible, pushed.card.splitlines()))
        print(f"\nREADME.md:\n\n{card}\n")
        print("Dry run: nothing was sent.")
    else:
        print(f"{pushed.url} at commit {pushed.commit}, tag {pushed.revision}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("push", __doc__)
    parser.add_argument("model_dir", help="folder that pull or save_pretrained wrote")
    parser.add_argument("repo_id", nargs="?", help="repository to publish to, made where it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    add_option(parser, "--revision", help="branch to commit to, made where it does not exist; default: main")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--dry-run", action="store_true", help="check, and show files and card; touches no network")
    parser.add_argument(
        "--layout",
        choices=[*EXPORT_LAYOUTS, NATIVE_FOLDER],
        help=f"the weights alone, under another family's names; {NATIVE_FOLDER}: a DeepEncoder as a folder that "
        "transformers (5.20 and later) loads as its Unlimited-OCR without a decoder",
    )
    parser.add_argument(
        "--export-to", metavar="OUTPUT", help="with --layout: write a file (.safetensors) or folder, publish nothing"
    )
    parser.add_argument("--token", help="Hub token; better set HF_TOKEN, which no process list shows")
    arguments = parser.parse_args(argv)
    if arguments.export_to is not None and arguments.layout is None:
        parser.error("--export-to needs --layout")
    if arguments.layout == NATIVE_FOLDER and arguments.export_to is None:
        parser.error(f"--layout {NATIVE_FOLDER} needs --export-to")
    if (arguments.export_to is None) == (arguments.repo_id is None):
        parser.error("give either a repository or --export-to")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
