"""A random life of an engine: requests of all kinds arrive, stop, and are aborted while others run."""

from __future__ import annotations

from random import Random

from nanovllm import LLM, SamplingParams
from nanovllm.engine.request import Request


def random_life(llm: LLM, seed: int, num_steps: int, vocab_size: int) -> tuple[dict[str, list[int]], int]:
    """Tokens by request, and the number of steps; what arrives depends on `seed` only, not on when steps happen.

    A request that is aborted counts with the tokens that it had when the abort was decided: how many more it got is a
    matter of timing.
    """
    rng, engine = Random(seed), llm.engine
    waiting: dict[str, tuple[Request, int | None]] = {}
    results: dict[str, list[int]] = {}
    count = steps = 0
    while steps < num_steps or waiting:
        arriving = steps < num_steps and len(waiting) < 12
        for _ in range(rng.choice((0, 0, 1, 3)) if arriving else 0):
            own = Random(f"{seed} {count}")  # the n-th request is the same whenever it comes
            greedy = own.random() < 0.5
            params = SamplingParams(
                temperature=0.0 if greedy else 0.8,
                top_k=0 if greedy else own.choice((0, 5)),
                seed=own.getrandbits(40),
                max_tokens=own.choice((1, 2, 17, 60)),
                ignore_eos=own.random() < 0.3,
                stop_token_ids=own.sample(range(vocab_size), own.choice((0, 6))),
                min_tokens=int(own.random() < 0.05),  # while such a request runs, nothing overlaps
            )
            prompt = [own.randrange(vocab_size) for _ in range(own.choice((1, 5, 31, 70)))]
            request = engine.make_request(prompt, params, request_id=f"life-{count}")
            waiting[request.request_id] = (request, own.choice((None, None, None, 3)))
            engine.submit([request])
            count += 1
        engine.step()
        steps += 1
        for request_id, (request, cut) in list(waiting.items()):
            tokens = request.completions[0].seq.output_token_ids
            if cut is not None and len(tokens) >= cut and not request.finished:
                engine.abort(request_id)
                results[request_id] = tokens[:cut]
                del waiting[request_id]
            elif request.finished:
                assert request.error is None, request.error
                results[request_id] = tokens if cut is None else tokens[:cut]
                del waiting[request_id]
    return results, steps
