"""Python objects named in settings, the same way everywhere: ``package.module:attribute``."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import Any

from flowdistill.utils.errors import UserError, shown

PREFIX = "python:"
"""May stand before a name, and tells it from other kinds of names where these have colons too."""
MOVED = {"flowdistill.data.shapes_networks": "flowdistill.features.shapes_networks",
         "flowdistill.data.digits_classifier": "flowdistill.features.digits_classifier"}
"""Modules that configurations of an older version name."""


def is_object(name: str) -> bool:
    """Whether a setting names a Python object."""
    module, colon, attribute = name.removeprefix(PREFIX).partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_object(name: str, setting: str) -> Any:
    """The object that ``name`` names; its module may lie in the current folder.

    Args:
        name: ``package.module:attribute``.
        setting: the option that has this value, for errors.

    Raises:
        UserError: another form, a module that cannot be imported, or no such attribute in it.
    """
    module, _, attribute = name.removeprefix(PREFIX).partition(":")
    if not is_object(name):
        raise UserError(f"'{setting}' is {shown(name)}; an object is named as package.module:attribute")
    if module in MOVED:
        warnings.warn(f"'{setting}' names {module}, which is called {MOVED[module]} now", stacklevel=2)
        module = MOVED[module]
    try:
        # Python looks there by itself for "python -m flowdistill" and not for the command "flowdistill". The folder
        # comes last, so that no file in it hides an installed module, and stays, for what the module imports later.
        if not {"", os.getcwd()} & set(sys.path):
            sys.path.append(os.getcwd())
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a module of a user's does when it is imported
        raise UserError(f"'{setting}' names {name}, which cannot be imported: {error}") from error
