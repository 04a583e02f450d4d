"""What is known of the published checkpoints without reading them: their architecture.

All ERNIE-4.5-VL-28B-A3B checkpoints are the defaults of Transformers' own configuration
(29.4 billion parameters), so that a plan or a manifest of one needs no hub.
"""

import re
from typing import Any

from job.families.ernie45_vl.published_format.config import NATIVE_MODEL_TYPE

_PUBLISHED = re.compile(r"hf://(baidu|unsloth)/ERNIE-4\.5-VL-28B-A3B(-Base)?-PT(@[^/]+)?/?")


def config(uri: str) -> dict[str, Any] | None:
    """The configuration of a checkpoint of the published 28B-A3B architecture; None of others."""
    return {"model_type": NATIVE_MODEL_TYPE} if _PUBLISHED.fullmatch(uri) else None
