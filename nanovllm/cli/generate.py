"""`nanovllm generate MODEL --prompt TEXT`: stream one answer to the terminal."""

from __future__ import annotations

import argparse
import sys
import time

from nanovllm.cli.options import add_engine_options, add_sampling_options, engine_kwargs, sampling_params
from nanovllm.outputs import RequestOutput


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("generate", help="complete a prompt, or answer a question with --chat")
    parser.add_argument("model", help='directory, .gguf file, hub id, or the alias "smollm2"')
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue; - reads standard input")
    source.add_argument("--chat", metavar="QUESTION", help="message to answer, through the model's chat template")
    parser.add_argument("--stats", action="store_true", help="print time to first token and tokens per second")
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of one sentence")
    add_sampling_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load the model, stream the answer, print the figures."""
    from nanovllm.llm import LLM

    started = time.perf_counter()
    params = sampling_params(args, max_tokens=256)
    with LLM(args.model, **engine_kwargs(args)) as llm:
        loaded = time.perf_counter()
        if args.chat is not None:
            outputs = llm.stream_chat([{"role": "user", "content": args.chat}], params)
        else:
            outputs = llm.stream(sys.stdin.read() if args.prompt == "-" else args.prompt, params)
        printed, output = 0, None
        for output in outputs:
            text = output.outputs[0].text
            print(text[printed:], end="", flush=True)
            printed = len(text)
        print()
        if output is not None and output.error:
            raise ValueError(output.error)
        if args.stats and output is not None:
            print(f"[{stats_line(output)}; loaded in {loaded - started:.1f} s]", file=sys.stderr)
    return 0


def stats_line(output: RequestOutput) -> str:
    """Tokens, time to first token and decoding speed of a finished request, in one line."""
    metrics, tokens = output.metrics, len(output.outputs[0].token_ids)
    if metrics is None or metrics.first_token_time is None or metrics.finished_time is None:
        return f"{tokens} tokens"
    first = metrics.first_token_time - metrics.arrival_time
    decode = metrics.finished_time - metrics.first_token_time
    speed = f", {(tokens - 1) / decode:.1f} tokens/s" if tokens > 1 and decode > 0 else ""
    return f"{tokens} tokens{speed}, first token after {first * 1000:.0f} ms"
