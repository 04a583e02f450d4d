"""References to images, as `--image` and `--vllm-image` take them."""

import re

from job.errors import UsageError

_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?P<host>[a-z0-9][a-z0-9.-]*(?::\d+)?)(?:/{_PART})+"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?P<digest>@sha256:[0-9a-f]{64})?",
    re.ASCII,
)


def checked(option: str, reference: str) -> str:
    """The reference, which names a registry and a digest, or a tag other than `latest`.

    Raises UsageError if it does not: nodes keep what they have pulled for a tag, and would run
    different images.
    """
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise UsageError(
            option,
            "must be an image with its registry",
            value=reference,
            fix="registry.example.com/finetune-job@sha256:… (64 hexadecimal digits)",
        )
    if not found["digest"] and found["tag"] in (None, "latest"):
        raise UsageError(
            option,
            "must name a digest, or a tag other than latest",
            value=reference,
            fix="append @sha256:…, as `docker push` prints it",
        )
    return reference
