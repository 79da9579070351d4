"""What a check of a run folder came to."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import pyarrow as pa

__all__ = ["Check", "State", "guarded", "judged", "lines"]

SHOWN = 20  # details of a check that are shown

State: TypeAlias = Literal["ok", "FAILED", "not checked"]


class Check(NamedTuple):
    """One check.

    Arguments:
        name: Of what was looked at.
        state: 'ok', 'FAILED', or 'not checked' where what it needs is not at hand.
        said: What was found, in one line.
        details: What is wrong, or was not looked at, a line each: file, row, what.
    """

    name: str
    state: State
    said: str
    details: tuple[str, ...] = ()


def judged(name: str, said: str, wrong: Sequence[str], unseen: Sequence[str] = (), seen: int = 1) -> Check:
    """A check that failed where anything is wrong, and was not made where nothing was seen.

    Arguments:
        name: Of what was looked at.
        said: What holds if nothing is wrong.
        wrong: What is wrong.
        unseen: What could not be looked at, and why.
        seen: How much was looked at.
    """
    if wrong:
        count = "1 thing is" if len(wrong) == 1 else f"{len(wrong)} things are"
        return Check(name, "FAILED", f"{count} wrong", (*wrong, *unseen))
    if unseen and not seen:
        return Check(name, "not checked", unseen[0], tuple(unseen[1:]))
    return Check(name, "ok", said, tuple(unseen))


def guarded(name: str, make: Callable[[], Check]) -> Check:
    """A check, or that it failed where a damaged file made it stop."""
    try:
        return make()
    except (ValueError, OSError, ArithmeticError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        text = " ".join(str(error).split()) or "no message"
        said = text if type(error) is ValueError else f"damaged: {type(error).__name__}: {text}"
        return Check(name, "FAILED", said)


def lines(check: Check) -> Iterator[str]:
    """A check as lines of text, its details indented; what a terminal would obey is spelled out."""
    shown = (check.said, *check.details[:SHOWN])
    said, *details = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in text) for text in shown)
    yield f"{check.state:<11}  {check.name:<12}  {said}"
    for detail in details:
        yield f"{'':<11}  {'':<12}  {detail}"
    if len(check.details) > SHOWN:
        yield f"{'':<11}  {'':<12}  and {len(check.details) - SHOWN} more"
