"""Token ids, texts and chat prompts equal Hugging Face's, from tokenizer.json and from GGUF metadata."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_files import finish
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanovllm.loader import ModelSource, resolve_model
from nanovllm.loader.gguf_file import read_gguf
from nanovllm.loader.gguf_tokenizer import build_backend
from nanovllm.loader.tokenizer import Tokenizer

SOURCE = resolve_model("smollm2")
OURS = Tokenizer.from_source(SOURCE)
THEIRS = AutoTokenizer.from_pretrained(SOURCE.path.parent, gguf_file=SOURCE.path.name)

STRINGS = [
    "",
    " ",
    "\n\n\n",
    "The capital of France is Paris.",
    "  two  spaces   three\tand\ttabs\r\nCRLF \n \n ",
    "don't I'LL we've 'S 'd",
    "12345 3.14159 1,000,000 2024-01-02 0x1F",
    "naïve café Ünïcödé ﬁ Ａ é e\u0301",
    "你好，世界。 こんにちは 안녕하세요 مرحبا שלום ไทย",
    "🙂 👩‍👩‍👧‍👦 🇫🇷 👍🏽 ☃️",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # comment\n\tpass",
    "https://example.com/?q=a&b=%20#frag user@host.org",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_end|>x <|not a token|>",
    "\u200b\u00a0\u3000\ufeff\x00\x7f",
]


def test_the_alias_names_a_tokenizer_too() -> None:
    other = ModelSource("hf", Path("elsewhere"), "elsewhere")
    assert Tokenizer.from_source(other, "smollm2").encode("Hello") == Tokenizer.from_source(SOURCE).encode("Hello")


@pytest.mark.parametrize("text", STRINGS)
def test_smollm2_equals_hugging_face(text: str) -> None:
    expected = THEIRS.encode(text)
    assert OURS.encode(text) == expected
    for skip in (False, True):
        assert OURS.decode(expected, skip) == THEIRS.decode(expected, skip_special_tokens=skip)


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs", "N"]), max_size=60))
def test_smollm2_equals_hugging_face_on_random_text(text: str) -> None:
    assert OURS.encode(text) == THEIRS.encode(text)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a1b", ["a", "1", "b"]),
        ("a²³", ["a", "Â²", "Â³"]),
        ("2024", ["2", "0", "2", "4"]),
        ("x =   5", ["x", "Ġ=", "ĠĠĠ", "5"]),
        ("\n  10", ["ĊĠĠ", "1", "0"]),
    ],
)
def test_smollm2_splits_digits_before_spaces(text: str, tokens: list[str]) -> None:
    """SmolLM's rule, as its tokenizer.json has it; Hugging Face's reader of GGUF files does not know it."""
    assert [OURS.id_to_token(i) for i in OURS.encode(text)] == tokens


def test_a_long_text_is_no_other_and_does_not_stop_other_threads() -> None:
    """A second of work; the clock of another thread must not notice, for it may be the engine's."""
    text = "hello world 日本 " * 100_000
    ids: list[int] = []
    thread = threading.Thread(target=lambda: ids.extend(OURS.encode(text)))
    started = last = time.monotonic()
    thread.start()
    longest = 0.0
    while thread.is_alive():
        time.sleep(0.001)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    assert ids == OURS.backend.encode(text).ids
    assert longest < (last - started) / 2


@pytest.mark.parametrize("length", [0, 10_000])
def test_half_a_surrogate_pair_is_refused(length: int) -> None:
    """JSON can carry one; the tokenizers library would say that the text is no string."""
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        OURS.encode("a" * length + "\ud800b")


def test_special_tokens() -> None:
    assert (OURS.vocab_size, OURS.bos_token_id, OURS.eos_token_id) == (49152, 1, 2)
    assert OURS.token_to_id("<|im_end|>") == 2 and OURS.id_to_token(2) == "<|im_end|>"
    assert OURS.token_to_id("no such token") is None and OURS.id_to_token(10**6) is None
    assert {0, 1, 2} <= OURS.special_ids and OURS.encode("a")[0] not in OURS.special_ids
    assert OURS.decode([2, *OURS.encode("hi"), 10**6]) == "hi"


# -- directories ------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A byte-level tokenizer that puts BOS first, saved the way checkpoints have it."""
    backend = Backend.from_str(OURS.backend.to_str())  # type: ignore[union-attr]
    bos = ("<|im_start|>", 1)
    backend.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[bos])
    backend.enable_truncation(4)  # some published files carry this; it must not apply
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<|im_start|>", "lstrip": False},
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {"49152": {"content": "<tool>", "special": False, "normalized": False}},
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_directory_equals_hugging_face(directory: Path) -> None:
    ours = Tokenizer.from_source(ModelSource("hf", directory, "x"))
    theirs = AutoTokenizer.from_pretrained(directory)
    for text in [*STRINGS, "a <tool> b"]:
        for special in (True, False):
            assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special), text
    assert ours.encode("<tool>", add_special_tokens=False) == [49152]
    assert 49152 not in ours.special_ids and ours.bos_token_id == 1 and ours.eos_token_id == 2


def test_chat_prompt_has_one_bos(directory: Path) -> None:
    ours = Tokenizer.from_source(ModelSource("hf", directory, "x"))
    text = ours.apply_chat_template([{"role": "user", "content": "hi"}])
    assert ours.encode(text, add_special_tokens=False).count(1) == 1
    assert ours.encode(text).count(1) == 2  # which is why chat prompts are encoded without


