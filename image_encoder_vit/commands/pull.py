"""
Takes the image encoder out of a checkpoint on the Hub or on this disk: DeepSeek-OCR, DeepSeek-OCR-2, Unlimited-OCR,
GOT-OCR2, Vary, Segment Anything, and conversions of them. From the Hub only the encoder's part of a safetensors
checkpoint is fetched. The folder appears complete, or not at all; a pull that was interrupted goes on where it was.
"""

import argparse
import sys
from collections.abc import Sequence

from transformers.utils import logging

from ..weights.hub_repository import one_line
from ..weights.pull import pull


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.set_verbosity_error()
    try:
        pulled = pull(
            arguments.source,
            arguments.output_dir,
            revision=arguments.revision,
            token=arguments.token,
            dtype=arguments.dtype,
            full_download=arguments.full_download,
            filename=arguments.filename,
            prefix=arguments.prefix,
        )
    except (OSError, ValueError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    for notice in pulled.notices:
        print(f"note: {notice}", file=sys.stderr)
    commit = f" at commit {pulled.commit}" if pulled.commit else ""
    print(f"{arguments.source}{commit}: layout {pulled.layout}, prefix {pulled.prefix!r}")
    if pulled.requests:
        print(f"Fetched {pulled.bytes_moved:,} bytes in {pulled.requests} requests")
    print(f"Wrote {pulled.tensors} tensors, {pulled.weight_bytes:,} bytes of weights, to {arguments.output_dir}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="Hub repository, local folder, or local file (.safetensors, .pth, .pt, .bin)")
    parser.add_argument("output_dir", help="folder to make; it must not exist")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository; default: main")
    parser.add_argument(
        "--token", help="Hub token for private and gated repositories; better set HF_TOKEN, which no process list shows"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the source's")
    parser.add_argument(
        "--full-download", action="store_true", help="download whole files into the cache, not the encoder's part only"
    )
    parser.add_argument("--filename", help="which file, where the source has several checkpoints")
    parser.add_argument("--prefix", help="which encoder, where a checkpoint has several: how its tensors' names begin")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
