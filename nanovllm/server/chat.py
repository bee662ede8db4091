"""`/v1/chat/completions`: messages through the model's chat template, and answers as messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanovllm.server.answers import Call, Choice, encode, make_call, number, prompt_logprobs, top
from nanovllm.server.errors import ApiError
from nanovllm.server.grammar import Grammars
from nanovllm.server.protocol import Body, read_sampling, read_stream

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine

# OpenAI's newer name of the system's role is unknown to most templates, some of which would drop the message.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_PASSED_ON = ("name", "reasoning_content")  # to the template, which may read them


class ChatStyle:
    """`message` and `delta`; log-probabilities as a list of objects."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def logprobs(self, choice: Choice, start: int, stop: int) -> dict[str, Any]:
        """Output tokens [start, stop), each with exactly as many alternatives as were asked for."""
        ids, entries = choice.completion.seq.output_token_ids, choice.completion.logprobs or []
        tokenizer, count = choice.call.engine.tokenizer, choice.request.params.logprobs or 0

        def described(token_id: int, logprob: Any) -> dict[str, Any]:
            data = tokenizer.token_bytes(token_id) if tokenizer is not None else b""
            return {"token": logprob.decoded_token or "", "logprob": number(logprob), "bytes": list(data)}

        return {
            "content": [
                described(ids[i], entries[i][ids[i]])
                | {"top_logprobs": [described(*item) for item in top(entries[i])[:count]]}
                for i in range(start, stop)
            ],
            "refusal": None,
        }

    def whole(self, choice: Choice, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """The message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def piece(self, text: str | None) -> str:
        """More of the message."""
        return '"delta":{}' if text is None else f'"delta":{{"content":{encode(text)}}}'

    def opening(self, choice: Choice) -> tuple[str, dict[str, Any] | None] | None:
        """Who speaks comes first."""
        return '"delta":{"role":"assistant","content":""}', None


def read_chat(body: Body, engine: LLMEngine, model: str, grammars: Grammars) -> Call:
    """A body as a call. ApiError with the field's name for what cannot be done."""
    prompt = read_conversation(body, engine)
    stream, include_usage = read_stream(body)
    limits = {name: body.take(name) for name in ("max_completion_tokens", "max_tokens")}
    if None not in limits.values() and len(set(map(repr, limits.values()))) > 1:
        raise ApiError("max_tokens and max_completion_tokens differ: send one", param="max_completion_tokens")
    limit = next((name for name, value in limits.items() if value is not None), "max_tokens")
    alternatives = body.take("top_logprobs")
    if body.flag("logprobs"):
        alternatives = 0 if alternatives is None else alternatives
    elif alternatives not in (None, 0):
        raise ApiError("top_logprobs needs logprobs=true", param="top_logprobs")
    else:
        alternatives = None
    scored = body.take("prompt_logprobs")
    if scored is not None and stream:
        raise ApiError("prompt_logprobs is not available with stream=true", param="prompt_logprobs")
    params = read_sampling(
        body,
        grammars.read(body, engine),
        max_tokens=(limit, limits[limit]),
        logprobs=("top_logprobs", alternatives),
        prompt_logprobs=("prompt_logprobs", scored),
    )
    body.refuse_rest()
    options = dict(stream=stream, include_usage=include_usage, scored=scored is not None)
    return make_call(engine, ChatStyle(), model, [prompt], params, "messages", **options)


def whole_chat(call: Call) -> dict[str, Any]:
    """The answer, with vLLM's extra field where it was asked for."""
    return call.whole() | prompt_logprobs(call, call.requests[0])


def read_conversation(body: Body, engine: LLMEngine) -> dict[str, Any]:
    """The messages as a prompt: {"prompt", "prompt_token_ids"}."""
    messages = body.take("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages must be a list of at least one message", param="messages")
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    goes_on = body.flag("continue_final_message")
    prompts_answer = body.flag("add_generation_prompt", not goes_on)
    if goes_on and prompts_answer:
        raise ApiError(
            "continue_final_message=true needs add_generation_prompt=false: the one begins a new message, the other "
            "goes on with the last",
            param="continue_final_message",
        )
    extra = body.mapping("chat_template_kwargs")
    try:
        return engine.render_chat(messages, prompts_answer, extra, goes_on)
    except TypeError as error:  # a name
        raise ApiError(str(error), param="chat_template_kwargs") from error
    except ValueError as error:
        raise ApiError(str(error), param="messages") from error


def _message(raw: Any, where: str) -> dict[str, Any]:
    """One message as templates expect it: a role and a string."""
    if not isinstance(raw, dict):
        raise ApiError(f'{where} must be an object with "role" and "content"', param=where)
    fields = {name: value for name, value in raw.items() if value is not None and value != []}
    role = fields.pop("role", None)
    for name in ("tool_calls", "tool_call_id", "function_call"):
        if name in fields:
            raise ApiError(f"{where}.{name}: calls of tools are not supported", param=f"{where}.{name}")
    if not isinstance(role, str) or role not in _ROLES:
        raise ApiError(f"{where}.role must be one of {', '.join(_ROLES)}, got {role!r:.80}", param=f"{where}.role")
    message = {"role": _ROLES[role], "content": _content(fields.pop("content", None), f"{where}.content")}
    for name in _PASSED_ON:
        if name in fields:
            message[name] = fields.pop(name)
    for name in fields:
        raise ApiError(f"{where} has a field {name[:80]!r} that is not supported", param=f"{where}.{name[:80]}")
    return message


def _content(content: Any, where: str) -> str:
    """A string; parts that are text are joined by line ends."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(f"{where} must be a string or a list of text parts, got {content!r:.80}", param=where)
    texts = []
    for i, part in enumerate(content):
        fields = {n: v for n, v in part.items() if v is not None} if isinstance(part, dict) else {}
        fields.pop("cache_control", None)  # all prefixes are cached
        if fields.pop("type", None) != "text" or not isinstance(fields.pop("text", None), str) or fields:
            raise ApiError(
                f'{where}[{i}] must be {{"type": "text", "text": ...}}: this server reads nothing but text',
                param=f"{where}[{i}]",
            )
        texts.append(part["text"])
    return "\n".join(texts)
