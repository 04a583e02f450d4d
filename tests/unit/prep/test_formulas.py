"""`builtin://formulas`: one label for each image, the same every time."""

import hashlib
import io
import logging
import subprocess
import sys
from collections import Counter
from itertools import combinations
from random import Random

import numpy as np
import pytest
from PIL import Image

from job.errors import SpecError
from job.evaluation import latex
from job.prep import formulas
from job.prep.formulas import grammar, render
from job.spec.types import FormulasSpec

FONTS = ("cm", "dejavusans", "dejavuserif", "stix", "stixsans")
GLYPHS = tuple(token for token in grammar.VOCABULARY if token not in {"^", "_", "{", "}", r"\frac"})
LEAST = 0.12
"""How different two glyphs have to be at equal sizes: 0 is the same image, 1 shares no ink."""


def spec(**changes: object) -> FormulasSpec:
    values: dict[str, object] = {
        "seed": 7,
        "math_fontfamily": "cm",
        "font_size": 14.0,
        "dpi": 110,
        "width": 336,
        "height": 56,
        "max_tokens": 40,
        "noise": 0.0,
        "rotation": 0.0,
    }
    return FormulasSpec(**{**values, **changes})  # type: ignore[arg-type]


def seeded(seed: int) -> Random:
    return Random(seed)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


# The grammar


def test_labels_split_into_the_tokens_they_were_made_of() -> None:
    rng = seeded(0)
    for _ in range(2_000):
        tokens = grammar.generate(rng, 60)
        assert latex.tokenize(grammar.to_latex(tokens)) == tokens


def test_labels_are_their_own_normal_form() -> None:
    rng = seeded(1)
    for _ in range(2_000):
        label = grammar.to_latex(grammar.generate(rng, 60))
        assert latex.normalize(label) == label


def test_every_token_is_in_the_vocabulary_and_is_used() -> None:
    rng = seeded(2)
    seen = Counter(token for _ in range(4_000) for token in grammar.generate(rng, 40))
    assert set(seen) == set(grammar.VOCABULARY)
    assert len(set(grammar.VOCABULARY)) == len(grammar.VOCABULARY)
    assert min(seen.values()) > 50


def test_lengths_are_exact_and_evenly_spread() -> None:
    rng = seeded(3)
    for length in range(1, 70):
        assert len(grammar.formula(rng, length)) == length
    counts = Counter(len(grammar.generate(rng, 40)) for _ in range(38 * 200))
    assert set(counts) == set(range(3, 41))
    assert max(counts.values()) < 1.35 * 200
    assert min(counts.values()) > 0.65 * 200


def test_a_limit_below_three_tokens_is_kept() -> None:
    assert len(grammar.generate(seeded(0), 1)) == 1
    assert formulas.sample(spec(max_tokens=1), 0).latex in grammar.VOCABULARY


def test_no_letters_spell_a_function() -> None:
    rng = seeded(4)
    for _ in range(2_000):
        bare = latex.join(" " if len(t) > 1 else t for t in grammar.generate(rng, 60))
        assert not any(name[1:] in bare for name in grammar.FUNCTIONS + grammar.LIMITS)


def test_labels_seldom_repeat() -> None:
    rng = seeded(5)
    labels = [grammar.to_latex(grammar.generate(rng, 40)) for _ in range(10_000)]
    assert len(set(labels)) > 0.99 * len(labels)


# The images


@pytest.mark.parametrize("font", FONTS)
def test_every_token_is_drawn_in_every_font(font: str) -> None:
    for token in GLYPHS:
        shown = r"\sqrt{x}" if token == r"\sqrt" else token
        assert formulas.render_latex(shown, font) is not None, token
    for shown in (r"\frac{a}{b}", "x_{a}^{b}"):
        assert formulas.render_latex(shown, font) is not None


@pytest.mark.parametrize("font", FONTS)
def test_no_two_glyphs_look_alike_in_any_font(font: str) -> None:
    drawn = {token: _at_one_size(token, font) for token in GLYPHS if token != r"\sqrt"}
    for one, other in combinations(drawn, 2):
        assert _difference(drawn[one], drawn[other]) > LEAST, (one, other)


