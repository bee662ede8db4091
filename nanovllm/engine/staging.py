"""Host-to-device staging: arrays packed side by side, one copy a step.

A small host-to-device copy costs about 4 µs and an allocation more, so a step that sent its seven arrays one by one
would spend longer on that than on a layer. All buffers live as long as the engine (nano-vllm#176).

The host may prepare a step while the copy of the one before it still waits for the device, so what a copy reads must
not be what the host writes: arrays are filled in plain memory and pass through `IN_FLIGHT` pinned slots in turn. That
is enough, for the engine launches a step only when all but one of those before it have been waited for. A decode graph
takes its inputs from a slot itself (`kernels.fetch`): then the host only publishes them there.
"""

from __future__ import annotations

import math

import numpy as np
import torch

IN_FLIGHT = 2  # steps whose work may be queued on the device at a time
_ALIGN = 16  # bytes; lets kernels load any packed array with full vector width
_TORCH_DTYPES = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32}


class Staging:
    """Equal buffers on the host and on the device; on the CPU they are one and the same."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.device = device
        capacity = -(-capacity // _ALIGN) * _ALIGN
        on_gpu = device.type == "cuda"
        # Zeroed: graphs are recorded over these buffers before any step has filled them, and lengths of 0 are harmless.
        self._host = torch.zeros(capacity, dtype=torch.uint8)
        self._device = torch.zeros(capacity, dtype=torch.uint8, device=device) if on_gpu else self._host
        self._pinned = torch.zeros(IN_FLIGHT, capacity, dtype=torch.uint8, pin_memory=on_gpu)
        self.num_copies = 0

    def reserve(self, shapes: list[tuple[tuple[int, ...], np.dtype]]) -> list[Section]:
        """Lay out arrays of fixed shapes one after the other; ValueError if they exceed the capacity."""
        sections, offset = [], 0
        for shape, dtype in shapes:
            size = math.prod(shape) * dtype.itemsize
            if offset + size > self._host.numel():
                raise ValueError(f"staging buffer of {self._host.numel()} bytes is too small for {shapes}")
            sections.append(Section(self._host, self._device, self._pinned, offset, shape, dtype))
            offset += -(-size // _ALIGN) * _ALIGN
        return sections

    def copy(self, num_bytes: int) -> None:
        """Send the first `num_bytes` to the device, asynchronously; on the CPU there is nothing to send."""
        self.num_copies += 1
        if self._device is not self._host:
            slot = self.num_copies % IN_FLIGHT
            self.publish(slot, num_bytes)
            self._device[:num_bytes].copy_(self._pinned[slot, :num_bytes], non_blocking=True)

    def publish(self, slot: int, num_bytes: int) -> None:
        """Leave the first `num_bytes` in a slot, for the device to fetch."""
        self._pinned[slot, :num_bytes].copy_(self._host[:num_bytes])


class Section:
    """One array of a `Staging`: `host` is NumPy's view of it, `device` torch's. All alias the buffers.

    Making one takes longer than filling it: keep those that are needed again.
    """

    def __init__(
        self,
        host: torch.Tensor,
        device: torch.Tensor,
        slots: torch.Tensor,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
    ) -> None:
        self.offset, self.end = offset, offset + math.prod(shape) * dtype.itemsize
        self.host: np.ndarray = host[offset : self.end].numpy().view(dtype).reshape(shape)
        self.device: torch.Tensor = device[offset : self.end].view(_TORCH_DTYPES[dtype.name]).view(shape)
        self._slots = slots

    @property
    def slots(self) -> torch.Tensor:
        """The array in each of the pinned slots: [slots, …]."""
        part = self._slots[:, self.offset : self.end].view(self.device.dtype)
        return part.unflatten(1, self.device.shape)

    def end_of_rows(self, rows: int) -> int:
        """Byte offset behind the first `rows` rows: how far a copy must reach to include them."""
        return self.offset + rows * self.host.strides[0]
