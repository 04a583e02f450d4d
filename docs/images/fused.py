"""The diagram of layers and their adapters as one matrix."""

from docs.images.canvas import INK, RED, Canvas

LAYERS = (("q", 84), ("k", 40), ("v", 40))
"""Layers that share an input, and the height of their weights in the picture."""
RANK, INPUT, HEIGHT = 24, 144, 164


def fused(on: Canvas) -> str:
    on.text(20, 36, "forward: the upper part", size=15, fill=INK, bold=True)
    _activation(on, 20, 76, (("x", 66),))
    on.text(98, 66, "x · Aᵀ", anchor="middle", size=13)
    on.text(122, 164, "×", size=18, anchor="middle")
    _matrix(on, 134, 76)
    on.text(314, 66, "B", anchor="middle", size=13)
    on.frame(130, 72, INPUT + 3 * RANK + 8, HEIGHT + 4, RED)
    on.text(374, 164, "ᵀ =", size=16, anchor="middle")
    _outputs(on, 394, 76, "")
    y = on.note(
        352,
        "Two products instead of nine: the adapter’s output is never written or read separately, "
        "and the input is read once for the thin product.",
    )
    top = y + 70
    on.text(20, y + 24, "backward: the left part", size=15, fill=INK, bold=True)
    _outputs(on, 20, top, "∂")
    on.rect(86, top, RANK, HEIGHT, "orange")
    on.text(98, top - 10, "∂ · B", anchor="middle", size=13)
    on.text(122, top + 88, "×", size=18, anchor="middle")
    _matrix(on, 134, top)
    on.text(314, top - 10, "B", anchor="middle", size=13)
    on.frame(130, top - 4, INPUT + 8, HEIGHT + 3 * RANK + 8, RED)
    on.text(374, top + 88, "=", size=18, anchor="middle")
    on.rect(394, top, 66, HEIGHT, "green")
    on.text(427, top + 88, "∂x", size=15, anchor="middle", fill=INK, bold=True)
    end = on.note(
        top + HEIGHT + 3 * RANK + 36,
        "Stored once: a layer’s own weights are a view of the matrix. Trained weights stay in "
        "fp32, and are copied into it before each forward pass.",
    )
    return on.svg(
        end,
        "Layers and their adapters as one matrix",
        "Forward, the input and its product with A, times the upper part, give the output of three "
        "layers; backward, their gradients and the product with B, times the left part, give the "
        "input's gradient.",
    )


def _activation(on: Canvas, x: float, y: float, parts: tuple[tuple[str, float], ...]) -> None:
    """An activation (T, features), and beside it its thin product."""
    for name, width in parts:
        on.rect(x, y, width, HEIGHT, "green")
        on.text(x + width / 2, y + 88, name, size=15, anchor="middle", fill=INK, bold=True)
        x += width
    on.rect(x, y, RANK, HEIGHT, "orange")


def _outputs(on: Canvas, x: float, y: float, prefix: str) -> None:
    """The outputs of the layers, or their gradients, side by side."""
    for (name, _), width in zip(LAYERS, (26, 20, 20), strict=True):
        on.rect(x, y, width, HEIGHT, "green")
        on.text(
            x + width / 2,
            y + 88,
            prefix + name,
            size=13,
            anchor="middle",
            fill=INK,
            bold=True,
        )
        x += width


def _matrix(on: Canvas, x: float, y: float) -> None:
    """The weights W of the layers, their B to the right, their A below."""
    for number, (name, height) in enumerate(LAYERS):
        on.rect(x, y, INPUT, height, "blue")
        on.text(x + INPUT / 2, y + height / 2 + 5, f"W: {name}_proj", anchor="middle")
        for column in range(3):
            kind = "orange" if column == number else "white"
            on.rect(x + INPUT + RANK * column, y, RANK, height, kind)
        y += height
    for name, _ in LAYERS:
        on.rect(x, y, INPUT, RANK, "orange")
        on.text(x + INPUT / 2, y + 17, f"A: {name}_proj", anchor="middle", size=13)
        y += RANK
    on.rect(x + INPUT, y - 3 * RANK, 3 * RANK, 3 * RANK, "white")
