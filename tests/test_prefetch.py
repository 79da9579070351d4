"""What is made ahead is the same, in the same order, one at a time, and no thread is left behind."""

import threading
import time
from collections.abc import Iterator

import pytest

from robustbench_diffaug.prefetch import ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rdiff-ahead")]


def test_items_and_their_order_are_the_same() -> None:
    assert list(ahead(range(50))) == list(range(50))
    assert list(ahead([])) == []
    assert list(ahead([None, False, 0])) == [None, False, 0]
    assert threads() == []


def test_one_item_waits_and_no_more() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for item in range(9):
            made.append(item)
            yield item

    going = ahead(items())
    for item in range(5):
        assert next(going) == item
        time.sleep(0.02)
        assert made == list(range(item + 2))
    going.close()  # type: ignore[attr-defined]
    assert len(made) == 6
    assert threads() == []


def test_an_item_is_made_while_the_one_before_is_used() -> None:
    second = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        second.set()
        yield 2

    going = ahead(items())
    assert next(going) == 1
    assert second.wait(5)
    assert list(going) == [2]


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_errors_come_where_their_item_would(error: BaseException) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise error

    going = ahead(items())
    assert next(going) == 1
    with pytest.raises(type(error)) as found:
        next(going)
    assert found.value is error
    assert threads() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_of_the_user_of_items_leaves_no_thread(error: type[BaseException]) -> None:
    def use() -> None:
        for item in ahead(range(100)):
            if item == 2:
                raise error

    with pytest.raises(error):
        use()
    assert threads() == []


def test_a_dropped_iterator_leaves_no_thread() -> None:
    going = ahead(range(100))
    next(going)
    assert len(threads()) == 1
    del going
    assert threads() == []
