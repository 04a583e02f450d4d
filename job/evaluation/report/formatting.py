"""Formats numbers for the page."""


def amount(value: float, unit: str = "") -> str:
    """A value for a table: `6.28`, `0.412`, `0.002`, `12.5 %`."""
    if unit == "%":
        return f"{100 * value:.{1 if value else 0}f}\u202f%"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"
