"""The engine: requests in, one step at a time, tokens out. It composes scheduler, runner and tokenizer.

    make_request -> submit -> step, step, … -> Request.output()

With asynchronous scheduling a step is launched before the tokens of the one before it have come back, so that the
device never waits for the host: `_in_flight` holds the steps whose tokens are awaited, at most two for a moment and one
between calls. A request for which the host must know every token (penalties, Python processors, min_tokens) makes the
engine take one step at a time while it runs.

All methods may be called from any thread: a lock guards them. Whatever a request does wrong ends that request with
`error` set; a step that fails as a whole (say out of memory) ends the requests that were in it. The engine goes on.
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import LaunchedStep, ModelRunner, StepOutput
from nanovllm.engine.request import Completion, Request, check_request_id
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence as EngineSequence
from nanovllm.engine.staging import IN_FLIGHT
from nanovllm.layers.sampling_batch import SamplingRow
from nanovllm.loader.detokenizer import IncrementalDetokenizer, StopChecker
from nanovllm.loader.tokenizer import Tokenizer
from nanovllm.outputs import Logprob
from nanovllm.sampling_params import SamplingParams, child_seed
from nanovllm.utils import nvtx

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What one step ran, in tokens."""

    num_tokens: int
    num_prefill_tokens: int


class LLMEngine:
    """A loaded model with its scheduler and KV cache. Raises while loading, never while serving."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.runner = ModelRunner(config)
        self.tokenizer: Tokenizer | None = self._load_tokenizer()
        self.model_config = self.runner.model_config
        # Chat models name their end-of-turn token in the tokenizer, the model's config, or both.
        eos = {*self.model_config.eos_token_ids, self.tokenizer.eos_token_id if self.tokenizer else None}
        # A tokenizer may know more tokens than the model has logits for; those are never sampled.
        vocab_size = self.model_config.vocab_size
        self.eos_token_ids = frozenset(i for i in eos if i is not None and 0 <= i < vocab_size)
        self.max_model_len = self.runner.max_model_len
        blocks = BlockManager(self.runner.num_blocks, config.kvcache_block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(config.max_num_seqs, self.runner.token_budget, self.max_model_len, blocks)
        self._requests: dict[str, Request] = {}
        self._owner: dict[int, tuple[Request, Completion]] = {}  # by seq_id, unfinished ones
        self._lock = threading.RLock()
        self._making = threading.Lock()  # apart from the other, so that requests can be made while a step runs
        self._seq_ids = itertools.count()
        self._random = random.Random(config.seed)
        self._closed = False
        self._stepping = False
        self._in_flight: deque[tuple[ScheduledBatch, LaunchedStep]] = deque()
        self._num_following = 0  # unfinished sequences whose sampling the host must follow token by token
        overlap = config.async_scheduling
        self._async = self.runner.device.type == "cuda" if overlap is None else overlap

    # -- requests ----------------------------------------------------------------------------------------------------

    def make_request(
        self, prompt: Any, params: SamplingParams | None, *, streaming: bool = False, request_id: str | None = None
    ) -> Request:
        """Check a prompt and its parameters and turn them into a request, which `submit` then queues.

        `prompt`: a string, token ids, or a dictionary with "prompt" or "prompt_token_ids". ValueError or TypeError
        with one sentence for anything that could never run.
        """
        self._check_open()
        params = params if params is not None else SamplingParams()
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be a SamplingParams, got {type(params).__name__}")
        if request_id is not None:
            check_request_id(request_id)
        text, token_ids = self._tokenize(prompt)
        vocab_size = self.model_config.vocab_size
        bad = next((t for t in token_ids if not 0 <= t < vocab_size), None)
        if bad is not None:
            raise ValueError(
                f"token id {bad} is outside the vocabulary of {vocab_size} tokens: use ids from 0 to {vocab_size - 1}"
            )
        self.scheduler.check_prompt(len(token_ids))
        params.check_token_ids(vocab_size)
        if params.stop_strings and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer: load the model with one or use stop_token_ids")
        with self._making:
            request_id = request_id if request_id is not None else f"request-{next(self._seq_ids)}"
            seed = params.seed if params.seed is not None else self._random.getrandbits(63)
            completions = [
                self._make_completion(request_id, token_ids, params, index, seed, streaming)
                for index in range(params.n)
            ]
        return Request(request_id, text, token_ids, params, completions, self.tokenizer)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; they run from the next step on."""
        with self._lock:
            self._check_open()
            used = set(self._requests)
            for request in requests:
                if request.request_id in used:
                    raise ValueError(
                        f"request id {request.request_id!r} is in use: ids of running requests must be unique"
                    )
                used.add(request.request_id)
            for request in requests:
                self._requests[request.request_id] = request
                for completion in request.completions:
                    self._owner[completion.seq.seq_id] = (request, completion)
                    self._num_following += completion.seq.sampling.params.follows_output
                    self.scheduler.add(completion.seq)

    def abort(self, request_id: str) -> None:
        """End a request with `finish_reason == "abort"`; nothing happens if it has ended already."""
        with self._lock:
            request = self._requests.get(request_id)
            for completion in request.completions if request else ():
                self._end(completion.seq, "abort")

    # -- stepping ----------------------------------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        """Whether anything is queued or running. A step in flight for nobody does not count."""
        return self.scheduler.has_unfinished

    def step(self) -> StepInfo | None:
        """Run one step for everybody; None when there was nothing to do.

        With asynchronous scheduling the tokens that become known are those of the step before.
        """
        with self._lock:
            self._check_open()
            if self._stepping:  # the lock lets its own thread in again
                raise RuntimeError("a logits processor must not run the engine that waits for it: use another LLM")
            if not self.scheduler.has_unfinished and not self._in_flight:
                return None
            self._stepping = True
            try:
                self._settle(keep=0 if self._num_following else IN_FLIGHT - 1)  # more after an interrupted wait
                with nvtx.range("nanovllm.launch"):
                    info = self._launch()
                with nvtx.range("nanovllm.settle"):
                    self._settle(keep=1 if self._async and not self._num_following and info.num_tokens else 0)
                return info
            finally:
                self._stepping = False

    def _launch(self) -> StepInfo:
        """Schedule a step and queue it on the device.

        A step of no tokens when all that is left is in flight, or when it failed: the one before it must be settled
        then, for what the failed one left in the runner's buffers belongs to nobody.
        """
        batch = self.scheduler.schedule()
        for seq in batch.admitted:
            request, _ = self._owner[seq.seq_id]
            request.scheduled_time = request.scheduled_time or time.monotonic()
        if batch.is_empty:
            return StepInfo(0, 0)
        try:
            self._in_flight.append((batch, self.runner.launch(batch)))
        except Exception as error:  # whatever went wrong on the device belongs to this batch, not to the engine
            logger.exception("a step failed; its %d sequences end with an error", len(batch.scheduled))
            self.runner.drain()  # part of it may be queued, and write what later steps use
            self._fail([batch], f"the step failed: {error}")
            return StepInfo(0, 0)
        except BaseException:  # an interrupt: the step did not happen, unless all that is left was to say so
            if not (self._in_flight and self._in_flight[-1][0] is batch):
                self.scheduler.rollback(batch)
            self.runner.drain()
            self._settle(keep=0)
            raise
        return StepInfo(batch.num_tokens, batch.num_tokens - batch.num_decodes)

    def _settle(self, keep: int) -> None:
        """Wait for steps in flight, the oldest first, until `keep` are left, and give everybody their tokens."""
        while len(self._in_flight) > keep:
            batch, launched = self._in_flight[0]
            try:
                output = self.runner.collect(launched)
            except Exception as error:  # what was launched behind it read what it wrote
                logger.exception("a step failed; its %d sequences end with an error", len(batch.scheduled))
                batches = [batch for batch, _ in self._in_flight]
                self._in_flight.clear()
                self._fail(batches, f"the step failed: {error}")
                return
            self._in_flight.popleft()
            self._process(batch, output)

    def step_until_news(self, request: Request, seen: int) -> None:
        """Step until `request.version` exceeds `seen`; other threads may do part of the stepping."""
        while request.version <= seen:
            with self._lock:
                if request.version <= seen and self.step() is None:
                    return

    def _process(self, batch: ScheduledBatch, output: StepOutput) -> None:
        """Give every sequence its token, then end those that their text or an error ends."""
        for seq, start, entries in output.prompt_logprobs:
            if seq.seq_id in self._owner:  # a logits processor may have aborted it in this step
                request, _ = self._owner[seq.seq_id]
                known = request.prompt_logprobs or []
                # A preempted prompt is scored again: take only what is new.
                request.prompt_logprobs = known + self._with_text(entries[len(known) - start :])
        for seq, error in output.errors:
            self._end(seq, "error", error)
        for seq in self.scheduler.update(batch, output.token_ids):
            try:
                self._take_token(seq, output.logprobs.get(seq.seq_id))
            except Exception as error:  # a tokenizer that cannot decode an id ends its own request only
                logger.exception("request %s: its text cannot be made", seq.request_id)
                self._end(seq, "error", f"its text cannot be made: {type(error).__name__}: {error}")
            if seq.is_finished and seq.seq_id in self._owner:
                self._forget(seq)

    def _take_token(self, seq: EngineSequence, entry: dict[int, Logprob] | None) -> None:
        """The newest token of `seq`: its log-probabilities, its text, and whether that text ends it."""
        request, completion = self._owner[seq.seq_id]
        token_id = seq.token_ids[-1]
        if completion.logprobs is not None and entry is not None:
            completion.logprobs += self._with_text([entry])
            completion.cumulative_logprob += entry[token_id].logprob
        stop = request.on_token(completion, token_id)
        if stop is not None:
            self.scheduler.finish(seq, "stop", stop)

    def _fail(self, batches: list[ScheduledBatch], error: str) -> None:
        """Undo steps, the latest first, and end their sequences."""
        for batch in reversed(batches):
            self.scheduler.rollback(batch)
        for item in itertools.chain.from_iterable(batch.scheduled for batch in batches):
            self._end(item.seq, "error", error)

    def _end(self, seq: EngineSequence, reason: str, error: str | None = None) -> None:
        """End a sequence from outside; nothing happens if it has ended."""
        if seq.seq_id in self._owner:
            request, _ = self._owner[seq.seq_id]
            request.error = error or request.error
            self.scheduler.finish(seq, reason)
            self._forget(seq)

    def _forget(self, seq: EngineSequence) -> None:
        request, completion = self._owner.pop(seq.seq_id)
        self._num_following -= seq.sampling.params.follows_output
        request.on_finished(completion)
        if request.finished:
            self._requests.pop(request.request_id, None)

    # -- text --------------------------------------------------------------------------------------------------------

    def _load_tokenizer(self) -> Tokenizer | None:
        """None when the user wants none, or when the model brings none: token ids still work then."""
        config = self.config
        if config.skip_tokenizer_init:
            return None
        try:
            return Tokenizer.from_source(self.runner.loaded.source, config.tokenizer, config.chat_template)
        except FileNotFoundError as error:
            if config.tokenizer is not None or config.chat_template is not None:
                raise
            logger.warning("no tokenizer, so prompts must be token ids: %s", error)
            return None

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError when the engine runs without one."""
        if self.tokenizer is None:
            raise ValueError("this engine has no tokenizer: load the model with one, or pass token ids")
        return self.tokenizer

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> dict[str, Any]:
        """A conversation as a prompt: {"prompt": text, "prompt_token_ids": ids}. The template writes its own BOS.

        `template_kwargs` reach the template by name; TypeError for a misspelt one, a warning for one it does not read.
        `continue_final_message`: the prompt ends where the last message does, so that the answer goes on with it.
        """
        tokenizer, extra = self.require_tokenizer(), template_kwargs or {}
        if tokenizer.chat_template is not None:
            tokenizer.chat_template.check_names(extra)
        ask = tokenizer.continue_chat_template if continue_final_message else tokenizer.apply_chat_template
        text = ask(list(messages), add_generation_prompt=add_generation_prompt, **extra)
        return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}

    def _tokenize(self, prompt: Any) -> tuple[str | None, list[int]]:
        text: str | None = None
        if isinstance(prompt, dict):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise ValueError(f'a prompt dictionary has "prompt" or "prompt_token_ids", got {list(prompt)}')
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            prompt = text if token_ids is None else token_ids
        if isinstance(prompt, str):
            return prompt, self.require_tokenizer().encode(prompt)
        try:
            if isinstance(prompt, (bytes, bytearray)):
                raise TypeError("decode these bytes first")
            token_ids = list(prompt)
            if set(map(type, token_ids)) == {int}:  # as good as always, and checked in a tenth of the time
                return text, token_ids
            return text, [_as_token_id(token) for token in token_ids]
        except TypeError as error:
            raise TypeError(f"a prompt is a string or a list of token ids: {error}") from error

    def _make_completion(
        self, request_id: str, token_ids: list[int], params: SamplingParams, index: int, seed: int, streaming: bool
    ) -> Completion:
        scored = params.prompt_logprobs if index == 0 else None
        seq = EngineSequence(
            next(self._seq_ids),
            request_id,
            token_ids,
            max_tokens=self.max_model_len if params.max_tokens is None else params.max_tokens,
            min_tokens=params.min_tokens,
            eos_token_ids=self.eos_token_ids,
            stop_token_ids=frozenset(params.stop_token_ids or ()),
            ignore_eos=params.ignore_eos,
            cache_salt=self.runner.cache_salt(len(token_ids)),
            read_prefix_cache=scored is None,
            num_prompt_logprobs=scored,
            index=index,
        )
        resolved = params.resolve(self.runner.sampling_defaults, self.eos_token_ids)
        seq.sampling = SamplingRow(resolved, child_seed(seed, index), seq.prompt_token_ids, seq.output_token_ids)
        completion = Completion(
            seq,
            logprobs=None if params.logprobs is None else [],
            include_stop=params.include_stop_str_in_output,
        )
        if self.tokenizer is not None and (streaming or params.stop_strings):
            completion.detokenizer = IncrementalDetokenizer(self.tokenizer, params.skip_special_tokens)
            if params.stop_strings:
                completion.stop_checker = StopChecker(params.stop_strings, params.include_stop_str_in_output)
        return completion

    def _with_text(self, entries: list[dict[int, Logprob]]) -> list[dict[int, Logprob]]:
        """The same entries with each token's text filled in."""
        if self.tokenizer is None:
            return entries
        decode = self.tokenizer.decode
        return [
            {
                token: replace(logprob, decoded_token=decode([token], skip_special_tokens=False))
                for token, logprob in entry.items()
            }
            for entry in entries
        ]

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing is forgotten, while requests hold blocks."""
        with self._lock:
            return self.scheduler.block_manager.reset_prefix_cache()

    def close(self) -> None:
        """End what runs with "abort" and free the device memory. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            for request_id in list(self._requests):
                self.abort(request_id)
            self._closed = True
            self._in_flight.clear()
            self.runner.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this engine is closed: make a new LLM")


def _as_token_id(token: Any) -> int:
    if isinstance(token, bool) or not hasattr(token, "__index__"):
        raise TypeError(f"{token!r} is not an integer")
    return int(token.__index__())
