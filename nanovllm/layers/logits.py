"""What may happen to logits between the model and the choice of a token: plain functions of float32 tensors.

Order and meaning are those of Hugging Face's logits processors: penalties, bias, then temperature and the cuts, which
`kernels.sample_cut` does. Changes to single entries (penalties, bias, bans) address them by flat index
(row * vocab + token), so that one array serves rows of different lengths.
Nothing here waits for the device, and nothing sorts a vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
