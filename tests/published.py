"""A tokenizer like the published one of ERNIE-4.5-VL, small enough to train in a test."""

import io
import random
from pathlib import Path

from job.families.ernie45_vl.published_format.tokenizer import ROLES

MARKS = [*ROLES.values(), "<|begin_of_sentence|>", "<|end_of_sentence|>", "<think>", "</think>"]
WORDS = "the formula alpha frac sqrt sum of an image User Assistant Picture \\frac{a}{b} 写出 公式"


def train_sentencepiece(path: Path, kind: str) -> Path:
    """Byte-pair merges (or unigrams), bytes for the rest, digits and marks in one piece each."""
    from sentencepiece import SentencePieceTrainer

    draw = random.Random(1)
    lines = [" ".join(draw.choices(WORDS.split(), k=8)) for _ in range(400)]
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        model_type=kind,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=[*MARKS, "<mask:1>", *"0123456789"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    path.write_bytes(written.getvalue())
    return path
