"""What may happen to logits between the model and the choice of a token: plain functions of float32 tensors.

Order and meaning are those of Hugging Face's logits processors: penalties, bias, temperature, top-k, top-p, min-p.
Changes to single entries (penalties, bias, bans) address them by flat index (row * vocab + token), so that one array
serves rows of different lengths. Cuts are thresholds on the value: tokens with equal logits are kept or cut together,
and the result does not depend on how a sort orders them.
Nothing here waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

FEW = 1024  # so many of the largest logits are found by selection, more by sorting


@dataclass(frozen=True, slots=True)
class Penalties:
    """The three penalties of S rows, float32 [S] each; neutral values are 1, 0, 0."""

    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


def penalise_(logits: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor, penalties: Penalties) -> None:
    """Penalise tokens that came before, in place.

    logits: [S, V] contiguous; seen: int64 [N], flat indices of the tokens in prompt or output, without duplicates;
    counts: float32 [N], how often each is in the output. Repetition divides positive logits and multiplies negative
    ones (CTRL, arXiv 1909.05858); presence and frequency are OpenAI's and look at the output only.
    """
    row = torch.div(seen, logits.shape[1], rounding_mode="floor")
    flat = logits.view(-1)
    value, repetition = flat[seen], penalties.repetition[row]
    value = torch.where(value > 0, value / repetition, value * repetition)
    value -= penalties.frequency[row] * counts
    value -= penalties.presence[row] * (counts > 0)
    flat.index_copy_(0, seen, value)


@dataclass(frozen=True, slots=True)
class Cuts:
    """Top-k, top-p and min-p of F rows; columns [F, 1] on the device.

    `head`: how many of the largest logits decide about top-k and top-p, 0 for neither; either no row's k is above it,
    or it is V. Rows without top-k hold k = V, rows without top-p hold p = 2 (rounding can bring a sum of
    probabilities above 1).
    """

    temperature: torch.Tensor  # float32, above 0
    top_k: torch.Tensor  # int64, 1 to V
    top_p: torch.Tensor  # float32
    log_min_p: torch.Tensor  # float32, -inf for none
    head: int


def cut_(logits: torch.Tensor, cuts: Cuts) -> None:
    """Set to -inf what top-k, top-p and min-p exclude, in place; the other logits stay unscaled. logits: [F, V].

    top-k keeps the k largest; top-p, among those, the tokens for which all larger ones together have less than
    probability p; min-p those of at least min_p times the largest probability. The largest is always kept.
    """
    scores = logits * (1.0 / cuts.temperature)
    threshold = scores.amax(dim=-1, keepdim=True) + cuts.log_min_p
    if cuts.head:
        best = _largest(scores, cuts)  # [F, H], descending
        head = best.shape[1]
        kth = best.gather(1, (cuts.top_k - 1).clamp(max=head - 1)).masked_fill_(cuts.top_k > head, -math.inf)
        # The sum runs over the row and not over `best`: more than k tokens may reach the k-th value.
        log_sum = scores.masked_fill(scores < kth, -math.inf).logsumexp(dim=-1, keepdim=True)
        mass = torch.exp(best - log_sum).cumsum(dim=-1)
        larger = F.pad(mass[:, :-1], (1, 0))  # probability of all before this one
        kept = ((larger < cuts.top_p) & (best >= kth)).sum(dim=-1, keepdim=True)
        # NaN logits keep nothing; an index of -1 would be a device-side fault, which no later request survives.
        threshold = torch.maximum(threshold, best.gather(1, (kept - 1).clamp_(min=0)))
    logits.masked_fill_(scores < threshold, -math.inf)


def _largest(scores: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """The largest of each row, descending: enough of them for `cuts`. scores: [F, V]. Returns [F, H], H <= V."""
    width = scores.shape[1]
    if cuts.head < width:
        return scores.topk(cuts.head, dim=-1).values
    # Where asking costs no synchronisation: nearly always a few tokens hold the probability p, and finding those takes
    # a twentieth of a sort of 49,152 (145 us against 3.7 ms on one core). The sums below are those of the full sort.
    if scores.device.type == "cpu" and width > FEW and bool((cuts.top_k >= width).all()):
        best = scores.topk(FEW, dim=-1).values
        mass = torch.exp(best - scores.logsumexp(dim=-1, keepdim=True)).cumsum(dim=-1)
        if bool((mass[:, -1:] >= cuts.top_p).all()):
            return best
    return scores.sort(dim=-1, descending=True).values


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural log) of chosen tokens and of the most likely ones, on the device of the logits.

    `rows[i]` is the row of logits that entry i belongs to, `num_top[i]` how many alternatives it wants.
    """

    rows: list[int]
    num_top: list[int]
    token_ids: torch.Tensor  # [L] int64
    logprobs: torch.Tensor  # [L] float32
    ranks: torch.Tensor  # [L] int64, 1 = most likely; equal logits share the better rank
    top_ids: torch.Tensor  # [L, N] int64, N = max(num_top)
    top_logprobs: torch.Tensor  # [L, N] float32

    def to_host(self) -> dict[int, list[tuple[int, float, int]]]:
        """By row: (token id, log-probability, rank) of the chosen token first, then of its alternatives. Waits."""
        chosen = zip(self.token_ids.tolist(), self.logprobs.tolist(), self.ranks.tolist(), strict=True)
        result = {}
        for row, count, first, ids, values in zip(
            self.rows, self.num_top, chosen, self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True
        ):
            top = zip(ids[:count], values[:count], range(1, count + 1), strict=True)
            result[row] = [first] + [entry for entry in top if entry[0] != first[0]]
        return result


def score_tokens(logits: torch.Tensor, token_ids: torch.Tensor, rows: list[int], num_top: list[int]) -> TokenLogprobs:
    """Log-probabilities under softmax(logits), without temperature. logits: [L, V], any float dtype; token_ids: [L]."""
    logits = logits.float()
    log_sum = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, token_ids[:, None])
    top = logits.topk(min(max(num_top, default=0), logits.shape[1]), dim=-1)
    return TokenLogprobs(
        rows=rows,
        num_top=[min(count, logits.shape[1]) for count in num_top],
        token_ids=token_ids,
        logprobs=(chosen - log_sum).squeeze(1),
        ranks=1 + (logits > chosen).sum(dim=-1),
        top_ids=top.indices,
        top_logprobs=top.values - log_sum,
    )


def score_prompt(logits: torch.Tensor, next_ids: torch.Tensor, num_top: int) -> TokenLogprobs:
    """How likely each prompt token was, given those before it.

    logits: [T, V] of T prompt positions; next_ids: int64 [T], the token that follows each. Entry i is `next_ids[i]`'s.
    """
    count = logits.shape[0]
    return score_tokens(logits, next_ids, list(range(count)), [num_top] * count)
