"""What is tuned: the linears behind a norm, of known or given models, at some numbers of rows. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nanovllm.config import ModelConfig
from nanovllm.kernels.fusion_config import Problem

ROWS = (1, 2, 4, 8, 16, 32, 64)  # batches of decoding; above, the table has little to say


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the linears of a decoder; names as in config.json."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        """The shape of a model that has been read."""
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.vocab_size,
        )


# From the models' config.json on the Hugging Face hub.
SHAPES = {
    "Qwen3-0.6B": Shape(1024, 3072, 16, 8, 128, 151936),
    "Qwen3-1.7B": Shape(2048, 6144, 16, 8, 128, 151936),
    "Qwen3-4B": Shape(2560, 9728, 32, 8, 128, 151936),
    "Qwen3-8B": Shape(4096, 12288, 32, 8, 128, 151936),
    "Llama-3.2-1B": Shape(2048, 8192, 32, 8, 64, 128256),
}
LAYERS = ("qkv", "gate_up", "gate_up+swiglu", "lm_head")


@dataclass(frozen=True, slots=True)
class Case:
    """One linear of one model at one batch. `folded`: gamma is part of the weight, the operator gets none."""

    model: str
    layer: str
    problem: Problem
    folded: bool = False


def cases(
    shapes: dict[str, Shape],
    rows: Iterable[int] = ROWS,
    dtype: str = "bfloat16",
    layers: Iterable[str] = LAYERS,
    *,
    folded: bool = False,
) -> list[Case]:
    """All cases, in the order of `rows`, so that a run that is cut short knows the small batches of every model."""
    return [
        Case(model, layer, Problem(m, n, shape.hidden_size, dtype, layer.endswith("swiglu")), folded)
        for m in rows
        for model, shape in shapes.items()
        for layer, n in _outputs(shape)
        if layer in set(layers)
    ]


def _outputs(shape: Shape) -> Iterator[tuple[str, int]]:
    """(layer, outputs). gate_up comes with SwiGLU in the kernel and, for whom applies it elsewhere, without."""
    yield "qkv", (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim
    yield "gate_up", 2 * shape.intermediate_size
    yield "gate_up+swiglu", shape.intermediate_size
    yield "lm_head", shape.vocab_size
