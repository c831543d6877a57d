"""The methods, found by name: the one place through which a configuration reaches what its ``method.name`` selects."""

from __future__ import annotations

from typing import Any, TypeVar

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
