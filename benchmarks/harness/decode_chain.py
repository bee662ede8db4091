"""The decode chain in pieces: what `bench_decode_chain` times, and how a configuration of one's own gets into it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from nanovllm.engine.cuda_graph import SHORT_CONTEXT
from nanovllm.kernels import chain_config, launch_config
from nanovllm.kernels.fusion_config import FusionConfig, Problem
from nanovllm.kernels.launch_config import DecodeConfig, Gpu, cdiv
from nanovllm.layers.attention.backend import AttentionMetadata
from nanovllm.layers.forward_batch import ForwardBatch
from nanovllm.layers.fused_norm_linear import linear_residual_, norm_linear

FORMS = ("fused", "unfused", "linears", "head")
LINEARS = ("qkv", "o_proj", "gate_up", "down", "lm_head")


def linear_choice(text: str) -> tuple[str, FusionConfig]:
    """ "qkv=gemv/16/256/8" -> its name and configuration. ArgumentTypeError, a sentence, for anything else."""
    name, _, config = text.partition("=")
    if name not in LINEARS:
        raise argparse.ArgumentTypeError(f"{text!r} names none of {', '.join(LINEARS)}")
    try:
        return name, FusionConfig.parse(config)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def attention_config(text: str) -> DecodeConfig:
    """ "128,16,128,8": block_n, splits, min_split and warps. ArgumentTypeError, a sentence, for what cannot run."""
    try:
        block_n, splits, min_split, num_warps = map(int, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not BLOCK_N,SPLITS,MIN_SPLIT,WARPS") from error
    if any(n < 1 or n & (n - 1) for n in (block_n, num_warps)) or block_n < 16:
        raise argparse.ArgumentTypeError(f"{text!r}: BLOCK_N (16 or more) and WARPS are powers of two")
    if not 1 <= splits <= 64 or min_split < 1 or min_split % block_n:
        raise argparse.ArgumentTypeError(f"{text!r}: SPLITS is 1 to 64, and MIN_SPLIT a multiple of BLOCK_N")
    return DecodeConfig(block_n, splits, min_split, num_warps, num_stages=1)


def said(form: str, linears: Mapping[str, FusionConfig], attention: DecodeConfig | None) -> str:
    """The form with the choices that it heeds, as a row's `options`."""
    heeded = {"fused": LINEARS[:4], "linears": LINEARS[:4], "head": LINEARS[4:], "unfused": ()}[form]
    words = [form, *(f"{name}={linears[name]}" for name in LINEARS if name in heeded and name in linears)]
    if form == "fused" and attention is not None:
        a = attention
        words.append(f"attention={a.block_n},{a.splits},{a.min_split},{a.num_warps}")
    return " ".join(words)


