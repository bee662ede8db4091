"""The command `nanovllm`: generate | chat | serve | inspect | profile | tune | collect-env, each a small module."""

from __future__ import annotations

import argparse
import io
import os
import sys

from nanovllm import __version__
from nanovllm.cli import chat, collect_env, generate, inspect_model, profile, serve, tune


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="nanovllm", description="A small, readable LLM inference engine.")
    parser.add_argument("--version", action="version", version=f"nanovllm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (generate, chat, serve, inspect_model, profile, tune, collect_env):
        module.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command. A mistake of the user is one sentence on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no such letter shows \u4f60, and goes on
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has: no mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush complains
        return 141  # what shells report of a program that SIGPIPE ended; Windows has no such signal
    except (ValueError, TypeError, OSError, ImportError) as error:
        if args.debug:
            raise
        print(f"nanovllm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
