"""The configurations of the published checkpoints, known without a download.

All ERNIE-4.5-VL-28B-A3B checkpoints (29.4 billion parameters) have the default configuration of
Transformers' classes, so planning and manifests need no access to the hub.
"""

import re
from typing import Any

from job.families.ernie45_vl.published_format.config import NATIVE_MODEL_TYPE

_PUBLISHED = re.compile(r"hf://(baidu|unsloth)/ERNIE-4\.5-VL-28B-A3B(-Base)?-PT(@[^/]+)?/?")


def config(uri: str) -> dict[str, Any] | None:
    """The configuration of a published 28B-A3B checkpoint; None for other URIs."""
    return {"model_type": NATIVE_MODEL_TYPE} if _PUBLISHED.fullmatch(uri) else None
