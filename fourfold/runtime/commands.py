"""What the parts' command lines share: sub-commands, short names of options, errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence


def run_command(
    program: str,
    usage: str,
    commands: Mapping[str, Callable[[list[str]], None]],
    args: Sequence[str] | None,
    troubles: tuple[type[Exception], ...] = (),
) -> None:
    """Runs a sub-command; errors that a user can mend end the process with one line.

    With `FOURFOLD_TRACEBACK` in the environment they are raised as they are.

    Args:
      program: its name.
      usage: what is printed without a command, or for --help.
      commands: what to do with the words after the name of each.
      args: the words; None for those of the process.
      troubles: errors that a user can mend, beside values, files, packages and memory.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(usage)
        return
    if words[0] not in commands:
        sys.exit(f"{program}: unknown command {words[0]!r}; allowed: {', '.join(commands)}")
    try:
        commands[words[0]](words[1:])
    except (ValueError, OSError, ImportError, MemoryError, *troubles) as error:
        if os.environ.get("FOURFOLD_TRACEBACK"):
            raise
        sys.exit(f"{program} {words[0]}: {error}")


def in_full(words: Sequence[str], short: Mapping[str, str]) -> list[str]:
    """Returns words with the full names of options, which may have their value after `=`.

    >>> in_full(["--data=mnist", "--out", "--data"], {"--data": "--data.name"})
    ['--data.name=mnist', '--out', '--data.name']
    """
    parts = (word.partition("=") for word in words)
    return [short.get(name, name) + equals + value for name, equals, value in parts]
