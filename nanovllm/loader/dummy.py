"""`load_format="dummy"`: random weights in place of a checkpoint, for speed measurements and tests.

Values are such that activations stay finite and every weight matters: norms are near one but not one, so that a
dropped norm weight shows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


@torch.no_grad()
def dummy_weights(named_parameters: Iterable[tuple[str, torch.Tensor]], seed: int = 0) -> None:
    """Fill parameters in place, on their own device: N(0, 0.02²), vectors that end in "norm.weight" 1 + N(0, 0.1²).

    The same seed, device, dtypes and order of parameters give the same values.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in named_parameters:
        device = parameter.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        is_norm = parameter.dim() == 1 and name.endswith("norm.weight")
        mean, std = (1.0, 0.1) if is_norm else (0.0, 0.02)
        parameter.normal_(mean, std, generator=generators[device])
