"""Energy and use of the GPUs of a task, measured by NVML (package nvidia-ml-py).

Imported in jobs only. Without the package, the driver or a GPU nothing is measured. NVML counts whole GPUs,
not processes, and it makes no CUDA context.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from hpc_imagenet.cluster import gpus


class GpuMeter:
    """Measure GPUs from now on: `sample` at intervals, then read `totals`.

    Energy is that of the driver's counter (Volta and later). Without a counter, or if it jumps back because
    the driver was loaded again, power is integrated over the samples.
    """

    def __init__(self, nvml: Any, names: Sequence[str], now: float) -> None:
        """Begin to measure.

        Args:
            nvml: the module pynvml, initialised.
            names: GPUs as CUDA_VISIBLE_DEVICES names them.
            now: s of any clock that `sample` gets as well.
        """
        self._nvml = nvml
        self._gpus = [gpu for name in names if (gpu := _open(nvml, name, now))]

    def sample(self, now: float) -> None:
        """Measure power and use, which hold since the last sample."""
        for gpu in self._gpus:
            gpu.sample(now)

    def totals(self) -> dict[str, dict[str, float]]:
        """Return what was measured of each GPU, by its UUID.

        Returns:
            seconds, and where the GPU reports them joules and use (0 to 1, mean).
        """
        return {gpu.uuid: gpu.totals() for gpu in self._gpus}


class _Gpu:
    def __init__(self, nvml: Any, handle: Any, now: float) -> None:
        self._nvml, self._handle = nvml, handle
        uuid = nvml.nvmlDeviceGetUUID(handle)
        self.uuid = uuid.decode() if isinstance(uuid, bytes) else str(uuid)
        self._began = self._last = now
        self._counter = self._read(nvml.nvmlDeviceGetTotalEnergyConsumption)
        self._power = self._read(nvml.nvmlDeviceGetPowerUsage)
        self._joules = 0.0
        self._has_energy = self._counter is not None or self._power is not None
        self._busy = self._observed = 0.0

    def sample(self, now: float) -> None:
        seconds, self._last = now - self._last, now
        counter = self._read(self._nvml.nvmlDeviceGetTotalEnergyConsumption)  # mJ
        power = self._read(self._nvml.nvmlDeviceGetPowerUsage)  # mW
        if counter is not None and self._counter is not None and counter >= self._counter:
            self._joules += (counter - self._counter) / 1e3
        elif power is not None:
            before = power if self._power is None else self._power
            self._joules += seconds * (before + power) / 2e3
            self._has_energy = True
        self._counter, self._power = counter, power
        if (use := self._read(self._nvml.nvmlDeviceGetUtilizationRates)) is not None:
            self._busy += seconds * use.gpu / 100
            self._observed += seconds

    def totals(self) -> dict[str, float]:
        found = {"seconds": self._last - self._began}
        if self._has_energy:
            found["joules"] = self._joules
        if self._observed:
            found["use"] = self._busy / self._observed
        return found

    def _read(self, function: Any) -> Any:
        with contextlib.suppress(self._nvml.NVMLError):  # not supported by this GPU, or by a MIG instance
            return function(self._handle)
        return None


def _open(nvml: Any, name: str, now: float) -> _Gpu | None:
    with contextlib.suppress(nvml.NVMLError):
        handle = (
            nvml.nvmlDeviceGetHandleByIndex(int(name))
            if name.isdigit()
            else nvml.nvmlDeviceGetHandleByUUID(name)
        )
        return _Gpu(nvml, handle, now)
    return None


def open_meter(now: float, most: int | None = None) -> GpuMeter | None:
    """Return a meter of the GPUs of this job on this node; None if there are none, or no NVML.

    Args:
        now: as for `GpuMeter`.
        most: GPUs that the job uses; None: all. CUDA_VISIBLE_DEVICES names them where it is set. Without it a
            process also sees GPUs of other jobs, and CUDA takes the first ones.
    """
    names = gpus.available_gpus()
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        names = names[:most]
    if not names:
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return GpuMeter(pynvml, names, now)
