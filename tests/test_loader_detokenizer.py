"""Streaming text: the pieces equal the whole, no half characters, stop strings wherever the pieces end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from nanovllm.loader import resolve_model
from nanovllm.loader.detokenizer import IncrementalDetokenizer, StopChecker
from nanovllm.loader.tokenizer import Tokenizer

SMOLLM2 = Tokenizer.from_source(resolve_model("smollm2"))
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁▁", "é", "你", "\n"]


def _sentencepiece() -> Tokenizer:
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(PIECES)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(PIECES[:3])
    return Tokenizer(backend, {})


SENTENCEPIECE = _sentencepiece()
TEXT = st.text(st.sampled_from("ab é你好🙂👩‍👩‍👧\n\t　0१"), max_size=40) | st.text(max_size=40)


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    return [detokenizer.add([token]) for token in ids] + [detokenizer.flush()]


@settings(deadline=None, max_examples=300)
@given(TEXT, st.booleans())
def test_text_of_a_byte_level_tokenizer(text: str, skip: bool) -> None:
    ids = SMOLLM2.encode(text)
    pieces = stream(SMOLLM2, ids, skip)
    assert "".join(pieces) == SMOLLM2.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in SMOLLM2.decode(ids):  # a few rare bytes are missing from the vocabulary
        assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 49151) | st.integers(0, 300), max_size=60), st.booleans())
def test_random_ids_of_a_byte_level_tokenizer(ids: list[int], skip: bool) -> None:
    """Half characters, lone continuation bytes, special tokens in between: still exactly the full decode."""
    assert "".join(stream(SMOLLM2, ids, skip)) == SMOLLM2.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(["▁a", "b", "▁", "▁▁", "é", "你", "</s>", "\n", "bytes ñ", "bytes 你", "bytes 🙂"])))
def test_sentencepiece(names: list[str]) -> None:
    ids: list[int] = []
    for name in names:
        if name.startswith("bytes "):
            ids += [3 + byte for byte in name[6:].encode()]
        else:
            ids.append(PIECES.index(name))
    pieces = stream(SENTENCEPIECE, ids)
    assert "".join(pieces) == SENTENCEPIECE.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_character_split_over_tokens_comes_whole() -> None:
    ids = SMOLLM2.encode("x🙂y")
    assert len(ids) > 3  # the emoji has several tokens
    assert [piece for piece in stream(SMOLLM2, ids) if piece] == ["x", "🙂", "y"]
    cut = stream(SMOLLM2, ids[:-2])
    assert cut[-1] == "\ufffd" and "".join(cut) == SMOLLM2.decode(ids[:-2])
    assert stream(SENTENCEPIECE, [PIECES.index("b"), 3 + 0xF0, 3 + 0x9F]) == ["b", "", "", "\ufffd\ufffd"]


class _Counting(Tokenizer):
    """Counts the tokens that pass through `decode`."""

    decoded = 0

    def decode(self, ids: object, skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)  # type: ignore[arg-type]
        return super().decode(ids, skip_special_tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize("token", ["b", "▁a", "<0x80>"])  # the last never becomes a character
def test_cost_is_linear(token: str) -> None:
    counting = _Counting(SENTENCEPIECE.backend, {})
    stream(counting, [PIECES.index(token)] * 2000)
    assert counting.decoded < 2000 * 24


# -- stop strings ----------------------------------------------------------------------------------------------------


def _reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Grow the text by one character at a time; the first time it ends with a stop string, cut there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(deadline=None, max_examples=500)
@given(
    st.lists(st.text("ab\n", max_size=5), max_size=8),
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
    st.booleans(),
)
def test_stop_strings_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str], include: bool) -> None:
    expected = _reference("".join(pieces), stops, include)
    checker, shown, hit = StopChecker(stops, include_stop=include), "", None
    for piece in pieces:
        visible, hit = checker.add(piece)
        shown += visible
        assert expected[0].startswith(shown)  # nothing has to be taken back
        if hit is not None:
            break
    else:
        shown += checker.flush()
    assert (shown, hit) == expected


def test_stop_checker_holds_back_no_more_than_needed() -> None:
    checker = StopChecker(["</end>", "\n\n"])
    assert checker.add("a </e") == ("a ", None)
    assert checker.add("x\n") == ("</ex", None)
    assert checker.add("b") == ("\nb", None)
    assert checker.add("<") == ("", None) and checker.flush() == "<" and checker.flush() == ""
    with pytest.raises(ValueError, match="must not be empty"):
        StopChecker(["a", ""])


def test_stop_strings_wait_for_min_tokens() -> None:
    """What is complete before is plain text; what began before and ends after counts."""
    checker = StopChecker(["ab"])
    assert checker.add("xab", may_stop=False) == ("xab", None)
    assert checker.add("a", may_stop=False) == ("", None)
    assert checker.add("bc") == ("", "ab")
