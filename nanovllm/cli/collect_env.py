"""`nanovllm collect-env`: what a bug report needs to know about a machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys

_PACKAGES: tuple[str, ...] = (
    "torch",
    "triton",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "gguf",
    "numpy",
    "jinja2",
    "transformers",
)
_PACKAGES += ("flash_attn", "flashinfer-python", "starlette", "uvicorn", "llguidance")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("collect-env", help="print versions and devices for a bug report")
    parser.set_defaults(run=run, debug=False)


def run(args: argparse.Namespace) -> int:
    """Print one `name: value` a line."""
    for name, value in environment().items():
        print(f"{name}: {value}")
    return 0


def environment() -> dict[str, str]:
    """Versions of Python, packages, driver and GPU; nothing that identifies the user."""
    import torch

    from nanovllm import __version__

    facts = {
        "nanovllm": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
    }
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["cuda (torch build)"] = str(torch.version.cuda)
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            facts[f"gpu {i}"] = (
                f"{properties.name}, capability {properties.major}.{properties.minor}, "
                f"{properties.total_memory / 2**30:.1f} GiB, {properties.multi_processor_count} SMs"
            )
    else:
        facts["gpu"] = "none that torch can use"
    return facts
