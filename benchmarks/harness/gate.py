"""No time without a green gate: before a cell is timed, its greedy answers are judged at the very shape of the cell.

A referee reads prompt and answer at once and says of every token of the answer how much less likely it is than the
likeliest (nats). A right engine answers with the likeliest token, or one so close that rounding decides. A wrong one
picks tokens some nats down: with random weights the likeliest token of a vocabulary of 150,000 lies 2.8 above the mean.
The referee is Hugging Face when it takes part in the run; else our own prefill, unfused if there is such an engine,
whose kernels are not those of decode. (That the logits themselves are right within rounding is a matter of the tests.)
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.cells import Cell, Decode, Request, Workload
from harness.client import EngineError, Timed

# (one token, mean of all) in nats. bf16 logits of these models differ by some 0.02 rms between two right engines, and
# a regret is a difference of two of them; the bounds hold that many times over, and a random token misses them by 2.
LIMITS = {"float32": (0.01, 0.001), "bfloat16": (0.5, 0.05), "float16": (0.5, 0.05)}
JUDGED = 2  # answers of a cell that are judged, the first and the last
TOKENS = 8  # of an answer where the cell itself does not say


def choose_referee(engines: Sequence[Timed]) -> Timed | None:
    """Who judges; None when nobody of the run can."""
    order = [("transformers", "auto"), ("nanovllm", "off"), ("nanovllm", "auto"), ("nanovllm", "on")]
    found = {(e.options.engine, e.options.fusion): e for e in reversed(engines)}
    return next((found[key] for key in order if key in found), None)


def gate_request(cell: Cell, vocab: int) -> Request:
    """The greedy request that is judged: the cell's own shape, with a short answer."""
    if isinstance(cell, Workload):
        drawn = cell.request("gate", vocab)
        return Request(drawn.prompts[:16], [TOKENS] * min(16, cell.batch))
    return cell.request("gate", vocab, cell.short if isinstance(cell, Decode) else TOKENS)


def judge(engine: Timed, referee: Timed, request: Request) -> str:
    """Why the engine may not be timed, in a sentence; "" if it may. It also warms the engine up."""
    answers = engine.generate(request, 0.0, tokens=True)["tokens"]
    picked = sorted({0, len(answers) - 1})[:JUDGED]
    texts = [request.prompts[i] + answers[i] for i in picked]
    regrets = referee.ask("score", texts=texts, starts=[len(request.prompts[i]) for i in picked])["regrets"]
    values = [value for row in regrets for value in row]
    if len(values) != sum(len(answers[i]) for i in picked):
        raise EngineError(f"{referee.label} judged {len(values)} tokens of {engine.label}, not all")
    one, mean = LIMITS[engine.about["dtype"]]
    worst, average = max(values), sum(values) / len(values)
    if worst <= one and average <= mean:  # also refuses a NaN
        return ""
    return (
        f"{engine.label} is not timed: its tokens are up to {worst:.3g} nats ({average:.3g} in the mean) below the "
        f"likeliest by {referee.label}, allowed {one} and {mean}"
    )
