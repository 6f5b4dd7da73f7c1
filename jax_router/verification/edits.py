"""Edits of the kernel sources, applied to a copy: the shipped sources carry no switches for tests or tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class EditError(RuntimeError):
    """An edit no longer applies to the sources."""


@dataclass(frozen=True)
class Edit:
    """Replaces `old`, which `file` of csrc has `count` times, by `new`."""

    file: str
    old: str
    new: str
    count: int = 1


def copy_edited(csrc: Path, to: Path, edits: Sequence[Edit]) -> None:
    """Copy the files of the folder `csrc` to the folder `to`, which is made, and edit them.

    Raises:
      EditError: an edit does not find its text, or not as often as it says; nothing is left in `to`.
    """
    texts = {path.name: path.read_text() for path in sorted(csrc.iterdir()) if path.is_file()}
    for edit in edits:
        found = texts.get(edit.file, "").count(edit.old)
        if found != edit.count:
            raise EditError(
                f"{edit.file} in {csrc} has the text below {found} times. Expected {edit.count}; bring the edit up to "
                f"date with the sources.\n{edit.old}"
            )
        texts[edit.file] = texts[edit.file].replace(edit.old, edit.new)
    to.mkdir(parents=True)
    for name, text in texts.items():
        (to / name).write_text(text)
