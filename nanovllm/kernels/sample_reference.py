"""Stateless random numbers, cuts and sampling in plain PyTorch: the specification of `sample` and `sample_cut`, and
their CPU path.

Gumbel-max: argmax(logits / T + g) with g = -log(-log(u)) is a draw from softmax(logits / T), so sampling needs neither
the softmax nor its sum (Gumbel 1954; used for language models in arXiv 2603.15854).

The uniform number u is a hash of (seed, position in the sequence, vocabulary index), not the next output of a generator
(counter-based random numbers: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). A seeded sequence
therefore draws the same tokens in whatever batch, order or chunking it runs, and again after a preemption.

The hash is Wellons' `lowbias32` mixer, twice for each element, with two 32-bit keys that a row derives from its seed
and position. All of it is arithmetic modulo 2**32, written here in int32, which wraps, and in `sample` in uint32.

A cut (top-k, top-p, min-p) is one threshold a row on the logits, see `cut_threshold`.
"""

from __future__ import annotations

import math

import torch

# lowbias32 (hash-prospector, bias 0.17): as signed numbers, since torch has no uint32 arithmetic.
_MULTIPLY_1 = 0x7FEB352D
_MULTIPLY_2 = 0x846CA68B - 2**32
# Start values of the two keys: fractional digits of the golden ratio and of the square root of 3.
_KEY_1 = 0x9E3779B9 - 2**32
_KEY_2 = 0xBB67AE85 - 2**32

GUMBEL_SPREAD = 19.5  # the largest noise minus the smallest, rounded up
_HEAD = 1024  # so many of the largest logits are looked at before a whole row is sorted


