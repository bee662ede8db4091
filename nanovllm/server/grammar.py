"""`response_format`: answers that are JSON, of any shape or of a schema's.

llguidance knows after every token which ones may follow; the others' logits become minus infinity, in a logits
processor like any user's.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLTokenizer

from nanovllm.server.answers import tokenizer_of
from nanovllm.server.errors import ApiError
from nanovllm.server.protocol import Body

if TYPE_CHECKING:
    import torch

    from nanovllm.engine.llm_engine import LLMEngine

FIELD = "response_format"
# A schema that leaves white space open lets a small model fill its answer with it.
_COMPACT: Any = {"whitespace_flexible": False}


class Grammars:
    """Makes logits processors for one engine. The tokenizer's tables take a second to build: once, when asked for.

    `read` runs on `thread`: hostile schemas take up to half a minute, for which only other schemas shall wait.
    """

    def __init__(self) -> None:
        self._tables: LLTokenizer | None = None
        self.thread = ThreadPoolExecutor(1, "nanovllm-grammar")

    def read(self, body: Body, engine: LLMEngine) -> list[Mask]:
        """The processor for a body's `response_format`; none for text. ApiError for what cannot be."""
        schema = _schema(body.mapping(FIELD))
        if schema is None:
            return []
        tables = self._tables_of(engine)
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_COMPACT)
            failed, sentences = LLMatcher.validate_grammar_with_warnings(grammar, tables)
        except ValueError as error:
            failed, sentences = True, [str(error)]
        if failed or sentences:  # a warning is about a part that would be ignored
            raise ApiError(f"the JSON schema cannot be followed: {'; '.join(sentences)[:500]}", param=FIELD)
        mask = Mask(LLMatcher(tables, grammar, log_level=0))
        if problem := mask.problem():
            raise ApiError(f"nothing obeys the JSON schema ({problem})", param=FIELD)
        return [mask]

    def _tables_of(self, engine: LLMEngine) -> LLTokenizer:
        if self._tables is None:
            backend = tokenizer_of(engine, FIELD).backend
            if not hasattr(backend, "to_str"):
                raise ApiError("this model's tokenizer is Python code, which grammars cannot read", param=FIELD)
            size, ends = engine.model_config.vocab_size, sorted(engine.eos_token_ids)
            if not ends:
                raise ApiError("this model has no end-of-text token, so no grammar could end", param=FIELD)
            self._tables = LLTokenizer(backend.to_str(), n_vocab=size, eos_token=ends)
        return self._tables


def _schema(asked: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON schema of a `response_format`; None for plain text."""
    body = Body(asked)
    kind = body.take("type", "text")
    try:
        if kind == "json_schema":
            described = Body(body.mapping("json_schema"))
            schema = described.mapping("schema")
            for name in ("name", "description", "strict"):  # the first two are for the reader; we are always strict
                described.take(name)
            described.refuse_rest()
            if not schema:
                raise ApiError("response_format.json_schema needs a schema", param="json_schema.schema")
            if "x-guidance" in schema:  # the library's own options, with which white space may be anything
                raise ApiError("x-guidance in a schema is not supported: leave it out", param="json_schema.schema")
        elif kind in ("text", "json_object"):
            schema = {"type": "object"}
        else:
            raise ApiError("response_format.type must be text, json_object or json_schema", param="type")
        body.refuse_rest()
    except ApiError as error:
        raise ApiError(str(error), param=f"{FIELD}.{error.param}") from error
    return None if kind == "text" else schema


class Mask:
    """The logits processor of one request. Its n sequences take turns, each with a matcher that has read its tokens."""

    __name__ = FIELD

    def __init__(self, matcher: LLMatcher) -> None:
        self._fresh = matcher
        self._read: list[tuple[list[int], LLMatcher]] = []

    def problem(self) -> str:
        """Why there is no first token; "" where there is one."""
        matcher = self._fresh.deep_copy()
        matcher.compute_bitmask()
        return _error(matcher)

    def __call__(self, prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        """logits [vocab] with minus infinity for every token that must not follow `output_ids`."""
        import numpy as np
        import torch

        matcher = self._matcher(output_ids)
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if error := _error(matcher):
            raise ValueError(error)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), float("-inf"))

    def _matcher(self, output_ids: list[int]) -> LLMatcher:
        for i, (seen, matcher) in enumerate(self._read):
            if seen == output_ids[:-1]:
                matcher.consume_tokens(output_ids[len(seen) :])
                self._read[i] = (output_ids, matcher)
                return matcher
        matcher = self._fresh.deep_copy()
        matcher.consume_tokens(output_ids)
        self._read.append((output_ids, matcher))
        return matcher


def _error(matcher: LLMatcher) -> str:
    """The sentence, without the dump of the parser behind it."""
    return matcher.get_error().partition("\n")[0]
