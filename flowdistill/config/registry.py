"""The methods, found by name: the one place through which a configuration reaches what its ``method.name`` selects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, TypeVar

from flowdistill.utils.errors import UserError
from flowdistill.utils.registry import Registry

METHODS: Registry[Any] = Registry("method", package="flowdistill.methods", group="flowdistill.methods")
"""Name -> class, a ``flowdistill.training.method.Method``; a file in ``flowdistill/methods/`` registers its own."""

C = TypeVar("C", bound=type)


def register_method(cls: C) -> C:
    """Class decorator: make a method known under its ``name``, and under the ``former_names`` that it may have had.

    Raises:
        ValueError: another method has that name.
    """
    return METHODS.register(cls.name, *getattr(cls, "former_names", ()))(cls)  # type: ignore[attr-defined]


def usable_methods() -> Iterator[tuple[str, Any]]:
    """Name and class of every method, without those of other packages that cannot be imported or have no dataclass of
    settings: where all methods are gone through, one that is broken is no reason to stop."""
    for name in METHODS:
        try:
            method = METHODS.get(name)
        except UserError:
            continue
        if is_dataclass(getattr(method, "Config", None)):
            yield name, method
