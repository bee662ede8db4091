"""`LLM`: the engine as a function call. Prompts in, finished `RequestOutput`s out; or a stream of them.

Thread-safe: several threads may call one `LLM`. Whoever holds the engine's lock steps it for everybody, so their
requests run in the same batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.request import Request
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

# A text, its token ids, or vLLM's dictionary with either under "prompt" or "prompt_token_ids".
Prompt = str | Sequence[int] | dict[str, Any]
Message = dict[str, Any]  # {"role": ..., "content": ...}


class LLM:
    """A loaded model. `LLM("Qwen/Qwen3-0.6B", max_model_len=4096, ...)`; options are `EngineConfig`'s fields."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.engine = LLMEngine(EngineConfig.from_kwargs(model, **kwargs))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete one or many prompts; outputs come in the order of the prompts.

        `sampling_params`: one for all, or one a prompt; None takes the model's defaults. Raises ValueError, before
        anything runs, for a prompt that is empty, has token ids out of range or does not fit. A request that fails
        later (say its logits processor raises) has `finish_reason == "error"` and `error` set; the others finish.
        """
        items = [prompts] if _is_single(prompts) else list(prompts)
        params = _broadcast(sampling_params, len(items))
        requests = []
        for i, (prompt, one) in enumerate(zip(items, params, strict=True)):
            try:
                requests.append(self.engine.make_request(prompt, one))
            except (ValueError, TypeError) as error:
                raise type(error)(f"prompt {i}: {error}" if len(items) > 1 else str(error)) from error
        self._run(requests, use_tqdm)
        return [request.output() for request in requests]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, through the model's chat template.

        `chat_template_kwargs` reach the template by name (`enable_thinking=False`); TypeError for one that is misspelt.
        """
        single = isinstance(next(iter(messages), None), (Mapping, str))  # a string is a mistake that rendering explains
        conversations: list[Any] = [messages] if single else list(messages)
        prompts = [
            self.engine.render_chat(messages, add_generation_prompt, chat_template_kwargs) for messages in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yield the growing output of one prompt after every step that added to it; the last one is finished.

        Leaving the loop early aborts the request.
        """
        request = self.engine.make_request(prompt, sampling_params, streaming=True)
        return self._stream(request)

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> Iterator[RequestOutput]:
        """`stream` for a conversation."""
        return self.stream(self.engine.render_chat(messages, True, chat_template_kwargs), sampling_params)

    def get_tokenizer(self) -> Any:
        """The model's tokenizer (`nanovllm.loader.tokenizer.Tokenizer`)."""
        return self.engine.require_tokenizer()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing is forgotten, while requests hold blocks."""
        return self.engine.reset_prefix_cache()

    def close(self) -> None:
        """Free the model, the KV cache and the graphs. Safe to call twice; later calls to the engine raise."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, request: Request) -> Iterator[RequestOutput]:
        self.engine.submit([request])
        seen = 0
        try:
            while True:
                self.engine.step_until_news(request, seen)
                seen = request.version
                output = request.output()
                yield output
                if output.finished:
                    return
        finally:
            self.engine.abort(request.request_id)

    def _run(self, requests: list[Request], use_tqdm: bool) -> None:
        bar = tqdm(total=len(requests), desc="Generating", dynamic_ncols=True, disable=not use_tqdm)
        pending = requests
        self.engine.submit(requests)
        try:
            while pending:
                started = time.perf_counter()
                step = self.engine.step()
                elapsed = time.perf_counter() - started
                still = [request for request in pending if not request.finished]
                if use_tqdm and step is not None:
                    kind = "Decode" if step.num_prefill_tokens == 0 else "Prefill"
                    bar.set_postfix({kind: f"{step.num_tokens / elapsed:.0f}tok/s"}, refresh=False)
                    bar.update(len(pending) - len(still))
                pending = still
        finally:
            bar.close()
            for request in pending:  # only after an interrupt: nothing may keep running in the engine
                self.engine.abort(request.request_id)


def _is_single(prompts: Any) -> bool:
    """A string, a dictionary or a flat list (array, tensor) of token ids is one prompt."""
    if isinstance(prompts, (str, dict)) or getattr(prompts, "ndim", None) == 1:
        return True
    if not hasattr(prompts, "__len__") or not hasattr(prompts, "__getitem__") or getattr(prompts, "ndim", None) == 0:
        raise TypeError(f"prompts must be a string, token ids, or a list of these, got {type(prompts).__name__}")
    return len(prompts) > 0 and not isinstance(prompts[0], (str, dict)) and not hasattr(prompts[0], "__len__")


def _broadcast(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams | None]:
    if not isinstance(params, Sequence):  # whatever it is, every request refuses what is none
        return [params] * count
    listed: list[SamplingParams | None] = list(params)
    if len(listed) != count:
        raise ValueError(f"{count} prompts but {len(listed)} sampling_params: give one for all, or one a prompt")
    return listed
