"""The sampler: logits of R rows in, one token a row out, each by its own sequence's rules.

Paths, from cheap to rich, and a row takes the same decision on each of them:
  all greedy      argmax
  temperature     one fused operation for all rows (`kernels.sample`), greedy rows among them
  cuts            top-k, top-p, min-p: the same, with a threshold on the logits (`kernels.sample_cut`)
  special rows    a float32 copy of just those rows: penalties, bias, processors, min_tokens; then one of the above
Random numbers are a hash of (seed, position, token), so the tokens of a sequence do not depend on its company.
The device is waited for only when a Python logits processor has to see its row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nanovllm.kernels.sample import sample
from nanovllm.kernels.sample_cut import sample_rows
from nanovllm.layers.logits import TokenLogprobs, penalise_, score_tokens
from nanovllm.layers.sampling_batch import Choice, SamplingBatch, SamplingRow, Special


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """Results of one step. A row in `errors` (row -> sentence) failed alone; its token means nothing."""

    token_ids: torch.Tensor  # [R] int64, on the device of the logits
    logprobs: TokenLogprobs | None = None  # of the rows that asked, under the model's own distribution
    errors: dict[int, str] = field(default_factory=dict)


class Sampler:
    """Chooses tokens. Keeps what it sent to the device for the last batch: decode steps repeat it."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self._batch: SamplingBatch | None = None

    def __call__(self, logits: torch.Tensor, rows: Sequence[SamplingRow], positions: torch.Tensor) -> SamplerOutput:
        """Sample the next token of each row.

        logits: [R, vocab_size], any float dtype, not modified; rows: the R sequences; positions: int32 or int64 [R] on
        the device, the position of the token that each row of logits comes from (it only feeds the random numbers).
        """
        if logits.shape != (len(rows), self.vocab_size):
            raise ValueError(f"logits must have shape ({len(rows)}, {self.vocab_size}), got {tuple(logits.shape)}")
        batch, errors = self._batch_of(rows), dict[int, str]()
        if batch.special is None:
            tokens = _choose(logits, batch.choice, positions)
        else:
            tokens, errors = self._sample_special(logits, batch, batch.special, positions)
        return SamplerOutput(tokens, _score(logits, batch, tokens), errors)

    def score(self, logits: torch.Tensor, rows: Sequence[SamplingRow], tokens: torch.Tensor) -> SamplerOutput:
        """The output for tokens [R] that a graph chose from `logits`, with log-probabilities where rows want them."""
        if all(row.params.logprobs is None for row in rows):
            return SamplerOutput(tokens)
        return SamplerOutput(tokens, _score(logits, self._batch_of(rows), tokens))

    def _batch_of(self, rows: Sequence[SamplingRow]) -> SamplingBatch:
        if self._batch is None or self._batch.rows != tuple(rows):
            self._batch = SamplingBatch.build(rows, self.vocab_size, self.device)
        return self._batch

    def _sample_special(
        self, logits: torch.Tensor, batch: SamplingBatch, special: Special, positions: torch.Tensor
    ) -> tuple[torch.Tensor, dict[int, str]]:
        own = logits.index_select(0, special.index).float()  # [S, V], a copy
        entries = batch.special_entries(self.vocab_size, self.device)
        if "seen" in entries:
            penalise_(own, entries["seen"], entries["counts"], special.penalties)
        if special.bias.numel():
            own.view(-1).index_add_(0, special.bias_index, special.bias)
        errors = _run_processors(own, batch, special)
        if "banned" in entries:
            own.view(-1).index_fill_(0, entries["banned"], -math.inf)
        errors |= _check_processed(own, batch, special, errors)
        tokens = _choose(own, special.choice, positions.index_select(0, special.index))
        everything = len(special.numbers) == len(batch.rows)
        all_tokens = torch.empty_like(tokens) if everything else _choose(logits, batch.choice, positions)
        return all_tokens.index_copy_(0, special.index, tokens), errors


def _choose(logits: torch.Tensor, choice: Choice, positions: torch.Tensor) -> torch.Tensor:
    """logits: [N, V], not changed any more. Returns int64 [N]."""
    if choice.all_greedy:
        return logits.argmax(dim=-1)
    if not choice.any_cut:
        return sample(logits, choice.temperature, choice.seeds, positions)
    return sample_rows(logits, choice.at(positions))


def _score(logits: torch.Tensor, batch: SamplingBatch, tokens: torch.Tensor) -> TokenLogprobs | None:
    if not batch.scored:
        return None
    num_top = [batch.rows[i].params.logprobs or 0 for i in batch.scored]
    index = batch.scored_index
    return score_tokens(logits.index_select(0, index), tokens.index_select(0, index), batch.scored, num_top)


def _run_processors(own: torch.Tensor, batch: SamplingBatch, special: Special) -> dict[int, str]:
    """Run users' functions on their rows of `own` [S, V], in place. Returns the errors by row of the batch."""
    errors: dict[int, str] = {}
    for place, number in enumerate(special.numbers):
        row = batch.rows[number]
        for processor in row.params.logits_processors:
            try:
                # Copies of the lists: a processor that changes them must not change the sequence.
                result = processor(list(row.prompt_token_ids), list(row.output_token_ids), own[place])
                own[place].copy_(_as_logits(result, own.shape[1]))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a user's function may raise anything, SystemExit too: its request fails
                name = getattr(processor, "__name__", type(processor).__name__)
                errors[number] = f"logits processor {name} failed: {type(error).__name__}: {error}"
                break
    return errors


def _as_logits(result: object, vocab_size: int) -> torch.Tensor:
    """What a processor returned, if it is logits."""
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"it must return a tensor of {vocab_size} logits, got {type(result).__name__}")
    if result.shape != (vocab_size,) or not result.dtype.is_floating_point:
        raise ValueError(f"it must return {vocab_size} float logits, got {result.dtype} {tuple(result.shape)}")
    return result


def _check_processed(
    own: torch.Tensor, batch: SamplingBatch, special: Special, failed: dict[int, str]
) -> dict[int, str]:
    """Errors of rows that processors left without a token to choose. Clears those rows and the failed ones."""
    places = [i for i, number in enumerate(special.numbers) if batch.rows[number].params.logits_processors]
    if not places:
        return {}
    errors: dict[int, str] = {}
    for place, largest in zip(places, own[places].amax(dim=-1).tolist(), strict=True):  # NaN is the maximum of its row
        number = special.numbers[place]
        if number not in failed and not math.isfinite(largest):
            problem = "excluded every token" if largest == -math.inf else "returned NaN or +inf"
            errors[number] = f"the logits processors {problem}: return finite logits, or -inf for excluded tokens"
        if number in failed or number in errors:
            own[place].zero_()
    return errors
