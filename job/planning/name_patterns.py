"""Abbreviates names that differ only in a number."""

import re
from collections.abc import Sequence


def patterns(names: Sequence[str]) -> list[str]:
    """Merges names that differ in one number: `layers.0-3.self_attn.q_proj`."""
    groups: dict[str, list[int]] = {}
    for name in names:
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
        groups.setdefault(pattern, []).extend(map(int, numbers[:1]))
    return [pattern.replace("{}", _ranges(numbers), 1) for pattern, numbers in groups.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