def test_override_and_precedence(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for override in (str(directory), str(directory / "tokenizer.json")):
        assert Tokenizer.from_source(SOURCE, override).vocab_size == 49153
    assert Tokenizer.from_source(ModelSource("hf", directory, "x"), str(SOURCE.path)).vocab_size == 49152
    (directory / "chat_template.jinja").write_text("from the file")
    messages = [{"role": "user", "content": "hi"}]
    source = ModelSource("hf", directory, "x")
    assert Tokenizer.from_source(source).apply_chat_template(messages) == "from the file"
    mine = tmp_path_factory.mktemp("t") / "mine.jinja"
    mine.write_text("mine")
    for template, expected in ((str(mine), "mine"), ("{{ messages[0].content }}!", "hi!")):
        assert Tokenizer.from_source(source, chat_template=template).apply_chat_template(messages) == expected
    with pytest.raises(FileNotFoundError, match="neither a template .* nor a file"):
        Tokenizer.from_source(source, chat_template="no/such.jinja")


def test_bad_directories(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match="holds no tokenizer files"):
        Tokenizer.from_source(ModelSource("hf", empty, "x"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Tokenizer.from_source(SOURCE, "no/such/place.gguf")
    config = directory / "tokenizer_config.json"
    config.write_text(config.read_text().replace("49152", "50000"))
    with pytest.raises(ValueError, match="'<tool>' gets id 49152 where tokenizer_config.json says 50000"):
        Tokenizer.from_source(ModelSource("hf", directory, "x"))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        Tokenizer.from_source(ModelSource("hf", directory, "x"))


# -- other kinds of GGUF tokenizers -----------------------------------------------------------------------------------


def _sentencepiece_gguf(path: Path, **flags: Any) -> Path:
    words = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "bc", "abc", "▁abc", "▁▁", "ca", "▁c"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "<extra>"]
    scores = [0.0] * 259 + [-float(i // 2) for i in range(len(words))] + [0.0]
    types = [2, 3, 3] + [6] * 256 + [1] * len(words) + [4]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.scores", scores)
    ids = {f"tokenizer__ggml__{name}_token_id": i for i, name in enumerate(("unknown", "bos", "eos"))}
    lists = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__token_type": types}
    return finish(writer, tokenizer__ggml__model="llama", **lists, **ids, **flags)


@pytest.mark.parametrize("plain", [False, True])
def test_sentencepiece_equals_hugging_face(plain: bool, tmp_path: Path) -> None:
    flags = {f"tokenizer__ggml__add_{name}": False for name in ("space_prefix", "bos_token") if plain}
    path = _sentencepiece_gguf(tmp_path / "t.gguf", **flags)
    ours = Tokenizer.from_source(ModelSource("gguf", path, "t"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    for text in ["abc", " abc", "abcab cab  a", "é b", "你好 abc", "a<s>b", "x<extra>  c", "bcbca\nab"]:
        if plain:
            # Their reader ignores the flag; without the prefix the first space is a space like any other.
            assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
            assert ours.id_to_token(ours.encode("ab")[0]) == "ab"
        else:
            assert ours.encode(text) == theirs.encode(text), text
            assert ours.encode(text)[0] == 1
            ids = theirs.encode(text)
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "tekken", "gpt-2"])
def test_pre_tokenizers_split_as_hugging_face(pre: str, tmp_path: Path) -> None:
    """The same vocabulary under other splitting rules; their reader is built on the same published expressions."""
    metadata = read_gguf(SOURCE.path).metadata
    lists = {f"tokenizer__ggml__{key}": metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges", "token_type")}
    ids = {"tokenizer__ggml__bos_token_id": 1, "tokenizer__ggml__eos_token_id": 2}
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    path = finish(writer, tokenizer__ggml__model="gpt2", tokenizer__ggml__pre=pre, **lists, **ids)
    ours = Tokenizer.from_source(ModelSource("gguf", path, "t"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    bos = pre in ("llama-bpe", "tekken")  # llama.cpp's rule for files without the flag
    different = 0
    for text in [*STRINGS, "x =   5"]:
        found = ours.encode(text)
        assert found[:1] == [1] if bos else True
        if pre in ("llama-bpe", "tekken"):  # whole pieces first: these vocabularies are ranked that way
            assert ours.decode(found) == OURS.decode(OURS.encode(text))
        elif "e\u0301" not in text or pre != "qwen2":  # Qwen normalises to NFC
            assert found == theirs.encode(text), text
        different += found[bos:] != OURS.encode(text)
    assert different > 0  # the rule does something
    for text in ("I'll pay 12345  km²", "HelloWorld/x\n\n  y", "ÀB e\u0301'S ..?!\r\n"):
        mine, other = ours.backend.pre_tokenizer, theirs.backend_tokenizer.pre_tokenizer  # type: ignore[union-attr]
        assert mine.pre_tokenize_str(text) == other.pre_tokenize_str(text)  # type: ignore[union-attr]


def test_gguf_tokenizer_refusals(tmp_path: Path) -> None:
    for keys, message in (
        ({"model": "gpt2", "pre": "chatglm-bpe"}, "pre-tokenizer 'chatglm-bpe' is not supported; supported are smollm"),
        ({"model": "gpt2"}, "pre-tokenizer 'none' is not supported"),
        ({"model": "bert"}, "tokenizer kind 'bert' is not supported; supported are gpt2 and llama"),
        ({"pre": "smollm"}, "has no metadata 'tokenizer.ggml.model'"),
    ):
        writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
        path = finish(writer, **{f"tokenizer__ggml__{key}": value for key, value in keys.items()})
        with pytest.raises(ValueError, match=message):
            build_backend(read_gguf(path))


def test_without_tokenizer_json_transformers_steps_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path: made)
    ours = Tokenizer.from_source(ModelSource("hf", tmp_path, "x"))
    assert ours.encode("a b c") == made.encode("a b c") == [1, 2, 0]
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match="only transformers can read its tokenizer: pip install transformers"):
        Tokenizer.from_source(ModelSource("hf", tmp_path, "x"))
