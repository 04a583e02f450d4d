"""The platforms that a job can run on, and how their pods differ."""

from dataclasses import dataclass
from typing import Any

from job.errors import UsageError
from job.kubernetes import constants
from job.planning.sizes import GIB

VLLM = "0.32.0"
"""The vLLM release that serves; the tag of every vLLM image."""


AMD_GPU, NVIDIA_GPU = GPU_RESOURCES = ("amd.com/gpu", "nvidia.com/gpu")
COMPILED = 8 * GIB
"""What Triton, Inductor and the other compilers leave below HOME."""
AITER_BYTES = 12 * GIB
"""AITER cannot write to its package in a read-only image and copies its prebuilt kernels, for two
architectures, below HOME. Never set AITER_JIT_DIR: it then compiles them all again."""


@dataclass(frozen=True, kw_only=True)
class Platform:
    name: str
    accelerator: str
    """As in `runtime.accelerator` and `make image ACCELERATOR=`."""
    resource: str | None
    """The device plugin's resource, by default also the key of the taint on its nodes."""
    taints: tuple[str, ...]
    """Keys of the taints on its nodes."""
    groups: tuple[int, ...]
    """Supplemental groups that may open the device."""
    cpus: int
    vllm_image: str
    server_cache: int
    """Disk in bytes for what vLLM compiles and copies when it starts."""

    @property
    def gpus(self) -> int:
        """One device per pod."""
        return 0 if self.resource is None else 1

    @property
    def device_limits(self) -> dict[str, str]:
        return {self.resource: str(self.gpus)} if self.resource else {}

    @property
    def tolerations(self) -> list[dict[str, Any]]:
        """Of the taints on GPU nodes. Without a GPU, of all of them: there may be no other node."""
        if self.resource is None:
            return tolerations(*GPU_RESOURCES)
        return tolerations(*dict.fromkeys((*self.taints, self.resource)))


PLATFORMS = {
    platform.name: platform
    for platform in (
        Platform(
            name="amd",
            accelerator="rocm",
            resource=AMD_GPU,
            taints=(AMD_GPU,),
            groups=(constants.VIDEO_GROUP, *constants.RENDER_GROUPS),
            cpus=8,
            vllm_image=f"docker.io/vllm/vllm-openai-rocm:v{VLLM}",
            server_cache=AITER_BYTES + COMPILED,
        ),
        Platform(
            name="nvidia",
            accelerator="cuda",
            resource=NVIDIA_GPU,
            taints=(NVIDIA_GPU,),
            groups=(),
            cpus=8,
            vllm_image=f"docker.io/vllm/vllm-openai:v{VLLM}",
            server_cache=COMPILED,
        ),
        Platform(
            name="cpu",
            accelerator="cpu",
            resource=None,
            taints=(),
            groups=(),
            cpus=2,
            vllm_image=f"docker.io/vllm/vllm-openai-cpu:v{VLLM}",
            server_cache=COMPILED,
        ),
    )
}


def platform(name: str) -> Platform:
    """The platform with this name. Raises UsageError if there is none."""
    if name not in PLATFORMS:
        raise UsageError("--platform", f"must be one of {', '.join(PLATFORMS)}", value=name)
    return PLATFORMS[name]


def tolerations(*keys: str) -> list[dict[str, Any]]:
    """Tolerations of the taints that keep pods without a GPU off its nodes."""
    return [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in keys]
