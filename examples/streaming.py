"""Three ways to watch tokens arrive: a plain loop, asyncio with several requests at once, and an early stop."""

from __future__ import annotations

import asyncio

from nanovllm import LLM, AsyncLLM, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=24)


def plain() -> None:
    """One request, printed as it grows; leaving the loop would abort it."""
    with LLM("smollm2", max_model_len=1024, show_progress=False) as llm:
        printed = 0
        for output in llm.stream("The three primary colours are", PARAMS):
            print(output["text"][printed:], end="", flush=True)
            printed = len(output["text"])
        print()


async def concurrent() -> None:
    """Several requests in the same batches, each with its own stream."""

    async def answer(llm: AsyncLLM, prompt: str) -> str:
        text = ""
        async for output in llm.generate(prompt, PARAMS):
            text = output["text"]
            if "." in text:  # enough: leaving the loop aborts the request
                break
        return prompt + text

    async with AsyncLLM("smollm2", max_model_len=1024, show_progress=False) as llm:
        prompts = ["The Moon is", "Bread is made of", "A prime number is"]
        for line in await asyncio.gather(*(answer(llm, prompt) for prompt in prompts)):
            print(line)


if __name__ == "__main__":
    plain()
    asyncio.run(concurrent())
