"""Text out of a stream of tokens, and where it has to stop.

Both classes take small pieces and never take back what they gave out. Nothing here looks further back than a
character or a stop string is long, so a long answer costs linear time.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.loader.tokenizer import Tokenizer

# A character has at most 4 bytes, so more undecidable tokens than this are not the beginning of one.
_MAX_HELD_TOKENS = 8


class IncrementalDetokenizer:
    """Token ids in, new text out, never half a character.

    Byte-level tokenizers: the pieces together equal `tokenizer.decode` of all ids, exactly. Others (SentencePiece):
    equal wherever the bytes are UTF-8; a run of invalid bytes may give a different number of U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._bytes: codecs.IncrementalDecoder | None = None
        if tokenizer.is_byte_level:
            self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context: list[int] = []  # tokens given out last: SentencePiece treats the first token differently
        self._held: list[int] = []  # tokens whose text is not decided yet

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        visible = [i for i in token_ids if i not in self._skipped]
        if self._bytes is not None:
            return self._bytes.decode(b"".join(map(self._tokenizer.token_bytes, visible)))
        return "".join(self._add_one(token_id) for token_id in visible)

    def flush(self) -> str:
        """The end: what was held back, with U+FFFD for a character that never came to its end."""
        if self._bytes is not None:
            return self._bytes.decode(b"", final=True)
        return self._release() if self._held else ""

    def _add_one(self, token_id: int) -> str:
        self._held.append(token_id)
        undecided = self._decode(self._context + self._held).endswith("\ufffd")
        return "" if undecided and len(self._held) < _MAX_HELD_TOKENS else self._release()

    def _release(self) -> str:
        known = len(self._decode(self._context))
        text = self._decode(self._context + self._held)[known:]
        self._context, self._held = self._held, []
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class StopChecker:
    """Cuts a stream of text at the first stop string, wherever the pieces of the stream begin and end.

    Text that may be the beginning of a stop string is held back until it is not. If several stop strings match, the
    one that is complete first counts, and of those the longest.
    """

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        """ValueError for an empty stop string, which would match everywhere."""
        if not all(stop):
            raise ValueError("a stop string must not be empty")
        self._stop, self._include = list(stop), include_stop
        self._held = ""

    def add(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """(text to show now, the stop string that ended it or None). After a stop nothing more may be added.

        With `may_stop=False` (before a request's `min_tokens`) a stop string that this text completes is plain text.
        """
        text = self._held + text
        wanted = self._stop if may_stop else []
        matches = [(start + len(stop), start, stop) for stop in wanted if (start := text.find(stop)) >= 0]
        if matches:
            end, start, stop = min(matches)
            self._held = ""
            return text[: end if self._include else start], stop
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back, when the stream ends without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
