"""`nanovllm serve MODEL`: an HTTP server that speaks OpenAI's API."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from typing import TYPE_CHECKING

from nanovllm.cli.options import add_engine_options, engine_kwargs
from nanovllm.config import EngineConfig

if TYPE_CHECKING:
    from nanovllm.async_llm import AsyncLLM

_EXTRA = {"starlette", "uvicorn", "llguidance"}
_SWITCH_S = 0.0001  # how long the thread of the engine waits for the one of the event loop at most
KEY_VARIABLE = "NANOVLLM_API_KEY"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("serve", help="answer OpenAI's HTTP API (needs starlette, uvicorn, llguidance)")
    parser.add_argument("model", help='directory, .gguf file, hub id, or the alias "smollm2"')
    group = parser.add_argument_group("server options")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all of them (default: 127.0.0.1)"
    )
    group.add_argument("--port", type=int, default=8000, metavar="N", help="0: a free one (default: 8000)")
    group.add_argument(
        "--served-model-name", nargs="+", default=[], metavar="NAME", help="what clients call it (default: MODEL)"
    )
    group.add_argument(
        "--api-key", action="append", metavar="KEY", help=f"demand this key (may be repeated; default: ${KEY_VARIABLE})"
    )
    group.add_argument(
        "--allowed-origins", nargs="+", default=["*"], metavar="ORIGIN", help="web pages that may ask (default: *)"
    )
    group.add_argument(
        "--shutdown-timeout", type=int, default=10, metavar="S", help="seconds for running requests (default: 10)"
    )
    group.add_argument("--debug", action="store_true", help="show a traceback instead of one sentence")
    add_engine_options(parser, seed=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Listen, load, serve until a signal comes."""
    try:
        from nanovllm.server.app import Service, create_app
        from nanovllm.server.run import listen, serve
    except ImportError as error:
        if (error.name or "").split(".")[0] not in _EXTRA:
            raise
        raise ImportError(f"serve needs {error.name}: pip install starlette uvicorn llguidance") from error
    options = engine_kwargs(args, seed=True)
    EngineConfig.from_kwargs(args.model, **options)  # mistakes that need no model
    keys = args.api_key or [key for key in [os.environ.get(KEY_VARIABLE)] if key is not None]
    if not all(keys):
        raise ValueError("the API key is empty, which protects nothing: give one, or leave out --api-key")
    if args.shutdown_timeout < 0:
        raise ValueError("--shutdown-timeout must be 0 seconds or more")
    service = Service(args.model, args.served_model_name, keys)
    app = create_app(service, args.allowed_origins)

    def load() -> AsyncLLM:
        from nanovllm.async_llm import AsyncLLM

        return AsyncLLM(args.model, **options)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    sys.setswitchinterval(_SWITCH_S)
    if not asyncio.run(serve(service, app, listen(args.host, args.port), load, args.shutdown_timeout, say)):
        say("stopped while loading")
        os._exit(0)
    return 0