@pytest.mark.parametrize("pair", ["lI", "Ss", "Zz", (r"\rho", "p"), (r"\Lambda", r"\Delta")])
def test_what_is_left_out_looks_like_something_else(pair: tuple[str, str]) -> None:
    one, other = (_at_one_size(token, "dejavusans") for token in pair)
    assert _difference(one, other) < LEAST


@pytest.mark.parametrize("size", [14.0, 14.0 * 0.7, 14.0 * 0.49])
@pytest.mark.parametrize("font", FONTS)
def test_glyphs_stay_apart_at_the_size_of_scripts(font: str, size: float) -> None:
    drawn = {token: _ink(token, font, size) for token in GLYPHS if token != r"\sqrt"}
    for one, other in combinations(drawn, 2):
        a, b = drawn[one], drawn[other]
        if max(abs(a.shape[0] - b.shape[0]), abs(a.shape[1] - b.shape[1])) <= 2:
            assert _difference(*_on_one_canvas(a, b)) > 0.11, (one, other)


@pytest.mark.parametrize("font", FONTS)
def test_no_image_has_two_labels(font: str) -> None:
    rng = seeded(6)
    labels = {grammar.to_latex(grammar.generate(rng, 7)) for _ in range(400)}
    labels |= {f"x{script}{{{atom}}}" for script in "^_" for atom in (*"abcABD", r"\alpha")}
    seen: dict[bytes, str] = {}
    for label in sorted(labels):
        image = formulas.render_latex(label, font)
        assert image is not None, label
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        assert seen.setdefault(digest, label) == label


@pytest.mark.parametrize("font", FONTS)
def test_an_image_is_the_whole_formula_at_its_own_size(font: str) -> None:
    for index in range(15):
        row = formulas.sample(spec(math_fontfamily=font), index)
        image = pixels(row.png)
        assert image.shape == (56, 336, 3)
        assert (image[..., 0] == image[..., 1]).all()
        assert (image[..., 0] == image[..., 2]).all()
        assert (image[:, : render.LEFT] == 255).all()
        assert (image[:, -render.RIGHT :] == 255).all()
        natural = formulas.render_latex(row.latex, font)
        assert natural is not None
        top = (56 - natural.height) // 2
        inner = np.asarray(natural)
        assert (image[top : top + natural.height, : natural.width] == inner).all()
        assert (image < 255).sum() == (inner < 255).sum()


def test_noise_and_rotation_change_the_image_but_not_the_label() -> None:
    plain = formulas.sample(spec(), 3)
    noisy = formulas.sample(spec(noise=0.1), 3)
    turned = formulas.sample(spec(rotation=3.0), 3)
    assert plain.latex == noisy.latex == turned.latex
    assert len({plain.png, noisy.png, turned.png}) == 3
    # Half the noise is cut off at white, so what is left spreads by 0.58 of its deviation.
    background = pixels(noisy.png)[pixels(plain.png) == 255].astype(float)
    assert background.std() == pytest.approx(0.58 * 0.1 * 255, rel=0.1)
    assert (pixels(turned.png)[:, : render.LEFT] > 240).all()


def test_a_canvas_for_no_formula_is_refused() -> None:
    with pytest.raises(SpecError, match="no formula fits"):
        formulas.sample(spec(width=28, font_size=96.0), 0)


def test_long_limits_fill_what_the_canvas_holds() -> None:
    lengths = [
        len(latex.tokenize(formulas.sample(spec(max_tokens=300), i).latex)) for i in range(12)
    ]
    assert max(lengths) > 25
    assert len(set(lengths)) > 6


# The same every time


