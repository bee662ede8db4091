"""Writes smollm2_greedy.json: what Hugging Face generates greedily from SmolLM2-135M-Instruct, in fp32, one by one.

    python tests/data/make_smollm2_greedy.py

The tests compare against this file, so that they need not run Hugging Face for minutes. Beside every token stands
the gap between the two largest logits, which tells how close a call it was.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanovllm.loader.resolve import resolve_model

NEW_TOKENS = 64
OUTPUT = Path(__file__).with_name("smollm2_greedy.json")

_STORY = (
    "The lighthouse keeper climbed the stairs every evening with a lamp in one hand and a book in the other. "
    "On clear nights he could see three villages, each with its own small harbour, and on foggy nights he saw nothing "
    "but the pale circle of his own light. Ships passed far out, slow as clouds. He wrote down their names when he "
    "could read them, and guessed them when he could not. In winter the supply boat came once a month, bringing oil, "
    "flour, letters and the newspapers of the month before, which he read in order, one a day, as if they were new. "
)
_PHYSICS = (
    "A heat pump moves energy from a cold place to a warm one. It does so by letting a fluid evaporate at low "
    "pressure, where it takes in heat, and condense at high pressure, where it gives the heat away. The ratio between "
    "the heat delivered and the work spent is called the coefficient of performance. For ideal machines it depends "
    "only on the two temperatures; for real ones it also depends on the compressor, the heat exchangers and the "
    "controls. "
)
_CODE = '''def merge_sorted(left: list[int], right: list[int]) -> list[int]:
    """Merge two sorted lists into one."""
    result = []
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            result.append(left[i])
            i += 1
        else:
            result.append(right[j])
            j += 1
    result.extend(left[i:])
    result.extend(right[j:])
    return result


def merge_sort(values: list[int]) -> list[int]:
'''


def chat(question: str, system: str = "You are a helpful AI assistant named SmolLM, trained by Hugging Face") -> str:
    """SmolLM2's chat format, written out so that the file does not depend on a template engine."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


PROMPTS = [
    "Once upon a time, in a small village by the sea,",
    "The three most important ideas in computer science are, in my view,",
    "import numpy as np\n\n# Compute the moving average of a signal\ndef moving_average(",
    "Dear Professor Lindqvist,\n\nI am writing to ask whether",
    "Q: What is 17 + 25?\nA: 42\nQ: What is 9 * 8?\nA: 72\nQ: What is 144 / 12?\nA:",
    "人工智能的历史可以追溯到二十世纪五十年代，当时",
    "Recette de la soupe à l'oignon 🧅 : il faut d'abord",
    "| city | country | population |\n|---|---|---|\n| Paris | France | 2.1 million |\n| Rome | Italy |",
    "SELECT customer.name, SUM(orders.total) FROM customer JOIN orders ON",
    chat("What is the capital of France?"),
    chat("Explain photosynthesis to a ten-year-old in three sentences."),
    chat("Write a haiku about autumn rain.", system="You are a poet."),
    chat("List five prime numbers greater than 50 and say why each is prime."),
    _STORY,
    _PHYSICS,
    _CODE,
    _STORY + _PHYSICS,
    _PHYSICS * 2 + "In summary,",
    chat("Summarise this text in one sentence:\n\n" + _STORY * 2),
    chat("Which of the two texts is about energy?\n\n1. " + _STORY + "\n\n2. " + _PHYSICS + "\n\n3. " + _CODE),
    _STORY * 3 + "One night, however,",
    (_STORY + _PHYSICS) * 2 + _PHYSICS[:170] + " What does the lighthouse have in common with a heat pump? It",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233,",
]


@torch.inference_mode()
def main() -> None:
    """Generate and write."""
    gguf = resolve_model("smollm2").path
    options = dict(gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options).eval()
    cases = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        top2 = torch.cat(out.logits).topk(2).values
        new = out.sequences[0, len(ids) :].tolist()
        gaps = [round(gap, 5) for gap in (top2[:, 0] - top2[:, 1]).tolist()]
        cases.append(
            dict(
                prompt=prompt,
                prompt_token_ids=ids,
                token_ids=new,
                gaps=gaps,
                text=tokenizer.decode(new, skip_special_tokens=True),
            )
        )
        print(f"{len(ids):4} tokens, smallest gap {min(gaps):.4f}: {cases[-1]['text'][:60]!r}")
    facts = dict(transformers=transformers.__version__, torch=torch.__version__, dtype="float32", model=gguf.name)
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    OUTPUT.write_text(f'{{"made_with": {json.dumps(facts)},\n"cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
