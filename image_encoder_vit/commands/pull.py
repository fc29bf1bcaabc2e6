"""
Takes the image encoder out of a checkpoint on the Hub or on this disk: DeepSeek-OCR, DeepSeek-OCR-2, Unlimited-OCR,
GOT-OCR2, Vary, Segment Anything, and conversions of them. From the Hub only the encoder's part of a safetensors
checkpoint is fetched. The folder appears complete, or not at all; a pull that was interrupted goes on where it was.
"""

import argparse
import sys
from collections.abc import Sequence

from ..support import visible
from ..weights.layouts import ENCODER_PART, PARTS
from ..weights.pull import pull
from .frame import run_command
from .options import add_option, command_parser


def main(argv: Sequence[str] | None = None) -> int:
    after_interrupt = "the same command goes on where it was"
    return run_command(pull_encoder, parse_arguments(argv), after_interrupt=after_interrupt)


def pull_encoder(arguments: argparse.Namespace) -> int:
    pulled = pull(
        arguments.source,
        arguments.output_dir,
        revision=arguments.revision,
        token=arguments.token,
        dtype=arguments.dtype,
        full_download=arguments.full_download,
        verify=arguments.verify,
        filename=arguments.filename,
        prefix=arguments.prefix,
        part=arguments.part,
    )
    for notice in pulled.notices:
        print(f"note: {visible(notice)}", file=sys.stderr)
    commit = f" at commit {pulled.commit}" if pulled.commit else ""
    print(f"{arguments.source}{commit}: layout {pulled.layout}, prefix {pulled.prefix!r}")
    if pulled.requests:
        print(f"Fetched {pulled.bytes_moved:,} bytes in {pulled.requests} requests")
    print(f"Wrote {pulled.tensors} tensors, {pulled.weight_bytes:,} bytes of weights, to {arguments.output_dir}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("pull", __doc__)
    parser.add_argument("source", help="Hub repository, local folder, or local file (.safetensors, .pth, .pt, .bin)")
    parser.add_argument("output_dir", help="folder to make; it must not exist")
    add_option(parser, "--revision")
    parser.add_argument(
        "--token", help="Hub token for private and gated repositories; better set HF_TOKEN, which no process list shows"
    )
    add_option(parser, "--dtype", help="of the weights; default: the source's")
    parser.add_argument(
        "--full-download", action="store_true", help="download whole files into the cache, not the encoder's part only"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="download whole files, and compare their digests with those that the Hub states; a local file's with the "
        "published one's",
    )
    parser.add_argument("--filename", help="which file, where the source has several checkpoints")
    parser.add_argument(
        "--part",
        choices=PARTS,
        default=ENCODER_PART,
        help="deep-encoder: CLIP's tower, the projector and the learned tokens too, of DeepSeek-OCR and Unlimited-OCR",
    )
    parser.add_argument("--prefix", help="which encoder, where a checkpoint has several: how its tensors' names begin")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