def test_bytes_are_the_same_in_any_process_and_any_order() -> None:
    noisy = spec(noise=0.05, rotation=2.0, math_fontfamily="stix")
    program = (
        "import hashlib\nfrom job.prep import formulas\nfrom job.spec.types import FormulasSpec\n"
        f"spec = {noisy!r}\n"
        "formulas.render_latex(r'\\sin^')\n"
        "for i in (9, 2, 5): print(i, hashlib.sha256(formulas.sample(spec, i).png).hexdigest())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stderr == ""
    elsewhere = dict(line.split() for line in run.stdout.splitlines())
    here = {str(i): hashlib.sha256(formulas.sample(noisy, i).png).hexdigest() for i in (2, 5, 7, 9)}
    assert elsewhere == {i: here[i] for i in ("9", "2", "5")}


def test_parallel_samples_are_those_drawn_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    small = spec(max_tokens=6, noise=0.02)
    alone = list(formulas.samples(small, 150, workers=1))
    monkeypatch.setattr(render, "_MIN_PARALLEL", 1)
    monkeypatch.setattr(render, "_CHUNK", 16)
    assert list(formulas.samples(small, 150, workers=2)) == alone


def test_a_consumer_may_stop_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_MIN_PARALLEL", 1)
    monkeypatch.setattr(render, "_CHUNK", 4)
    rows = formulas.samples(spec(max_tokens=4), 10_000, workers=2)
    assert next(rows).latex
    rows.close()  # type: ignore[attr-defined]


def test_seeds_draw_different_formulas() -> None:
    ours = {formulas.sample(spec(seed=1, max_tokens=20), i).latex for i in range(40)}
    theirs = {formulas.sample(spec(seed=2, max_tokens=20), i).latex for i in range(40)}
    assert len(ours & theirs) <= 2


def test_matplotlibs_settings_and_loggers_stay_as_they_were() -> None:
    import matplotlib

    before, level = dict(matplotlib.rcParams), logging.getLogger("matplotlib").level
    formulas.sample(spec(), 0)
    formulas.render_latex(r"\frac{a}")
    assert dict(matplotlib.rcParams) == before
    assert logging.getLogger("matplotlib").level == level


# Any LaTeX, as a report meets it


@pytest.mark.parametrize(
    "text",
    [
        *(r"\frac{a}", r"\nosuchcommand", "x^", "{" * 300 + "x", "", " ", r"\,", "a$b", r"\sqrt["),
        *(r"\begin{array}{c}x\end{array}", "x" * 5_000, "\x00"),
    ],
)
def test_what_mathtext_cannot_render_has_no_image(text: str) -> None:
    assert formulas.render_latex(text) is None


def test_a_failed_formula_leaves_no_trace_in_the_next_image() -> None:
    before = formulas.render_latex("xy+a_{i}")
    assert formulas.render_latex(r"\sin^") is None
    after = formulas.render_latex("xy+a_{i}")
    assert before is not None
    assert after is not None
    assert before.tobytes() == after.tobytes()


def _ink(token: str, font: str, size: float) -> np.ndarray:
    ink = render._ink(token, font, size, 110)
    assert ink is not None, token
    return (255.0 - ink) / 255


def _at_one_size(token: str, font: str, side: int = 32) -> np.ndarray:
    ink = Image.fromarray((_ink(token, font, 28) * 255).astype(np.uint8))
    scale = side / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))))
    canvas = np.zeros((side + 2, side + 2))
    top, left = (side + 2 - ink.height) // 2, (side + 2 - ink.width) // 2
    canvas[top : top + ink.height, left : left + ink.width] = np.asarray(ink) / 255
    return canvas


def _on_one_canvas(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    height, width = (max(a.shape[axis], b.shape[axis]) + 2 for axis in (0, 1))
    out = np.zeros((2, height, width))
    for canvas, ink in zip(out, (a, b), strict=True):
        canvas[1 : 1 + ink.shape[0], 1 : 1 + ink.shape[1]] = ink
    return out[0], out[1]


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """The share of the ink that only one of two images has, at the best of nine positions."""
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    apart = min(np.abs(a - np.roll(b, shift, (0, 1))).sum() for shift in shifts)
    return float(apart / (a.sum() + b.sum()))
