"""`/v1/completions`: texts or token ids go on. The API before chat, which evaluation harnesses still speak."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanovllm.sampling_params import MAX_N
from nanovllm.server.answers import Call, Choice, encode, make_call, number, prompt_logprobs, tokenizer_of, top
from nanovllm.server.errors import ApiError
from nanovllm.server.grammar import Grammars
from nanovllm.server.protocol import Body, read_sampling, read_stream

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionStyle:
    """`text`; log-probabilities as parallel lists."""

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def logprobs(self, choice: Choice, start: int, stop: int) -> dict[str, Any]:
        """Output tokens [start, stop), behind the prompt's where the text begins with it."""
        said = _Lists(choice)
        if start == 0 and choice.call.echo and not choice.opened:
            said.add_prompt(choice)
        ids, entries = choice.completion.seq.output_token_ids, choice.completion.logprobs or []
        for i in range(start, stop):
            said.add(ids[i], entries[i])
        return said.content

    def whole(self, choice: Choice, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """The text, and vLLM's log-probabilities of the prompt."""
        text = _prompt_text(choice) + text if choice.call.echo else text
        return {"text": text} | prompt_logprobs(choice.call, choice.request)

    def piece(self, text: str | None) -> str:
        """More text."""
        return f'"text":{encode(text or "")}'

    def opening(self, choice: Choice) -> tuple[str, dict[str, Any] | None] | None:
        """The prompt, where it is asked for, with its log-probabilities, for which there is a step to wait."""
        if not choice.call.echo:
            return "", None
        if choice.request.params.logprobs is None:
            return self.piece(_prompt_text(choice)), None
        if len(choice.request.prompt_logprobs or ()) < len(choice.request.prompt_token_ids):
            return None
        said = _Lists(choice)
        said.add_prompt(choice)
        return self.piece(_prompt_text(choice)), said.content


class _Lists:
    """`logprobs` of the older API; `text_offset` counts the characters of all tokens before."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        names = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
        self.content: dict[str, list[Any]] = {name: [] for name in names}

    def add_prompt(self, choice: Choice) -> None:
        for token_id, entry in zip(choice.request.prompt_token_ids, choice.request.prompt_logprobs or [], strict=True):
            self.add(token_id, entry)

    def add(self, token_id: int, entry: Any) -> None:
        """A token; `entry` is None for the first of a prompt, which nothing predicts."""
        values: tuple[Any, ...]
        if entry is None:
            text = self._choice.call.engine.require_tokenizer().decode([token_id], skip_special_tokens=False)
            values = (None, text, None)
        else:
            text = entry[token_id].decoded_token or ""
            # The sampled token comes on top of as many alternatives as were asked for; of equal texts the likelier.
            best = {p.decoded_token or "": number(p) for _, p in reversed(top(entry))}
            values = (number(entry[token_id]), text, dict(reversed(best.items())))
        for name, value in zip(self.content, (self._choice.offset, *values), strict=True):
            self.content[name].append(value)
        self._choice.offset += len(text)


def _prompt_text(choice: Choice) -> str:
    request, engine = choice.request, choice.call.engine
    if request.prompt is not None:
        return request.prompt
    return engine.require_tokenizer().decode(request.prompt_token_ids, skip_special_tokens=False)


def read_completion(body: Body, engine: LLMEngine, model: str, grammars: Grammars) -> Call:
    """A body as a call. ApiError with the field's name for what cannot be done."""
    special = body.flag("add_special_tokens", True)
    prompts = [_tokenized(prompt, engine, special) for prompt in _prompts(body.take("prompt"))]
    stream, include_usage = read_stream(body)
    echo, alternatives, scored = body.flag("echo"), body.take("logprobs"), body.take("prompt_logprobs")
    if scored is not None and stream:
        raise ApiError("prompt_logprobs is not available with stream=true", param="prompt_logprobs")
    if echo and alternatives is not None and scored not in (None, alternatives):
        raise ApiError("with echo, logprobs scores the prompt as well: leave prompt_logprobs out", param="echo")
    if echo:
        tokenizer_of(engine, "echo")
    max_tokens = body.take("max_tokens", DEFAULT_MAX_TOKENS)
    hidden = echo and max_tokens == 0 and not isinstance(max_tokens, bool)
    n = body.take("n", 1)
    if (best_of := body.take("best_of", n)) != n:
        raise ApiError(f"best_of={best_of!r:.80} is not supported: n choices are made and shown", param="best_of")
    params = read_sampling(
        body,
        grammars.read(body, engine),
        n=("n", n),
        max_tokens=("max_tokens", 1 if hidden else max_tokens),
        logprobs=("logprobs", alternatives),
        prompt_logprobs=("logprobs", alternatives) if echo and scored is None else ("prompt_logprobs", scored),
    )
    body.refuse_rest()
    if len(prompts) * params.n > MAX_N:
        raise ApiError(f"{len(prompts)} prompts of n={params.n} choices: {MAX_N} choices at most", param="prompt")
    options = dict(stream=stream, include_usage=include_usage, echo=echo, hidden=hidden, scored=scored is not None)
    return make_call(engine, CompletionStyle(), model, prompts, params, "prompt", **options)


def _prompts(prompt: Any) -> list[Any]:
    """A string, token ids, or a list of either, as a list of prompts."""
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list))
    prompts = prompt if several else [prompt]
    if len(prompts) > MAX_N:
        raise ApiError(f"prompt has {len(prompts)} prompts: send {MAX_N} at most", param="prompt")
    for i, one in enumerate(prompts):
        ids = isinstance(one, list) and all(type(token) is int for token in one)
        if not isinstance(one, str) and not (ids and one):
            where = f"prompt[{i}]" if several else "prompt"
            raise ApiError(f"{where} must be a string or a list of token ids, or a list of these", param=where)
    return prompts


def _tokenized(prompt: Any, engine: LLMEngine, special: bool) -> dict[str, Any]:
    if not isinstance(prompt, str):
        return {"prompt_token_ids": prompt}
    try:
        return {"prompt": prompt, "prompt_token_ids": tokenizer_of(engine, "prompt").encode(prompt, special)}
    except ValueError as error:
        raise ApiError(str(error), param="prompt") from error
