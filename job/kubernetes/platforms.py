"""The platforms that a job can run on, and how their pods differ."""

from dataclasses import dataclass
from typing import Any

from job.errors import UsageError
from job.kubernetes import constants

VLLM = "0.32.0"
"""The vLLM release that serves; the tag of every vLLM image."""


@dataclass(frozen=True, kw_only=True)
class Platform:
    name: str
    accelerator: str
    """As in `runtime.accelerator` and `make image ACCELERATOR=`."""
    resource: str | None
    """The device plugin's resource; also the key of the taint on its nodes."""
    groups: tuple[int, ...]
    """Supplemental groups that may open the device."""
    cpus: int
    vllm_image: str

    @property
    def gpus(self) -> int:
        """One device per pod."""
        return 0 if self.resource is None else 1

    @property
    def device_limits(self) -> dict[str, str]:
        return {self.resource: str(self.gpus)} if self.resource else {}

    @property
    def tolerations(self) -> list[dict[str, Any]]:
        if self.resource is None:
            return []
        return [{"key": self.resource, "operator": "Exists", "effect": "NoSchedule"}]


PLATFORMS = {
    platform.name: platform
    for platform in (
        Platform(
            name="amd",
            accelerator="rocm",
            resource="amd.com/gpu",
            groups=(constants.VIDEO_GROUP, *constants.RENDER_GROUPS),
            cpus=8,
            vllm_image=f"docker.io/vllm/vllm-openai-rocm:v{VLLM}",
        ),
        Platform(
            name="nvidia",
            accelerator="cuda",
            resource="nvidia.com/gpu",
            groups=(),
            cpus=8,
            vllm_image=f"docker.io/vllm/vllm-openai:v{VLLM}",
        ),
        Platform(
            name="cpu",
            accelerator="cpu",
            resource=None,
            groups=(),
            cpus=2,
            vllm_image=f"docker.io/vllm/vllm-openai-cpu:v{VLLM}",
        ),
    )
}


def platform(name: str) -> Platform:
    """The platform with this name. Raises UsageError if there is none."""
    if name not in PLATFORMS:
        raise UsageError("--platform", f"must be one of {', '.join(PLATFORMS)}", value=name)
    return PLATFORMS[name]
