"""`nanovllm inspect MODEL`: the shape of a model, read from its config or GGUF header; no weights are loaded."""

from __future__ import annotations

import argparse

from nanovllm.config import ModelConfig
from nanovllm.kernels.fusion_config import Problem
from nanovllm.models.groups import NormLinearGroup, norm_linear_groups


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("inspect", help="print a model's architecture, sizes and RMSNorm→Linear groups")
    parser.add_argument("model", help='directory, .gguf file, hub id, or the alias "smollm2"')
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of one sentence")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from nanovllm.loader import load_model_config, resolve_model

    source = resolve_model(args.model)
    print(report(load_model_config(source)))
    return 0


def _bytes_saved(group: NormLinearGroup) -> int:
    """Traffic of one row (a token) that one fused group avoids: the normalised row, with SwiGLU the product too."""
    swiglu = group.activation == "swiglu"
    problem = Problem(1, group.n // 2 if swiglu else group.n, group.k, "bfloat16", swiglu)
    return problem.bytes_moved(fused=False) - problem.bytes_moved()


def report(config: ModelConfig) -> str:
    """The text of the report: bf16 is assumed where a size depends on the dtype."""
    rope, windows = config.rope, sorted({w for w in config.sliding_windows if w is not None})
    per_token = config.kv_bytes_per_token(2)
    parameters = config.num_parameters
    rows = [
        ("architecture", config.architecture),
        ("parameters", f"{parameters:,} ({parameters * 2 / 1e9:.2f} GB in bf16)"),
        ("layers", str(config.num_layers)),
        ("hidden / intermediate", f"{config.hidden_size} / {config.intermediate_size}"),
        ("heads", f"{config.num_heads} query, {config.num_kv_heads} KV, head_dim {config.head_dim}"),
        ("vocabulary", f"{config.vocab_size}{', tied embeddings' if config.tie_word_embeddings else ''}"),
        ("context", f"{config.max_position_embeddings} tokens{f', sliding window {windows}' if windows else ''}"),
        ("rope", f"{rope.rope_type}, theta {rope.theta:g}{f', factor {rope.factor:g}' if rope.factor != 1 else ''}"),
        ("KV cache", f"{per_token:,} bytes per token in bf16 ({per_token / 1024:g} KiB)"),
        ("EOS ids", ", ".join(map(str, config.eos_token_ids)) or "none"),
    ]
    lines = [f"{name:<22}{value}" for name, value in rows]
    groups = norm_linear_groups(config)
    lines += ["", f"RMSNorm→Linear groups: {sum(g.count for g in groups)}"]
    lines += [f"  {'count':>5}  {'weight [N, K]':<18}{'MB bf16':>8}{'KB saved':>10}  group"]
    for g in groups:
        extras = f"{' + bias' if g.bias else ''}{f' → {g.activation}' if g.activation else ''}"
        shape = f"[{g.n}, {g.k}]"
        numbers = f"  {g.count:>5}  {shape:<18}{g.weight_bytes(2) / 1e6:>8.1f}{_bytes_saved(g) / 1e3:>10.1f}"
        lines.append(f"{numbers}  {g.norm} → {g.linear}{extras}")
    total = sum(g.count * _bytes_saved(g) for g in groups)
    lines.append(f"Memory traffic saved by fusing them, in theory: {total:,} bytes per token, of all groups together")
    return "\n".join(lines)
