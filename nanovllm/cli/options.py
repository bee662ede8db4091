"""Command-line options made from the dataclasses that they fill, so that names and help are written once."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.sampling_params import SamplingParams

_SAMPLING: tuple[str, ...] = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_SAMPLING += ("seed", "max_tokens", "min_tokens", "stop", "ignore_eos")


def add_engine_options(parser: argparse.ArgumentParser, seed: bool = False) -> None:
    """One `--max-model-len`-like option for every field of `EngineConfig`.

    `seed`: --seed is the engine's; other commands mean the request's by it.
    """
    group = parser.add_argument_group("engine options")
    hints = typing.get_type_hints(EngineConfig)
    for field in dataclasses.fields(EngineConfig):
        if field.name in _engine_names(seed):
            _add(group, field.name, _plain_type(hints[field.name]), field.default, field.metadata["help"])


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options for the fields of `SamplingParams` that make sense on a command line; unset ones are the model's."""
    group = parser.add_argument_group("sampling options (default: the model's own)")
    kinds: dict[str, type] = {
        "top_k": int,
        "seed": int,
        "max_tokens": int,
        "min_tokens": int,
        "stop": str,
        "ignore_eos": bool,
    }
    for name in _SAMPLING:
        kind = kinds.get(name, float)
        if name == "stop":
            group.add_argument("--stop", action="append", metavar="TEXT", help="end at this text (may be repeated)")
        elif kind is bool:
            group.add_argument(_flag(name), action="store_true", default=None, help="go on past the end-of-text token")
        else:
            group.add_argument(_flag(name), type=kind, default=None, metavar=kind.__name__.upper())


def engine_kwargs(args: argparse.Namespace, seed: bool = False) -> dict[str, Any]:
    """The engine options of parsed arguments, as keywords of `LLM`."""
    return {name: getattr(args, name) for name in _engine_names(seed)}


def sampling_params(args: argparse.Namespace, **defaults: Any) -> SamplingParams:
    """`SamplingParams` from parsed arguments; `defaults` fill what the user left unset."""
    given = {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) is not None}
    return SamplingParams(**{**defaults, **given})


def _engine_names(seed: bool) -> list[str]:
    """Fields of `EngineConfig` that are options."""
    return [f.name for f in dataclasses.fields(EngineConfig) if f.name != "model" and (seed or f.name != "seed")]


def _add(group: argparse._ArgumentGroup, name: str, kind: type, default: Any, help_text: str) -> None:
    shown = "" if default is None or isinstance(default, bool) or default == "auto" else f" (default: {default})"
    if kind is bool:
        action = "store_true" if default is False else argparse.BooleanOptionalAction
        group.add_argument(_flag(name), action=action, default=default, help=help_text)
    else:
        metavar = {int: "N", float: "X", str: "NAME"}[kind]
        group.add_argument(_flag(name), type=kind, default=default, metavar=metavar, help=help_text + shown)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _plain_type(annotation: Any) -> type:
    """`int | None` -> int."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return annotation
