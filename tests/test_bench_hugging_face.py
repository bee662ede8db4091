"""What the real-text benchmark computes from two sets of logits, and which texts it takes; no model, no GPU."""

from __future__ import annotations

import math

import pytest
import torch
from harness.hugging_face import divergence, texts
from harness.models import SHAPES


def test_divergence_of_known_distributions() -> None:
    """Two positions: p = (3/4, 1/4) against q = (1/2, 1/2) and against itself."""
    p = torch.tensor([[[math.log(3.0), 0.0], [math.log(3.0), 0.0]]])
    q = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0]]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = divergence(q + 7, p)  # a constant changes no distribution
    assert found["kl_nats"] == pytest.approx(kl / 2) and found["argmax_agreement"] == 1.0
    assert found["kl_nats_p99"] == pytest.approx(0.99 * kl)
    assert divergence(p, q)["kl_nats"] == pytest.approx(0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2)))
    assert divergence(-p, p)["argmax_agreement"] == 0.0
    same = divergence(p, p)
    assert same == {"argmax_agreement": 1.0, "kl_nats": 0.0, "kl_nats_p99": 0.0}


def test_texts_have_one_length() -> None:
    assert texts(1, 10**6).shape == (1, 545)  # 481 tokens of prompt, 64 of answer
    assert texts(4, 100).shape == (4, 100)
    many = texts(16, 400)
    assert many.shape[0] == 16 and many.shape[1] < 400 and bool((many >= 0).all())
    with pytest.raises(ValueError, match="there are 23 texts, not 40"):
        texts(40, 400)


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_are_hugging_face_configs(name: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(**SHAPES[name])
    assert (config.hidden_size, config.num_hidden_layers) == (
        SHAPES[name]["hidden_size"], SHAPES[name]["num_hidden_layers"],
    )  # fmt: skip
