"""The label proof: one row as text with its supervised tokens marked, for people to check."""

import re
from pathlib import Path
from typing import Any

from job import log
from job.families.base import Family
from job.families.encoded import IGNORED, Encoded
from job.redaction import as_json, redact
from job.train.dataset import EncodedDataset

LABEL_PROOF = "label_proof.json"
_REPEATED = re.compile(r"(<\|[^|]+\|>)\1+")
MOST_CHARACTERS, MOST_PIECES = 200, 8
"""Of a row in the log: of each piece, and pieces. The file has all."""


def write_label_proof(dataset: EncodedDataset, family: Family, directory: Path) -> None:
    """Writes the proof of the first row, and logs it; of a long row both ends."""
    proof = label_proof(dataset.row(0), family)
    (directory / LABEL_PROOF).write_text(as_json(proof, indent=2) + "\n", encoding="utf-8")
    log.info("trained tokens are marked ⟦⟧", row=proof["row"], text=_both_ends(proof["pieces"]))


def label_proof(encoded: Encoded, family: Family) -> dict[str, Any]:
    tokenizer = family.processor.tokenizer
    pieces: list[dict[str, Any]] = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        trained = label != IGNORED
        if pieces and pieces[-1]["trained"] == trained:
            pieces[-1]["tokens"].append(token)
        else:
            pieces.append({"trained": trained, "tokens": [token]})
    for piece in pieces:
        text = tokenizer.decode(piece["tokens"], skip_special_tokens=False)
        if redact(text) != text:
            piece["tokens"] = []  # token ids would reveal the secret
        # An image is hundreds of identical tokens: shown once, with their number.
        piece["text"] = _REPEATED.sub(lambda m: f"{m[1]}×{len(m[0]) // len(m[1])}", text)
    return {
        "row": encoded.id,
        "tokens": len(encoded.input_ids),
        "trained_tokens": encoded.supervised_tokens,
        "pieces": pieces,
        "marked": "".join(_marked(piece, piece["text"]) for piece in pieces),
    }


def _marked(piece: dict[str, Any], text: str) -> str:
    return f"⟦{text}⟧" if piece["trained"] else text


def _both_ends(pieces: list[dict[str, Any]]) -> str:
    half = MOST_CHARACTERS // 2
    shown = []
    for piece in pieces:
        text = redact(piece["text"])  # before it is cut: half a secret is not recognized
        if len(text) > MOST_CHARACTERS:
            text = f"{text[:half]} … {text[-half:]}"
        shown.append(_marked(piece, text))
    if len(shown) > MOST_PIECES:
        shown[MOST_PIECES // 2 : -MOST_PIECES // 2] = [" … "]
    return "".join(shown)
