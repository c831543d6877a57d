"""Errors that a user can act on."""


class UserError(ValueError):
    """Bad input from outside: one sentence that says what is wrong, where, and what would be right.

    The command line prints the sentence without a traceback and exits with code 2; Python callers catch it as a
    ``ValueError``.
    """
