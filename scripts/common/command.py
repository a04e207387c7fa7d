"""The command that measured something, as a record shows it."""

import shlex
from collections.abc import Sequence


def as_command(script: str, arguments: Sequence[str]) -> str:
    """Without ``--out``, which names a folder of the machine that ran it."""
    kept, skipped = [], False
    for argument in arguments:
        if skipped or argument == "--out":
            skipped = not skipped
        elif not argument.startswith("--out="):
            kept.append(argument)
    return shlex.join(["python", script, *kept])
