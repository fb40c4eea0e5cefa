"""Errors that are meant for people: what is wrong, the rule, the remedy.

The command line turns each of these into one message on stderr and an exit code; everything else is a
defect and keeps its traceback.
"""

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REQUEUE = 75
"""Training was asked to end, stands in a checkpoint, and wants to go on."""
EXIT_DO_NOT_REQUEUE = 78
EXIT_HANG = 79
"""The watchdog ended a job that hung."""


class UserError(Exception):
    """Something a user can mend: bad input, unreadable file, impossible request. Exit code 1."""

    exit_code = EXIT_FAILED


class ConfigError(UserError):
    """A configuration or command line that cannot be run, refused before anything starts. Exit code 2."""

    exit_code = EXIT_USAGE


class DoNotRequeue(UserError):
    """A run that would fail again in the same way (bad-data or non-finite limit spent). Exit code 78."""

    exit_code = EXIT_DO_NOT_REQUEUE
