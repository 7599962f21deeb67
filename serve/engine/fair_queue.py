"""A queue between threads that is served by turns among tenants."""

from __future__ import annotations

from collections import OrderedDict, deque
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Each tenant's items in their order, one of each tenant in turn. Thread-safe; nobody waits in it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._items: OrderedDict[str, deque[T]] = OrderedDict()  # whose turn is next at the front

    def __bool__(self) -> bool:
        return bool(self._items)

    def put(self, tenant: str, item: T) -> None:
        with self._lock:
            self._items.setdefault(tenant, deque()).append(item)

    def get(self) -> T:
        """Raises KeyError where it is empty."""
        with self._lock:
            tenant, items = self._items.popitem(last=False)
            item = items.popleft()
            if items:
                self._items[tenant] = items
            return item
