"""Layers of every rank, built side by side in one process, add up to the whole layer."""

from __future__ import annotations

import pytest
import torch

from nanovllm.layers.embedding import LMHead, VocabParallelEmbedding
from nanovllm.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.parallel import Build, TensorParallel

K = 24


class Alone(TensorParallel):
    """A rank whose communication is left to the test."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather_last(self, x: torch.Tensor) -> torch.Tensor:
        return x


def ranks(world: int) -> list[Build]:
    return [Build(torch.float32, torch.device("cpu"), Alone(rank, world)) for rank in range(world)]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "world"),
    [(8, 2, 4, 1), (8, 4, 4, 2), (8, 2, 4, 4), (8, 1, 6, 8), (12, 2, 4, 6), (6, 3, 4, 3)],
)
def test_query_heads_meet_their_kv_head(heads: int, kv_heads: int, dim: int, world: int) -> None:
    """Also with fewer KV heads than ranks, where each lives on several."""
    torch.manual_seed(0)
    weights = [torch.randn(n * dim, K) for n in (heads, kv_heads, kv_heads)]
    biases = [torch.randn(n * dim) for n in (heads, kv_heads, kv_heads)]
    x = torch.randn(5, K)
    whole = [(x @ w.T + b).view(5, -1, dim) for w, b in zip(weights, biases, strict=True)]
    for build in ranks(world):
        layer = QKVParallelLinear(K, heads, kv_heads, dim, True, build)
        for part, name in enumerate("qkv"):
            layer.load(f"{name}_proj.weight", weights[part], part)
            layer.load(f"{name}_proj.bias", biases[part], part)
        q, k, v = (y.view(5, -1, dim) for y in layer(x).split(layer.part_sizes, dim=-1))
        local = q.shape[1]
        for i in range(local):
            head, mine = build.tp.rank * local + i, i // (local // k.shape[1])
            group = head // (heads // kv_heads)
            assert close(q[:, i], whole[0][:, head])
            assert close(k[:, mine], whole[1][:, group]) and close(v[:, mine], whole[2][:, group])


@pytest.mark.parametrize(("heads", "kv_heads", "words"), [(14, 2, "attention heads"), (8, 6, "6 KV heads")])
def test_heads_are_never_cut(heads: int, kv_heads: int, words: str) -> None:
    """14 heads of 64 rows divide into 4 parts of 224 rows, but not of whole heads."""
    with pytest.raises(ValueError, match=f"tensor_parallel_size=4 .*{words}"):
        QKVParallelLinear(K, heads, kv_heads, 64, False, ranks(4)[0])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_and_columns(world: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, K), torch.randn(7, K), torch.randn(7)
    gate, up = torch.randn(16, K), torch.randn(16, K)
    total, gates, ups = torch.zeros(5, 7), [], []
    for build in ranks(world):
        row = RowParallelLinear(K, 7, True, build)
        row.load("o_proj.weight", weight)
        row.load("o_proj.bias", bias)
        k = K // world
        total += row(x[:, build.tp.rank * k : (build.tp.rank + 1) * k])
        column = ColumnParallelLinear(K, [16, 16], False, build)
        column.load("gate_proj.weight", gate, 0)
        column.load("up_proj.weight", up, 1)
        halves = column(x).chunk(2, dim=-1)
        gates.append(halves[0])
        ups.append(halves[1])
    assert close(total, x @ weight.T + bias)
    assert close(torch.cat(gates, -1), x @ gate.T) and close(torch.cat(ups, -1), x @ up.T)


@pytest.mark.parametrize(("vocab", "world"), [(10, 4), (9, 8), (8, 8), (3, 8), (211, 2)])
def test_a_vocabulary_that_does_not_divide(vocab: int, world: int) -> None:
    """Some ranks hold padding rows, some nothing else."""
    torch.manual_seed(0)
    table, x, ids = torch.randn(vocab, K), torch.randn(5, K), torch.arange(vocab)
    total, logits = torch.zeros(vocab, K), []
    for build in ranks(world):
        embedding = VocabParallelEmbedding(vocab, K, build)
        embedding.weight.data.fill_(float("nan"))
        embedding.load("embed_tokens.weight", table)
        total += embedding(ids)
        head = LMHead(embedding, True, build)
        head.vocab_size = embedding.rows  # what a rank contributes, padding included
        logits.append(head(x))
    assert torch.equal(total, table)
    assert close(torch.cat(logits, -1)[:, :vocab], x @ table.T)


@pytest.mark.parametrize("shape", [(64,), (4, 4, 4), (3, 3)])
def test_a_wrong_shape_names_both_shapes(shape: tuple[int, ...]) -> None:
    """Also where a flat weight could pass for the layer's bias."""
    layer = QKVParallelLinear(K, 8, 2, 8, True, ranks(1)[0])
    for name, expected in (("q_proj.weight", r"\[64, 24\]"), ("q_proj.bias", r"\[64\]")):
        if name.endswith("bias") and shape == (64,):
            continue
        with pytest.raises(ValueError, match=rf"tensor {name} has shape .* where the model expects {expected}"):
            layer.load(name, torch.zeros(shape), 0)
