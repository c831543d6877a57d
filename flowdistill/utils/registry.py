"""Objects found by name: of a package of ours, registered by a program, or of an installed package."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from flowdistill.utils.errors import UserError, listed, shown

T = TypeVar("T")


class Registry(Generic[T]):
    """Named objects of one kind, imported only when they are asked for.

    A name is looked for in this order: what is registered already; the module of that name in ``package``; the entry
    point of that name; every module of ``package``. So a file in the package is all that a new object needs, and a file
    that is deleted is missed by nobody who does not ask for it.

    Args:
        kind: what one of them is called, for messages.
        package: dotted name of the package whose modules register what they define when they are imported.
        group: entry-point group in which other distributions name theirs, as ``name = "package.module:object"``.
    """

    def __init__(self, kind: str, package: str, group: str) -> None:
        self.kind, self.package, self.group = kind, package, group
        self._objects: dict[str, T] = {}
        self._former: dict[str, str] = {}
        self._complete = False

    def register(self, name: str, *former: str) -> Callable[[T], T]:
        """A decorator that registers an object under ``name``; under a ``former`` name it is found with a warning.

        Raises:
            ValueError: another object has that name; the same class of a module that was loaded again may replace it.
        """

        def add(thing: T) -> T:
            before = self._objects.get(name)
            if before is not None and _place(before) != _place(thing):
                raise ValueError(f"there is a {self.kind} named {name!r} already: {_place(before)}")
            self._objects[name] = thing
            self._former |= dict.fromkeys(former, name)
            return thing

        return add

    def unregister(self, name: str) -> None:
        """Forget what was registered under ``name``; nothing happens where there is none."""
        self._objects.pop(name, None)

    def current_name(self, name: str) -> str:
        """The present name of what ``name`` is or was called; ``name`` itself where nothing has ever been called so."""
        if name not in self._objects and name not in self._former:
            with contextlib.suppress(UserError):
                self.get(name)
        return self._former.get(name, name)

    def get(self, name: str) -> T:
        """The object of a name.

        Raises:
            UserError: there is none, or the package that should provide it cannot be imported.
        """
        for search in (self._import_module, self._load_entry_point, self._import_all):
            if name in self._objects or name in self._former:
                break
            search(name)
        if name in self._former and name not in self._objects:
            warnings.warn(f"the {self.kind} {name!r} is called '{self._former[name]}' now", stacklevel=2)
            name = self._former[name]
        if name not in self._objects:
            known = self.names()
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise UserError(f"there is no {self.kind} {shown(name)}{hint}; there are {listed(known)}")
        return self._objects[name]

    def names(self) -> list[str]:
        """All names, sorted; imports every module of the package, but no entry point."""
        self._import_all("")
        return sorted({*self._objects, *self._entry_points()})

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._objects or name in self.names())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _import_module(self, name: str) -> None:
        if name.isidentifier() and importlib.util.find_spec(f"{self.package}.{name}") is not None:
            importlib.import_module(f"{self.package}.{name}")

    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {point.name: point for point in importlib.metadata.entry_points(group=self.group)}

    def _load_entry_point(self, name: str) -> None:
        point = self._entry_points().get(name)
        if point is None:
            return
        try:
            thing = point.load()
        except Exception as error:  # whatever another package does when it is imported
            raise UserError(f"the {self.kind} {name!r} is provided by {point.value}, which cannot be imported: "
                            f"{error!r}") from error
        self._objects.setdefault(name, thing)

    def _import_all(self, name: str) -> None:
        if self._complete:
            return
        self._complete = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")


def _place(thing: object) -> str:
    kind = thing if isinstance(thing, type) else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"
