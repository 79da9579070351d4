"""The next item made while this one is used."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["ahead"]

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items in the same order, each made by one thread while the one before it is used.

    No more than one item waits. The thread ends with the items, and when the iterator is closed or dropped earlier:
    then the item in the making is finished and thrown away. What making an item raises is raised here, in its place.
    """
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, "rdiff-ahead") as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield item  # type: ignore[misc]  # an object that is not `end` is an item
