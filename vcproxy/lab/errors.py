"""What can go wrong in the lab: two errors, told apart by who can cure them.

`LabUnavailable` is about the machine (not root, no `ip`, a kernel without VXLAN): nothing in the caller's code is
wrong, and `vcproxy demo` prints it as it is. `LabError` is about what the caller asked for, or about a command that
failed in the middle of building.
"""

from __future__ import annotations


class LabError(Exception):
    """The lab could not build or do what it was asked for; the message names the object and the command that failed."""


class LabUnavailable(LabError):
    """This machine cannot hold a lab; the message says what is missing and how to get it."""
