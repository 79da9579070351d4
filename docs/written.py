"""What the pages of docs that are made from runs are written with."""


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def interval(value: float, low: float, high: float, scale: float = 100, digits: int = 1) -> str:
    """A value with its interval, in percent by default."""
    shown = [f"{number * scale:.{digits}f}" for number in (value, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"
