"""
Finds the pages of a feature store that are most like a page, an image, or a region of one.

FEATURES is a folder that `extract` wrote. QUERY is the id of one of its pages ("scan.pdf#2"), which will not find
itself, or an image file, PDF, or anything `extract` takes; it is encoded by the model and the settings of the store.

Ways to compare, by --by:
  reranked  the 50 pages (--shortlist) with the most similar pooled vectors, put into order by late interaction; the
            default for whole pages
  pooled    pooled vectors only: mean and deviation over the cells of a page, whitened over the store
  cell      the one cell of a page most similar to the mean of the query's
  late      late interaction with every page: for each cell of the query the most similar cell of the page, and the
            mean of these similarities; the default for a --region, which the vector of a whole page says little about

The first search writes the pooled vectors beside the index (pooled.safetensors); a store that has changed gets new
ones. Scores go up to 1; boxes are in px of the original images.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..corpora.search_modes import LATE, MODES, RERANKED, SHORTLIST_PAGES, Box
from .extract import positive
from .frame import run_command
from .options import add_option, check_output, command_parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(search, parse_arguments(argv), after_interrupt="the store is as it was")


def search(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        check_output(arguments.plot, arguments.overwrite)
    from .searching import find_and_show  # It takes the extra 'corpora', --help does not.

    print(find_and_show(arguments, arguments.by or (RERANKED if arguments.region is None else LATE)))
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("search", __doc__)
    parser.add_argument("features", metavar="FEATURES", help="folder that extract wrote")
    parser.add_argument("query", metavar="QUERY", help="id of a page of FEATURES, or an image file or PDF")
    parser.add_argument("--page", type=int, default=0, help="which page of a file, from 0 (default: 0)")
    parser.add_argument(
        "--region",
        type=region_px,
        metavar="TOP,LEFT,BOTTOM,RIGHT",
        help="search for this part of the page, in px of the original image",
    )
    parser.add_argument("--by", choices=MODES, help="how pages are compared, see above")
    parser.add_argument("--top", type=positive(int), default=10, metavar="N", help="pages to show (default: 10)")
    parser.add_argument(
        "--shortlist",
        type=positive(int),
        default=SHORTLIST_PAGES,
        metavar="N",
        help=f"pages that 'reranked' looks at closely (default: {SHORTLIST_PAGES})",
    )
    add_option(
        parser, "--checkpoint", default=None, help="model that encodes QUERY; default: the one that the store names"
    )
    for name in ("--revision", "--device"):
        add_option(parser, name)
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the query and the hits, framed")
    add_option(parser, "--overwrite", help="replace the picture of --plot")
    parser.add_argument("--json", action="store_true", help="print the hits as JSON")
    return parser.parse_args(argv)


def region_px(text: str) -> Box:
    try:
        top, left, bottom, right = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be TOP,LEFT,BOTTOM,RIGHT in px, such as 0,0,200,300, got {text!r}"
        ) from None
    return top, left, bottom, right


if __name__ == "__main__":
    raise SystemExit(main())