def mix32(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers in which each input bit flips each output bit half of the time. x: int32."""
    x = x ^ ((x >> 16) & 0xFFFF)  # the mask makes int32's arithmetic shift a logical one
    x.mul_(_MULTIPLY_1)
    x.bitwise_xor_((x >> 15) & 0x1FFFF)
    x.mul_(_MULTIPLY_2)
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


def row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Two 32-bit keys a row. seeds: int64 [R]; positions: integer [R], below 2**32. Returns int32 [2, R].

    The keys chain the three words in different orders; no two seeds share both keys at a position.
    """
    low, high, position = _low32(seeds), _low32(seeds >> 32), _low32(positions)
    first = torch.stack((low + _KEY_1, position + _KEY_2))
    second = torch.stack((high, low))
    third = torch.stack((position, high))
    return mix32(mix32(mix32(first) ^ second) ^ third)


def keyed_uniform(keys: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in (0, 1), float32 [R, N]: multiples of 2**-23 plus 2**-24, so never 0 and never 1.

    keys: int32 [2, R]; index: int32 [R, N], or [N] for the same indices in every row.
    """
    bits = mix32(mix32(index ^ keys[0, :, None]).add_(keys[1, :, None]))
    # 23 bits and a half are 24 significant bits: exact in float32, where 24 bits and a half would round up to 1.
    return ((bits >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def uniform(seeds: torch.Tensor, positions: torch.Tensor, width: int) -> torch.Tensor:
    """The uniform numbers of indices 0 to width - 1, float32 [R, width]; seeds and positions as in `row_keys`."""
    return keyed_uniform(row_keys(seeds, positions), torch.arange(width, dtype=torch.int32, device=seeds.device))


def gumbel(keys: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32 [R, N], from -2.82 to 16.64; arguments as in `keyed_uniform`."""
    return keyed_uniform(keys, index).log_().neg_().log_().neg_()


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    threshold: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token a row: argmax(logits * (1 / temperature) + gumbel), or argmax(logits) where temperature is 0.

    logits: [R, V], any float dtype, computed in float32; temperature: float32 [R]; seeds: int64 [R];
    positions: integer [R]; threshold: float32 [R], logits below it cannot win. Returns int64 [R]. The lowest index
    wins a tie.
    """
    tokens = logits.argmax(dim=-1)
    random_rows = torch.nonzero(temperature > 0).flatten().tolist()
    if not random_rows:
        return tokens
    keys = row_keys(seeds, positions)
    vocabulary = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    for row in random_rows:
        scores = logits[row].float() * (1.0 / temperature[row])
        if threshold is not None:
            scores.masked_fill_(logits[row].float() < threshold[row], -math.inf)
        # Noise costs some forty operations an element; tokens too far behind for any noise to bring them to the front
        # can do without. Below a quarter, gathering the others pays. Written so that NaN counts as near.
        near = ~(scores < scores.max() - GUMBEL_SPREAD)
        if int(near.sum()) < logits.shape[1] // 4:
            index = torch.nonzero(near).flatten()
            noise = gumbel(keys[:, row : row + 1], index.to(torch.int32))
            tokens[row] = index[(scores[index] + noise[0]).argmax()]
        else:
            noise = gumbel(keys[:, row : row + 1], vocabulary)
            tokens[row] = (scores + noise[0]).argmax()
    return tokens


def cut_threshold(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """The logit below which top-k, top-p and min-p exclude a token, float32 [R]; -inf where nothing is excluded.

    logits: [R, V], any float dtype, computed in float32; temperature: float32 [R], a row with 0 is greedy and not cut;
    top_k: integer [R], 0 for none; top_p: float32 [R] above 0, 1 for none; min_p: float32 [R], 0 to 1, 0 for none.

    Order and meaning are Hugging Face's. With shares exp((logit - largest) / temperature):
      top-k   keeps logits not below the k-th largest;
      top-p   among those, of share total Z, a logit if the shares of all larger ones together are less than top_p * Z;
      min-p   keeps shares of at least min_p.
    Tokens with equal logits are kept or cut together, so that no order of a sort shows (Hugging Face's top-p splits
    ties; its top-k and min-p do not). The largest is always kept. NaN counts as -inf.
    """
    result = torch.full((logits.shape[0],), -math.inf, dtype=torch.float32, device=logits.device)
    asked = (temperature > 0) & (((top_k > 0) & (top_k < logits.shape[1])) | (top_p < 1) | (min_p > 0))
    for row in torch.nonzero(asked).flatten().tolist():
        heat, k, p, floor = (float(t[row]) for t in (temperature, top_k, top_p, min_p))
        result[row] = _row_threshold(logits[row].float(), heat, int(k), p, floor)
    return result


def _row_threshold(logits: torch.Tensor, heat: float, k: int, p: float, floor: float) -> float:
    """`cut_threshold` of one row. logits: float32 [V]."""
    values = torch.where(logits.isnan(), -math.inf, logits)
    largest, vocab = values.max(), values.numel()

    def share(x: torch.Tensor) -> torch.Tensor:
        # An infinite largest logit has the distance 0 from itself.
        return torch.where(x == largest, 1.0, torch.exp((x - largest) * (1.0 / heat)))

    cut = -math.inf
    if 0 < k < vocab:
        cut = float(values.topk(k).values[-1])
    if p < 1.0:
        total = share(values[values >= cut]).sum(dtype=torch.float64)
        # Nearly always few tokens hold the share p: finding those is a twentieth of the work of a sort.
        for head in (min(_HEAD, vocab), vocab):
            best = values.topk(head).values if head < vocab else values.sort(descending=True).values
            enough = torch.nonzero(share(best).cumsum(0, dtype=torch.float64) >= p * total)
            if len(enough):  # never, if rounding keeps all shares together below p: then nothing is cut
                cut = max(cut, float(best[enough[0]]))
                break
    if floor > 0.0:
        cut = max(cut, float(largest) + math.log(floor) * heat)
    return min(cut, float(largest))  # in float64, a largest logit minus nothing may round up


def _low32(x: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of integers as int32."""
    if x.dtype == torch.int32:
        return x
    x = x.long() & 0xFFFFFFFF
    return (x - ((x >> 31) << 32)).to(torch.int32)