class Chain:
    """The layers of a loaded model, to be run form by form. `runner`: an engine's ModelRunner, eager."""

    def __init__(self, runner: Any) -> None:
        self.model, self.caches, self.device, self.dtype = runner.model, runner.caches, runner.device, runner.dtype
        self.layers, self._blocks = len(runner.model.model.layers), runner.num_blocks
        self._page, self._longest = runner.caches[0][0].shape[2], runner.max_model_len
        layer = self.model.model.layers[0]
        attention, mlp = layer.self_attn, layer.mlp
        linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj, self.model.lm_head.table)
        self._names: dict[tuple[int, int, bool], str] = {}
        for name, linear in zip(LINEARS, linears, strict=True):
            (rows, width), swiglu = linear.weight.shape, name == "gate_up"
            self._names[rows // 2 if swiglu else rows, width, swiglu] = name

    def batch(self, rows: int, context: int) -> ForwardBatch:
        """One new token for each of `rows` sequences of `context` tokens, pages in random order.

        ValueError where the KV cache has too few blocks.
        """
        pages = cdiv(context, self._page)
        if rows * pages > self._blocks:
            raise ValueError(f"{rows} x {context} tokens need {rows * pages} blocks, the KV cache has {self._blocks}")
        order = torch.randperm(self._blocks, generator=torch.Generator().manual_seed(0))
        table = order[: rows * pages].view(rows, pages)
        last = table[:, -1] * self._page + (context - 1) % self._page
        attention = AttentionMetadata(
            num_decodes=rows,
            query_start=torch.arange(rows + 1, dtype=torch.int32, device=self.device),
            context_lens=torch.full((rows,), context, dtype=torch.int32, device=self.device),
            block_table=table.to(self.device, torch.int32),
            slot_mapping=last.to(self.device),
            max_query_len=0,
            max_context_len=SHORT_CONTEXT if context <= SHORT_CONTEXT else self._longest,  # as graphs are captured
            query_lens_cpu=[1] * rows,
            context_lens_cpu=[context] * rows,
        )
        positions = torch.full((rows,), context - 1, device=self.device)
        return ForwardBatch(positions.new_zeros(rows), positions, attention, None)

    def steps(self, rows: int, context: int) -> dict[str, Callable[[], torch.Tensor]]:
        """Each form of `FORMS` as a function of nothing: [rows, hidden] behind all layers; of `head`, the logits."""
        batch, body = self.batch(rows, context), self.model.model
        width = body.embed_tokens.weight.shape[1]
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(self.device, self.dtype)

        def fused() -> torch.Tensor:
            plans, stream = body.split_plans(batch, self.caches), x.clone()
            for layer, cache, plan in zip(body.layers, self.caches, plans, strict=True):
                stream = layer.decode(stream, body.rotary.table, cache, batch, plan)
            return stream

        def unfused() -> torch.Tensor:
            batch.attention.scratch.clear()  # its plan is part of a step
            rope = body.rotary.rows(batch.positions, None)
            branch, residual = x.clone(), None
            for layer, cache in zip(body.layers, self.caches, strict=True):
                branch, residual = layer(branch, residual, rope, cache, batch)
            return branch + residual

        def linears() -> torch.Tensor:
            stream = x.clone()
            for layer in body.layers:
                attention, mlp = layer.self_attn, layer.mlp
                queries = norm_linear(stream, layer.input_layernorm, attention.qkv_proj)
                queries = queries[:, : attention.o_proj.weight.shape[1]]
                stream = linear_residual_(queries, attention.o_proj, stream)
                inner = norm_linear(stream, layer.post_attention_layernorm, mlp.gate_up_proj, swiglu=True)
                stream = linear_residual_(inner, mlp.down_proj, stream)
            return stream

        def head() -> torch.Tensor:
            return norm_linear(x, body.norm, self.model.lm_head.table)

        return {"fused": fused, "unfused": unfused, "linears": linears, "head": head}

    @contextmanager
    def choosing(self, linears: Mapping[str, FusionConfig], attention: DecodeConfig | None) -> Iterator[None]:
        """Within it the chain takes these configurations, and its policy's where there is none.

        ValueError, when a step runs, for one that cannot run its linear.
        """

        def linear_config(problem: Problem, gpu: Gpu, *, norm: bool = True) -> FusionConfig:
            name = self._names[problem.n, problem.k, problem.swiglu]
            if name not in linears:
                return chain_config.linear_config(problem, gpu, norm=norm)
            config = replace(linears[name], launch_pdl=gpu.pdl and linears[name].variant != "unfused")
            if faults := config.faults(problem, gpu):
                raise ValueError(f"{name} cannot be {config} for {problem.m} rows: {'; '.join(faults)}")
            return config

        def rope_attention_config(*shape: Any) -> DecodeConfig:
            return attention or launch_config.rope_attention_config(*shape)

        with (
            patch("nanovllm.layers.fused_norm_linear.linear_config", linear_config),
            patch("nanovllm.kernels.rope_attention.rope_attention_config", rope_attention_config),
        ):
            yield
