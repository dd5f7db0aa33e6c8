"""Families of names: what a value of one of many equal blocks is called in each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from passes.shorten import BEFORE

MIDDLE = (-1, 0, 1)
"""The blocks that are laid side by side, counted from the last one before those left out."""
Rename = Callable[[str], str]


class UnlikeError(Exception):
    """Blocks are not the same but for names."""


class Families:
    """Names of a short stage, and what they are in the whole one.

    index: name -> its block, counted from the last one before those left out; after, before: name -> its twin in the
    next block and in the one before. alone: names of no block that are others in the whole stage -> those.
    """

    def __init__(self, left_out: int) -> None:
        self.left_out = left_out
        self.index: dict[str, int] = {}
        self.after: dict[str, str] = {}
        self.before: dict[str, str] = {}
        self.alone: dict[str, str] = {}
        self._given: dict[str, Sequence[str]] = {}
        self._same: set[str] = set()

    def give(self, whole: Sequence[str], short: Sequence[str]) -> None:
        """A family: its names in all blocks of the whole stage, and in those of the short one."""
        if len(set(short)) < len(short):
            raise UnlikeError
        for place, name in enumerate(short):
            self._given[name] = whole
            self._place(name, place - BEFORE + 1)
        self._chain(short)

    def given(self, name: str) -> Sequence[str] | None:
        """All names of a family in the whole stage, where they are known by one."""
        return self._given.get(name)

    def link(self, names: Sequence[str]) -> None:
        """Three names that stand at one place in the middle blocks. Errors: UnlikeError."""
        if len(set(names)) == 1:
            self._same.add(names[0])
        elif len(set(names)) < len(names):
            raise UnlikeError
        else:
            bases = {self.index[name] - at for at, name in zip(MIDDLE, names, strict=True) if name in self.index}
            base = bases.pop() if bases else 0
            for at, name in zip(MIDDLE, names, strict=True):
                self._place(name, base + at)
            self._chain(names)
        if any(name in self._same and name in self.index for name in names):
            raise UnlikeError

    def _place(self, name: str, block: int) -> None:
        if self.index.setdefault(name, block) != block:
            raise UnlikeError

    def _chain(self, names: Sequence[str]) -> None:
        for a, b in zip(names, names[1:], strict=False):
            if self.after.setdefault(a, b) != b or self.before.setdefault(b, a) != a:
                raise UnlikeError

    def copy(self) -> Families:
        """One that learns apart."""
        made = Families(self.left_out)
        made.index, made.after, made.before = dict(self.index), dict(self.after), dict(self.before)
        made.alone, made._given, made._same = self.alone, self._given, set(self._same)
        return made

    def learn(self, other: Families, names: Iterable[str]) -> None:
        """What another one, that began as a copy of this, knows of some names. Errors: UnlikeError."""
        for name in names:
            if name in other.index:
                self._place(name, other.index[name])
                if name in other.after:
                    self._place(other.after[name], other.index[name] + 1)
                    self._chain([name, other.after[name]])

    def row(self, name: str) -> tuple[str | None, str, str | None]:
        """A name between its twins before and after."""
        return self.before.get(name), name, self.after.get(name)

    def renamed(self, by: int) -> Rename:
        """Names of blocks as they are so many blocks further on in the whole stage."""
        known = dict(self.alone)

        def rename(name: str) -> str:
            if name not in known:
                known[name] = self._of_block(name, self.index[name] + by) if name in self.index else name
            return known[name]

        return rename

    def beside(self) -> Rename:
        """Names as they are in the whole stage where they stand by themselves: each in its own block."""
        rename = self.renamed(0)
        behind = self.renamed(self.left_out)
        return lambda name: behind(name) if self.index.get(name, 0) > 0 else rename(name)

    def _of_block(self, name: str, block: int) -> str:
        """What a name is in a block of the whole stage."""
        if name in self._given:
            return self._given[name][block + BEFORE - 1]
        if 0 < block <= self.left_out:
            return f"{self._moved(name, 0)}~{block}"
        return self._moved(name, block if block <= 0 else block - self.left_out)

    def _moved(self, name: str, block: int) -> str:
        """A name's twin in another block of the short stage."""
        distance = block - self.index[name]
        twins = self.after if distance > 0 else self.before
        for _ in range(abs(distance)):
            if name not in twins:
                raise UnlikeError
            name = twins[name]
        return name
