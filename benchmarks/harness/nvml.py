"""The device's own meters through NVML, the library that comes with NVIDIA's driver: energy, memory in use, driver.

Called with ctypes, so that nothing has to be installed. Where the library or a counter is missing the answer is None,
and `why` holds one sentence about it. Readings are of the whole device: nothing else may run on it meanwhile.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any


class _Memory(ctypes.Structure):
    """nvmlMemory_t; bytes."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Nvml:
    """Meters of the first GPU that CUDA_VISIBLE_DEVICES names."""

    def __init__(self, library: Any = None) -> None:
        self.why = ""
        self._device = ctypes.c_void_p()
        try:
            self._lib = library if library is not None else ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            self._lib, self.why = None, f"no energy and no memory of processes: NVML cannot be loaded ({error})"
            return
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
        if wanted.isdigit():
            failed = self._lib.nvmlInit_v2() or self._lib.nvmlDeviceGetHandleByIndex_v2(
                ctypes.c_uint(int(wanted)), ctypes.byref(self._device)
            )
        else:
            failed = self._lib.nvmlInit_v2() or self._lib.nvmlDeviceGetHandleByUUID(
                wanted.encode(), ctypes.byref(self._device)
            )
        if failed:
            self._lib, self.why = None, f"no energy and no memory of processes: NVML finds no GPU {wanted} ({failed})"

    def energy_joules(self) -> float | None:
        """Energy since the driver was loaded; None where the device does not count it."""
        value = ctypes.c_ulonglong()
        if self._lib is None or self._lib.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(value)):
            self.why = self.why or "no energy per token: this GPU has no energy counter"
            return None
        return value.value / 1e3

    def memory(self) -> tuple[int, int] | None:
        """(bytes in use by all processes, bytes in total)."""
        value = _Memory()
        if self._lib is None or self._lib.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(value)):
            self.why = self.why or "no memory of processes: NVML does not tell the memory in use"
            return None
        return value.used, value.total

    def driver(self) -> str:
        """The driver's version, or ""."""
        text = ctypes.create_string_buffer(96)
        failed = self._lib is None or self._lib.nvmlSystemGetDriverVersion(text, ctypes.c_uint(96))
        return "" if failed else text.value.decode()

    def name(self) -> str:
        """The GPU's name, as PyTorch gives it, or ""."""
        text = ctypes.create_string_buffer(96)
        failed = self._lib is None or self._lib.nvmlDeviceGetName(self._device, text, ctypes.c_uint(96))
        return "" if failed else text.value.decode()
