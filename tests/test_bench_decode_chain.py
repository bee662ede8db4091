"""The layer benchmark without a GPU: what it runs is a decode step, its words are understood, mistakes are said."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Iterator
from pathlib import Path

import bench_decode_chain
import pytest
import torch
from harness.decode_chain import FORMS, Chain, attention_config, linear_choice, said
from harness.models import SMOKE, write_config

from nanovllm import LLM
from nanovllm.kernels import rope_attention
from nanovllm.kernels.fusion_config import FusionConfig, Problem
from nanovllm.kernels.launch_config import DecodeConfig, Gpu
from nanovllm.layers import fused_norm_linear

HOPPER = Gpu(num_sms=132, shared_memory=227 * 1024, pdl=True)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    path = write_config(SMOKE, tmp_path_factory.mktemp("model"))
    small = {"num_kvcache_blocks": 12, "max_model_len": 128, "enforce_eager": True, "show_progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanovllm.kernels.cpu_linear.can_pack", lambda weight: False)  # plain weights, as on a GPU
        with LLM(str(path), load_format="dummy", dtype="float32", **small) as llm:
            yield Chain(llm.engine.runner)


@torch.inference_mode()
def test_fused_and_unfused_layers_are_the_same_step(chain: Chain) -> None:
    """Also: the linears alone are another function, and a longer context another result."""
    for keys, values in chain.caches:
        keys.normal_()
        values.normal_()
    steps = chain.steps(3, 50)
    assert tuple(steps) == FORMS
    found = {form: step() for form, step in steps.items()}
    assert found["fused"].shape == (3, 64) and found["head"].shape == (3, 512)
    torch.testing.assert_close(found["fused"], found["unfused"], rtol=0, atol=1e-5)
    torch.testing.assert_close(steps["fused"](), found["fused"], rtol=0, atol=0)  # each replay starts anew
    assert not torch.allclose(found["linears"], found["fused"], atol=1e-3)
    assert not torch.allclose(chain.steps(3, 20)["fused"](), found["fused"], atol=1e-3)


def test_a_batch_needs_its_blocks(chain: Chain) -> None:
    table = chain.batch(2, 40).attention.block_table
    assert len(set(table.flatten().tolist())) == table.numel()
    with pytest.raises(ValueError, match="the KV cache has 12"):
        chain.batch(16, 120)


def test_choices_replace_the_policy_and_only_for_a_while(chain: Chain) -> None:
    name, config = linear_choice("qkv=gemv/8/32/4")
    qkv, down, attention = Problem(1, 128, 64), Problem(1, 64, 96), attention_config("64,4,128,8")
    before = fused_norm_linear.linear_config(down, HOPPER)
    with chain.choosing({name: config}, attention):
        assert str(fused_norm_linear.linear_config(qkv, HOPPER)) == "gemv/8/32/4/pdl"
        assert fused_norm_linear.linear_config(down, HOPPER) == before
        assert rope_attention.rope_attention_config(1, 2, 16, 2, 512, HOPPER) == DecodeConfig(64, 4, 128, 8, 1)
        with pytest.raises(ValueError, match="qkv cannot be gemv/8/32/4/pdl for 9 rows: a GEMV takes at most 8"):
            fused_norm_linear.linear_config(Problem(9, 128, 64), HOPPER)
    assert fused_norm_linear.linear_config(qkv, HOPPER) != linear_choice("qkv=gemv/8/32/4/pdl")[1]
    assert rope_attention.rope_attention_config(1, 2, 16, 2, 512, HOPPER) != attention


def test_options_name_what_the_form_heeds() -> None:
    linears = {"lm_head": FusionConfig.parse("gemv/16/256/8"), "down": FusionConfig.parse("unfused")}
    attention = attention_config("128,16,256,8")
    assert said("fused", linears, attention) == "fused down=unfused attention=128,16,256,8"
    assert said("linears", linears, attention) == "linears down=unfused"
    assert said("head", linears, attention) == "head lm_head=gemv/16/256/8"
    assert said("unfused", linears, attention) == "unfused"


@pytest.mark.parametrize(
    "text, sentence",
    [("mlp=unfused", "names none of qkv"), ("qkv", "no fusion config"), ("down=gemv/1", "no fusion config")],
)
def test_a_linear_that_is_none(text: str, sentence: str) -> None:
    with pytest.raises(ArgumentTypeError, match=sentence):
        linear_choice(text)


@pytest.mark.parametrize("text", ["128,16,128", "a,1,1,1", "96,4,96,4", "128,65,128,4", "128,4,100,4", "128,4,128,3"])
def test_an_attention_that_cannot_run(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=text):
        attention_config(text)


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench_decode_chain.py", "--csv", str(tmp_path / "x.csv")])
    assert bench_decode_chain.main() == 1
    assert capsys.readouterr().err == "bench_decode_chain: PyTorch finds no CUDA GPU: run this where there is one\n"
    assert not (tmp_path / "x.csv").exists()
