"""Text to token ids and back, chat templates included: one class over the `tokenizers` library.

`transformers` is not needed: tokenizer.json says everything, and from a GGUF file the same object is built out of
its metadata (`gguf_tokenizer`). Only models whose tokenizer is Python code of `transformers` fall back to it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as Backend

from nanovllm.loader.chat_template import ChatTemplate, read_chat_template
from nanovllm.loader.gguf_file import read_gguf
from nanovllm.loader.gguf_tokenizer import build_backend, special_token_ids
from nanovllm.loader.model_config import read_json
from nanovllm.loader.resolve import ModelSource, find_directory, resolve_model

LONG_TEXT = 4096  # characters, about a millisecond of work
_NO_TEMPLATE = "this model has no chat template: pass chat_template=..., or use generate() with a plain prompt"


class Encoded(NamedTuple):
    """What `encode` of a backend returns."""

    ids: list[int]


class PythonBackend:
    """A tokenizer that exists only as Python code of `transformers`, behind the methods of `tokenizers` we use."""

    decoder = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:
        return Encoded(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_batch_fast(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[Encoded]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokenizer.convert_ids_to_tokens(token_id) if token_id < len(self._tokenizer) else None

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.get_vocab().get(token)

    def get_vocab_size(self) -> int:
        return len(self._tokenizer)

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        special = set(self._tokenizer.all_special_ids)
        return {i: AddedToken(self.id_to_token(i) or "", special=True) for i in special}


class Tokenizer:
    """A model's tokenizer. Ids beyond the vocabulary (padded embeddings) decode to nothing."""

    def __init__(
        self,
        backend: Backend | PythonBackend,
        special: Mapping[str, str],
        template: ChatTemplate | None = None,
        name: str = "",
    ) -> None:
        """`special` maps "bos_token", "eos_token", … to their texts, which chat templates may use."""
        self.backend, self.special_tokens, self.chat_template, self.name = backend, dict(special), template, name

    @classmethod
    def from_source(
        cls, source: ModelSource, override: str | None = None, chat_template: str | None = None
    ) -> Tokenizer:
        """The tokenizer of a model, or of `override` (a directory, tokenizer.json, .gguf file or hub id).

        `chat_template` is a template's text or path and wins over the model's own. FileNotFoundError where there is
        no tokenizer, ValueError for one that cannot be built exactly.
        """
        path = source.path if override is None else Path(override).expanduser()
        if path.suffix == ".gguf" and path.is_file():
            return cls._from_gguf(path, chat_template)
        if override is not None and path.name == "tokenizer.json":
            path = path.parent
        if override == "smollm2":
            return cls._from_gguf(resolve_model(override).path, chat_template)
        directory = path if override is None else find_directory(str(path) if path.is_dir() else override)
        return cls._from_directory(directory, chat_template)

    @classmethod
    def _from_gguf(cls, path: Path, chat_template: str | None) -> Tokenizer:
        file = read_gguf(path)
        backend = build_backend(file)
        special = {name: file.metadata["tokenizer.ggml.tokens"][i] for name, i in special_token_ids(file).items()}
        template = read_chat_template(chat_template, None, file.metadata.get("tokenizer.chat_template"))
        return cls(backend, special, template, str(path))

    @classmethod
    def _from_directory(cls, directory: Path, chat_template: str | None) -> Tokenizer:
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second wins
            if (directory / name).is_file():
                config.update(read_json(directory / name))
        template = read_chat_template(chat_template, directory, config.get("chat_template"))
        special = {key: _text(value) for key, value in config.items() if key.endswith("_token") and _text(value)}
        file = directory / "tokenizer.json"
        if not file.is_file():
            return cls(_from_transformers(directory), special, template, str(directory))
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{file} cannot be read ({error}): fetch it again or upgrade `tokenizers`") from error
        backend.no_truncation()
        backend.no_padding()
        _add_missing_tokens(backend, config.get("added_tokens_decoder") or {})
        return cls(backend, special, template, str(directory))

    # -- text and ids ------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` puts BOS or EOS where the model was trained with them."""
        try:
            if len(text) < LONG_TEXT:
                return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
            # Alone among the library's methods those for batches let other Python threads run meanwhile.
            return list(self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(
                "the text holds half of a surrogate pair, which is no character: send valid Unicode"
            ) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it ("Ġhello"), None for an id without one."""
        token: str | None = self.backend.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        """The inverse of `id_to_token`."""
        token_id: int | None = self.backend.token_to_id(token)
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for: of a byte-level tokenizer perhaps a part of a character, else its text in UTF-8."""
        if not self.is_byte_level:
            return self.decode([token_id], skip_special_tokens=False).encode("utf-8")
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        alphabet = byte_alphabet()
        try:
            return bytes(alphabet[character] for character in token)
        except KeyError:  # an added token in plain text
            return token.encode("utf-8")

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text, added ones included; the model's embedding may be larger."""
        return int(self.backend.get_vocab_size())

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether a token is a sequence of bytes, whatever stands around it (GPT-2's scheme)."""
        return isinstance(self.backend.decoder, decoders.ByteLevel)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-sequence token."""
        return self.token_to_id(self.special_tokens.get("bos_token", ""))

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-sequence token."""
        return self.token_to_id(self.special_tokens.get("eos_token", ""))

    # -- chat --------------------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as the text the model was trained on; encode it with `add_special_tokens=False`.

        `kwargs` reach the template by name (`enable_thinking=False`). ValueError without a template, or when the
        template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(_NO_TEMPLATE)
        variables = {**self.special_tokens, **kwargs}
        return self.chat_template.render(messages, tools, add_generation_prompt=add_generation_prompt, **variables)

    def continue_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """`apply_chat_template`, cut where the last message's content ends, so that a model goes on with it."""
        mark = f"<{secrets.token_hex(16)}>"  # templates trim and wrap a message; this they leave where its end is
        *earlier, last = messages
        text = self.apply_chat_template([*earlier, {**last, "content": f"{last.get('content')}{mark}"}], **kwargs)
        if mark not in text:
            raise ValueError("the chat template does not show the last message, so it cannot be continued")
        return text[: text.index(mark)]


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _text(value: Any) -> str:
    """A special token is a string or a dictionary with its content."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def _add_missing_tokens(backend: Backend, added: Mapping[str, Mapping[str, Any]]) -> None:
    """Tokens that tokenizer_config.json declares and tokenizer.json lacks, in the order of their ids."""
    for token_id, entry in sorted(added.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(entry["content"]) is not None:
            continue
        options = {key: entry[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in entry}
        token = AddedToken(entry["content"], special=bool(entry.get("special")), **options)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != int(token_id):
            raise ValueError(
                f"added token {token.content!r} gets id {backend.token_to_id(token.content)} where "
                f"tokenizer_config.json says {token_id}: the two tokenizer files do not belong together"
            )


def _from_transformers(directory: Path) -> Backend | PythonBackend:
    """The tokenizer of a directory without tokenizer.json; FileNotFoundError, ImportError where that cannot work."""
    known = ("tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if not any((directory / name).is_file() for name in known):
        raise FileNotFoundError(
            f"{directory} holds no tokenizer files: pass tokenizer=..., or skip_tokenizer_init=True"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"{directory} has no tokenizer.json, and only transformers can read its tokenizer: pip install transformers"
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return getattr(tokenizer, "backend_tokenizer", None) or PythonBackend(tokenizer)
