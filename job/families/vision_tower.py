"""Which weights of a model belong to its vision tower, by name.

The tower turns patches into features. The connector that follows it (merger, projector, resampler)
does not count, even if the model's class nests it in the tower.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONNECTOR = re.compile(r"merger|connector|projector|modality_projection|resampler")


def vision_tower_pattern(model: "PreTrainedModel") -> "re.Pattern[str] | None":
    """Matches the full names of the vision tower's modules and parameters; None without a tower."""
    tower = model.get_encoder(modality="image")  # the model itself if it has none
    path = next((name for name, module in model.named_modules() if module is tower), "")
    if not path:
        return None
    return re.compile(rf"{re.escape(path)}\.(?!.*(?:{CONNECTOR.pattern})).+")
