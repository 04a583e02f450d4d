"""The accelerators that `job plan` knows, to plan for them on any machine."""

from collections.abc import Mapping
from dataclasses import dataclass

from job.engines.device import Accelerator, Kind
from job.planning.sizes import GIB

USABLE_FRACTION = 0.98
"""The fraction of memory available to programs: drivers reserve some, more with ECC."""


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A GPU model."""

    title: str
    kind: Kind
    gigabytes: int
    """Memory as advertised; the unit is actually GiB."""

    def device(self) -> Accelerator:
        return Accelerator(
            kind=self.kind,
            name=self.title,
            memory_bytes=int(self.gigabytes * GIB * USABLE_FRACTION),
        )


ACCELERATORS: Mapping[str, GPU] = {
    "rtx-3090": GPU(title="NVIDIA GeForce RTX 3090", kind="cuda", gigabytes=24),
    "rtx-4090": GPU(title="NVIDIA GeForce RTX 4090", kind="cuda", gigabytes=24),
    "rtx-5090": GPU(title="NVIDIA GeForce RTX 5090", kind="cuda", gigabytes=32),
    "l4": GPU(title="NVIDIA L4", kind="cuda", gigabytes=24),
    "a10g": GPU(title="NVIDIA A10G", kind="cuda", gigabytes=24),
    "a100-40gb": GPU(title="NVIDIA A100 40 GB", kind="cuda", gigabytes=40),
    "a100-80gb": GPU(title="NVIDIA A100 80 GB", kind="cuda", gigabytes=80),
    "h100": GPU(title="NVIDIA H100", kind="cuda", gigabytes=80),
    "h200": GPU(title="NVIDIA H200", kind="cuda", gigabytes=141),
    "b200": GPU(title="NVIDIA B200", kind="cuda", gigabytes=180),
    "l40s": GPU(title="NVIDIA L40S", kind="cuda", gigabytes=48),
    "rx-7900-xtx": GPU(title="AMD Radeon RX 7900 XTX", kind="rocm", gigabytes=24),
    "w7900": GPU(title="AMD Radeon PRO W7900", kind="rocm", gigabytes=48),
    "mi210": GPU(title="AMD Instinct MI210", kind="rocm", gigabytes=64),
    "mi250x": GPU(title="AMD Instinct MI250X, one of two dies", kind="rocm", gigabytes=64),
    "mi300x": GPU(title="AMD Instinct MI300X", kind="rocm", gigabytes=192),
    "mi300x-dpx": GPU(
        title="AMD Instinct MI300X, one of two partitions", kind="rocm", gigabytes=96
    ),
    "mi300x-cpx": GPU(
        title="AMD Instinct MI300X, one of eight partitions", kind="rocm", gigabytes=24
    ),
    "mi325x": GPU(title="AMD Instinct MI325X", kind="rocm", gigabytes=256),
    "mi325x-dpx": GPU(
        title="AMD Instinct MI325X, one of two partitions", kind="rocm", gigabytes=128
    ),
    "mi325x-cpx": GPU(
        title="AMD Instinct MI325X, one of eight partitions", kind="rocm", gigabytes=32
    ),
    "mi355x": GPU(title="AMD Instinct MI355X", kind="rocm", gigabytes=288),
    "mi355x-dpx": GPU(
        title="AMD Instinct MI355X, one of two partitions", kind="rocm", gigabytes=144
    ),
    "mi355x-cpx": GPU(
        title="AMD Instinct MI355X, one of eight partitions", kind="rocm", gigabytes=36
    ),
}
