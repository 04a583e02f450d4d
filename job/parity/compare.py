"""Compares parity records of two devices, or of one before and after a change."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LOSS = {"float32": 1e-3, "bfloat16": 3e-2}
"""Relative difference of a step's loss, and of the evaluations' before and after, that rounding
explains: by what computed it."""
LOGITS = 1e-3
"""Relative difference of the logits in fp32, by the norm."""
SLOWER = 2.0
"""How many times slower a GPU of the same name may train, or compute a way."""

Record = Mapping[str, Any]


def differences(found: Record, committed: Record) -> Iterator[str]:
    """A line for each difference that the tolerances do not explain."""
    against = f"{committed['name']} ({committed['device']})"
    for difference in _differences(found, committed):
        yield f"{difference}; compared with {against}"


def faults(found: Record) -> Iterator[str]:
    """A line for each fault that a record has in itself."""
    for name in found["gpu_tests"].get("failed", ()):
        yield f"the test {name} failed"
    for name, run in found["runs"].items():
        for step, loss in enumerate(run["losses"], start=1):
            if loss is None or not math.isfinite(loss):
                yield f"{name}: the loss of step {step} is {_shown(loss)}"


def same_bytes(found: Record, committed: Record) -> bool:
    """Whether exported bytes must be the same: of one CPU and the same versions.

    A GPU's backward passes add in an order that changes from run to run.
    """
    same = all(found[key] == committed[key] for key in ("device", "versions"))
    return same and found["kind"] == "cpu"


def _differences(found: Record, committed: Record) -> Iterator[str]:
    for name in found["runs"].keys() & committed["runs"].keys():
        yield from _runs(name, found["runs"][name], committed["runs"][name])
        if same_bytes(found, committed):
            yield from _digests(name, found["runs"][name], committed["runs"][name])
    off = _relative(_flat(found["logits"]), _flat(committed["logits"]))
    if not off <= LOGITS:
        yield f"logits differ by {off:.1e}, more than {LOGITS:.0e}"
    if found["kind"] != "cpu" and found["device"] == committed["device"]:
        yield from _speeds(found, committed)


def _runs(name: str, one: Record, other: Record) -> Iterator[str]:
    tolerance = LOSS[name]
    if len(one["losses"]) != len(other["losses"]):
        yield f"{name}: {len(one['losses'])} steps, expected {len(other['losses'])}"
    every = [
        *(
            (f"step {n}", *pair)
            for n, pair in enumerate(zip(one["losses"], other["losses"], strict=False), 1)
        ),
        *(
            (f"the evaluation {n}", one["evaluated"][n], other["evaluated"][n])
            for n in ("baseline", "final")
        ),
    ]
    for what, loss, expected in every:
        off = _relative([loss], [expected])
        if not off <= tolerance:
            yield (
                f"{name}: the loss of {what} is {_shown(loss)}, expected {_shown(expected)}: off "
                f"by {off:.1e}, more than {tolerance:.0e}"
            )
    if one["exported"].keys() != other["exported"].keys():
        yield f"{name}: exports {sorted(one['exported'])}, expected {sorted(other['exported'])}"
    if one["proof"]["tensors"] != other["proof"]["tensors"]:
        own, expected = one["proof"]["tensors"], other["proof"]["tensors"]
        yield f"{name}: exports {own} tensors, expected {expected}"


def _digests(name: str, one: Record, other: Record) -> Iterator[str]:
    for path in one["exported"].keys() & other["exported"].keys():
        if one["exported"][path] != other["exported"][path]:
            yield f"{name}: other bytes in {path}, with the same device and versions"


def _speeds(found: Record, committed: Record) -> Iterator[str]:
    """Of the same GPU."""
    for name in found["runs"].keys() & committed["runs"].keys():
        own, expected = (each["runs"][name]["tokens_per_second"] for each in (found, committed))
        if own * SLOWER < expected:
            yield f"{name}: trains {own:,.0f} tokens a second, expected {expected:,.0f}"
    ways = {way["way"]: way for way in found["ways"]}
    for before in committed["ways"]:
        way = ways.get(before["way"])
        if way is None or not before["taken"]:
            continue
        if not way["taken"]:
            yield f"{way['way']} was left ({way['reason']}), and taken before"
        elif way["milliseconds"] > SLOWER * before["milliseconds"]:
            yield (
                f"{way['way']} took {way['milliseconds']:.2f} ms, expected "
                f"{before['milliseconds']:.2f} ms"
            )


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.6g}"


def _relative(one: Sequence[float | None], other: Sequence[float | None]) -> float:
    """The difference by the norm; infinite if a value is missing or not finite."""
    own, expected = ([each for each in values if each is not None] for values in (one, other))
    if not len(one) == len(own) == len(other) == len(expected):
        return math.inf
    off = math.dist(own, expected) / (math.hypot(*expected) or 1.0)
    return off if math.isfinite(off) else math.inf


def _flat(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    return [value for row in rows for value in row]
