"""What every session is: one method on one model, to be taken off again."""

from __future__ import annotations

import contextlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from torch import nn

from foveate.errors import AttachError
from foveate.pruners.core.method import Pruner

_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = weakref.WeakKeyDictionary()
Self = TypeVar("Self", bound="Attachment")


def attached_to(root: nn.Module) -> Attachment | None:
    """The session that acts on ``root``, if any."""
    return _ATTACHED.get(root, lambda: None)()


@contextlib.contextmanager
def undone_on_failure(remove: Callable[[], None]) -> Iterator[None]:
    """A block that puts things on a model: if it fails half-way, ``remove()`` takes off what is there already."""
    try:
        yield
    except BaseException:
        remove()
        raise


class Replaced:
    """A method of one object, replaced by another until :meth:`remove`."""

    def __init__(self, owner: object, name: str, method: Callable[..., Any]) -> None:
        self._owner, self._name, self._own = owner, name, vars(owner).get(name)
        self._removed = False
        setattr(owner, name, method)

    def remove(self) -> None:
        """Give the object back what it had under that name. Calling it again does nothing."""
        if not self._removed and vars(self._owner).pop(self._name, None) is not None and self._own is not None:
            setattr(self._owner, self._name, self._own)
        self._removed = True


class Attachment(ABC):
    """An attached pruner.

    Attributes:
        model, pruner: what was attached to what.
    """

    def __init__(self, model: nn.Module, pruner: Pruner, root: nn.Module) -> None:
        """``root``: the module that only one pruner may act on at a time.

        Raises:
            AttachError: one acts on it already.
        """
        self.model, self.pruner, self._root = model, pruner, root
        attached = attached_to(root)
        if attached is not None:
            raise AttachError(
                f"{type(model).__name__} already has {attached.pruner.name!r} attached; call detach() on that session first, "
                "or combine methods with foveate.Then"
            )

    def _claim(self) -> None:
        """Act on the model from now on."""
        _ATTACHED[self._root] = weakref.ref(self)

    def _release(self) -> None:
        """Act on it no longer."""
        if self.attached:
            del _ATTACHED[self._root]

    @abstractmethod
    def detach(self) -> None:
        """Take the pruner off; the model is what it was. Calling it again does nothing."""

    @property
    def attached(self) -> bool:
        """Whether the pruner still acts on the model."""
        return attached_to(self._root) is self

    def __enter__(self: Self) -> Self:
        if not self.attached:
            raise AttachError("this session was detached; call foveate.attach again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached to" if self.attached else "detached from"
        return f"<foveate.{type(self).__name__} {self.pruner} {state} {type(self.model).__name__}>"
