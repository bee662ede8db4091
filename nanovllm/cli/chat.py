"""`nanovllm chat MODEL`: a conversation in the terminal.

The answer streams; Ctrl-C stops the answer, not the program; the history is kept until /reset.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from nanovllm.cli.generate import stats_line
from nanovllm.cli.options import add_engine_options, add_sampling_options, engine_kwargs, sampling_params
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.llm import LLM

_HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /stats shows speeds, /exit leaves"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("chat", help="talk to a model")
    parser.add_argument(
        "model", nargs="?", default="smollm2", help='directory, .gguf file, hub id (default: "smollm2")'
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of one sentence")
    add_sampling_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load the model and talk until /exit or end of input."""
    from nanovllm.llm import LLM

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()

    params = sampling_params(args, max_tokens=1024)
    with LLM(args.model, **engine_kwargs(args)) as llm:
        print(f"Ready. {_HELP}; Ctrl-C stops an answer.")
        Conversation(llm, params, args.system).loop()
    return 0


class Conversation:
    """History and the loop over the user's lines."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self.llm, self.params, self.show_stats = llm, params, False
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def loop(self) -> None:
        """Read, answer, repeat; Ctrl-C at the prompt clears the line, Ctrl-D leaves."""
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("  (/exit or Ctrl-D leaves)")
                continue
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                print(self.command(line))
            elif line:
                self.answer(line)

    def command(self, line: str) -> str:
        """Carry out a slash command; returns what to tell the user."""
        name, _, argument = line.partition(" ")
        if name == "/reset":
            self.reset()
            return "The conversation is forgotten."
        if name == "/system":
            self.system = argument.strip() or None
            self.reset()
            return "New system prompt; the conversation starts again." if self.system else "No system prompt any more."
        if name == "/stats":
            self.show_stats = not self.show_stats
            return f"Speeds are {'shown' if self.show_stats else 'hidden'}."
        return _HELP if name == "/help" else f"Unknown command {name}: {_HELP}"

    def answer(self, text: str) -> None:
        """Stream the answer; what was said before an interrupt stays in the history."""
        self.messages.append({"role": "user", "content": text})
        reply, output = "", None
        try:
            with interrupt_flag() as interrupted:
                for output in self.llm.stream_chat(self.messages, self.params):
                    print(output.outputs[0].text[len(reply) :], end="", flush=True)
                    reply = output.outputs[0].text
                    if interrupted:
                        break
        except ValueError as error:  # say, a conversation longer than the context
            self.messages.pop()
            print(f"{error}\n(/reset starts a new conversation)")
            return
        print(" [stopped]" if interrupted else "")
        if output is not None and output.error:
            print(f"[{output.error}]", file=sys.stderr)
        self.messages.append({"role": "assistant", "content": reply})
        if self.show_stats and output is not None:
            print(f"[{stats_line(output)}]")


@contextlib.contextmanager
def interrupt_flag() -> Iterator[list[bool]]:
    """While active, Ctrl-C fills the yielded list instead of raising: a step is never torn in the middle."""
    flag: list[bool] = []

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        flag.append(True)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
