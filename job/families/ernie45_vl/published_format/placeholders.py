"""What a chat template writes for an image: the published placeholder, or Transformers' own.

Servers replace the first by the second, once per token of the image.
"""

import re

PLACEHOLDERS = (
    ("<|image@placeholder|>", "<|IMAGE_PLACEHOLDER|>"),
    ("<|video@placeholder|>", "<|VIDEO_PLACEHOLDER|>"),
)
_GENERATION_MARK = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def to_native(template: str) -> str:
    """The template with Transformers' placeholders."""
    for published, native in PLACEHOLDERS:
        template = template.replace(published, native)
    return template


def to_published(template: str) -> str:
    """The template with the published placeholders, and without Transformers' own tags."""
    template = _GENERATION_MARK.sub("", template)
    for published, native in PLACEHOLDERS:
        template = template.replace(native, published)
    return template
