"""What is known of the published checkpoints without reading them: their architecture.

All ERNIE-4.5-VL-28B-A3B checkpoints are the defaults of Transformers' own configuration
(29.4 billion parameters), so that a plan or a manifest of one needs no hub.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from job.families.ernie45_vl.original.config import MODEL_TYPE, to_nested

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PUBLISHED = re.compile(r"hf://(baidu|unsloth)/ERNIE-4\.5-VL-28B-A3B(-Base)?-PT(@[^/]+)?/?")


def is_published(uri: str) -> bool:
    """Whether the URI names a checkpoint of the published 28B-A3B architecture."""
    return bool(_PUBLISHED.fullmatch(uri))


def skeleton(config: Mapping[str, Any] | None) -> "PreTrainedModel":
    """The architecture on the meta device, of a configuration in either layout.

    Without a configuration it is the published one.
    """
    import torch
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    if config and config["model_type"] == MODEL_TYPE:
        config = to_nested(dict(config))
    with torch.device("meta"):
        return Ernie4_5_VLMoeForConditionalGeneration(Ernie4_5_VLMoeConfig(**(config or {})))
