"""What a step must at least read and compute, from the shape of a model: the numerators of the roofline. Pure.

Every weight once (the embedding table only as the LM head), the keys and values of the context once, the new token's
written. Activations, norms and logits are left out: below 1 % at the sizes measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """Bytes to and from the device's memory, and floating-point operations (a multiply-add is two)."""

    bytes: float
    flop: float


class Shape:
    """The numbers of a `config.json` that work depends on. KeyError for one that it lacks."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        hidden, self.layers = config["hidden_size"], config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or hidden // self.heads
        self.vocab, tied = config["vocab_size"], config.get("tie_word_embeddings", False)
        attention = 2 * hidden * self.head_dim * (self.heads + self.kv_heads)  # q and o, k and v
        self.body = self.layers * (attention + 3 * hidden * config["intermediate_size"])
        self.head = self.vocab * hidden
        self.parameters = self.body + self.head * (1 if tied else 2)  # norms left out

    def kv_bytes(self, tokens: float, element_size: int) -> float:
        """Keys and values of so many tokens over all layers."""
        return 2.0 * self.layers * self.kv_heads * self.head_dim * element_size * tokens

    def decode(self, batch: int, context: float, element_size: int) -> Work:
        """One step of `batch` sequences, each looking back on `context` tokens."""
        kv = self.kv_bytes(batch * (context + 1), element_size)
        attention = 4.0 * batch * context * self.heads * self.head_dim * self.layers
        return Work((self.body + self.head) * element_size + kv, 2.0 * batch * (self.body + self.head) + attention)

    def prefill(self, tokens: int, element_size: int) -> Work:
        """One prompt, one token out: a causal half of the attention matrix, one row of logits."""
        attention = 2.0 * tokens * tokens * self.heads * self.head_dim * self.layers
        flop = 2.0 * (tokens * self.body + self.head) + attention
        return Work((self.body + self.head) * element_size + self.kv_bytes(tokens, element_size), flop)
