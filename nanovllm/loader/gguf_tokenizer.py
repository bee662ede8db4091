"""A `tokenizers` object out of GGUF metadata, equal to the model's original tokenizer.json.

The file has vocabulary, merges or scores, and the *name* of the rule that splits text before merging
(`tokenizer.ggml.pre`). A wrong rule gives other tokens silently, so names we do not know are refused.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from nanovllm.loader.gguf_file import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4  # token types; 1 is a normal token, 6 a byte

# The regular expressions are data of the models: they stand in their tokenizer.json files.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_LLAMA3 = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "tekken": _TEKKEN,
}
_SUPPORTED_PRE = ("smollm", "gpt-2", "default", *_SPLITS)
# Tokenizers that take a piece found in the vocabulary whole, without merging it.
_WHOLE_PIECES = {"llama-bpe", "llama3", "llama-v3", "smaug-bpe", "tekken"}


def build_backend(file: GGUFFile) -> Tokenizer:
    """ValueError for a kind of tokenizer or a splitting rule that is not supported."""
    kind = file.require("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(file)
    elif kind == "llama":
        tokenizer = _sentencepiece(file)
    else:
        raise ValueError(f"{file.path.name}: tokenizer kind {kind!r} is not supported; supported are gpt2 and llama")
    types = file.metadata.get("tokenizer.ggml.token_type", [])
    tokens = zip(file.metadata["tokenizer.ggml.tokens"], types, strict=False)
    added = [
        AddedToken(token, normalized=False, special=token_type == _CONTROL)
        for token, token_type in tokens
        if token_type in (_CONTROL, _USER_DEFINED) and token
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    _add_bos_and_eos(tokenizer, file)
    return tokenizer


def special_token_ids(file: GGUFFile) -> dict[str, int]:
    """Ids of the special tokens under Hugging Face's names."""
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {name: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: token_id for name, token_id in found.items() if token_id is not None}


def _byte_level(file: GGUFFile) -> Tokenizer:
    """GPT-2's scheme: text is split by a regular expression, pieces are bytes, merges are ranked."""
    pre = file.metadata.get("tokenizer.ggml.pre", "none")
    if pre not in _SUPPORTED_PRE:
        raise ValueError(
            f"{file.path.name}: pre-tokenizer {pre!r} is not supported; supported are {', '.join(_SUPPORTED_PRE)}"
        )
    vocab = {token: i for i, token in enumerate(file.require("tokenizer.ggml.tokens"))}
    # A piece may contain a space only in a piece of its own, so the first one after the start separates.
    merges = [_split_merge(merge) for merge in file.require("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _WHOLE_PIECES))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _SPLITS)
    steps: list[Any] = [plain]
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pre in _SPLITS:
        steps.insert(0, pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece(file: GGUFFile) -> Tokenizer:
    """Llama 2's and Mistral's scheme: spaces are ▁, unknown characters become bytes, scores rank the merges."""
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges_from_scores(vocab, file.require("tokenizer.ggml.scores"))
    unknown = special_token_ids(file).get("unk_token")
    tokenizer = Tokenizer(
        models.BPE(
            vocab, merges, unk_token=None if unknown is None else tokens[unknown], fuse_unk=True, byte_fallback=True
        )
    )
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return tokenizer


def _merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token out of two others, best score first.

    Ties: longer left half first, then longer right half, then the lower ids of the halves, as Hugging Face has it.
    """
    found = [
        (-score, -cut, cut - len(token), vocab[token[:cut]], vocab[token[cut:]], token, cut)
        for (token, _), score in zip(vocab.items(), scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    found.sort()
    return [(token[:cut], token[cut:]) for *_, token, cut in found]


def _add_bos_and_eos(tokenizer: Tokenizer, file: GGUFFile) -> None:
    """What `add_special_tokens` adds. Old files lack the flags: then llama.cpp's rule by kind of tokenizer holds."""
    metadata, ids = file.metadata, special_token_ids(file)
    adds_bos = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in _WHOLE_PIECES
    wanted = {
        "bos_token": metadata.get("tokenizer.ggml.add_bos_token", adds_bos),
        "eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    present = {
        name: (metadata["tokenizer.ggml.tokens"][ids[name]], ids[name])
        for name, add in wanted.items()
        if add and name in ids
    }
    if present:
        before = [present["bos_token"][0]] if "bos_token" in present else []
        after = [present["eos_token"][0]] if "eos_token" in present else []
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=list(present.values())
        )
