"""The files that a run keeps in its folder: names, saving, removing old ones, search.

    files = RunFiles("rvq_ckpts", run_name(9, "base512"))
    files.save(checkpoint, best_epoch=10, archive_epoch=10)
    checkpoint, path, complaints = load_latest(files)

A checkpoint that can be resumed is overwritten or removed only after a newer one is on disk.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli.disk import (
    TEMPORARY_SUFFIX,
    free_space,
    remove,
    replace,
    restore_replaced,
    sync_folder,
    write_beside,
)
from run_folder.checkpoint import CheckpointError, dump, load_checkpoint, size_of

RING_SIZE = 4  # step checkpoints kept for rollbacks
QUARANTINE_SIZE = 3  # unsound states kept for diagnosis


def run_name(num_codebooks: int, tag: str = "") -> str:
    """Return the prefix of all files of a run, as `rvq_9cb` or `rvq_9cb_base512`."""
    return f"rvq_{num_codebooks}cb" + (f"_{tag}" if tag else "")


class RunFiles:
    """The files of one run in its folder.

    Each save replaces `latest`, and the old one becomes `previous`. `best`, the dated archives and
    the ring (the newest step checkpoints, for rollbacks) are hard links to the same bytes, or
    copies on a file system without hard links.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str) -> None:
        self.folder, self.name = Path(folder), name
        self.latest = self.folder / f"{name}_latest.pt"
        self.previous = self.folder / f"{name}_previous.pt"
        self.best = self.folder / f"{name}_best.pt"
        self.metrics = self.folder / f"{name}_metrics.jsonl"
        self.report = self.folder / f"{name}_report.html"
        self.has_links = True  # False after hard links failed on this file system
        self.good: tuple[int, ...] = ()  # `_identity` of the last `latest` known to be whole
        self.new: tuple[int, ...] = ()  # `_identity` of the last file renamed to `latest`

    def ring_file(self, step: int) -> Path:
        """Return the path of the step checkpoint of `step`."""
        return self.folder / f"{self.name}_ring_s{step:08d}.pt"

    def ring_steps(self) -> list[int]:
        """Return the steps of the existing step checkpoints, oldest first."""
        return [step for step, _ in self._numbered("ring")]

    def prune_ring(self, newest: int) -> None:
        """Keep the RING_SIZE newest step checkpoints up to step `newest`; remove the others.

        Those after `newest` come from steps that a rollback or a resume has undone.
        """
        ring = self._numbered("ring")
        kept = [path for step, path in ring if step <= newest][-RING_SIZE:]
        for _, path in ring:
            if path not in kept:
                remove(path)

    def remove_ring(self) -> None:
        """Remove all step checkpoints, after a run has finished."""
        for _, path in self._numbered("ring"):
            remove(path)

    def quarantine(self, checkpoint: dict[str, Any], step: int, reason: str) -> Path:
        """Save an unsound state, with the reason in it, to a file that no resume reads.

        Only the newest QUARANTINE_SIZE such files stay. Returns the path.

        Raises:
            OSError: as `save_checkpoint`.
        """
        path = self.folder / f"{self.name}_quarantine_s{step:08d}.pt"
        save_checkpoint({**checkpoint, "quarantine": reason}, path)
        others = [p for _, p in self._numbered("quarantine") if p != path]
        for old in sorted(others, key=os.path.getmtime)[: len(others) - QUARANTINE_SIZE + 1]:
            remove(old)
        return path

    def _numbered(self, kinds: str) -> list[tuple[int, Path]]:
        """Return (epoch or step, path) of the files of a kind, or of `a|b`, oldest first."""
        pattern = re.compile(rf"{re.escape(self.name)}_(?:{kinds})_[es](\d+)(?:__([\d-]+))?\.pt")
        found = [(m, p) for p in self.folder.iterdir() if (m := pattern.fullmatch(p.name))]
        return [(n, p) for n, _, p in sorted((int(m[1]), m[2] or "", p) for m, p in found)]

    def save(
        self,
        checkpoint: dict[str, Any],
        *,
        best_epoch: int | None = None,
        archive_epoch: int | None = None,
        ring_step: int | None = None,
        keep_archived: int = 20,
        tell: Callable[[str], None] = print,
    ) -> Path:
        """Save as `latest`, and under a further name for each argument that is not None.

        `best_epoch` adds `best` and its archive, `archive_epoch` an archive, `ring_step` a step
        checkpoint. These come before `latest`: after a crash in between, the resumed run reaches
        them again, whereas a `latest` that records a best value or a step checkpoint without a file
        would never get it. If the disk is full, the oldest archives are removed first, and `tell`
        gets a line that names them. Afterwards `keep_archived` archives of each kind stay.

        Raises:
            OSError: as `save_checkpoint`, or there is no space; `latest` is intact.
        """
        names = []
        if best_epoch is not None:
            names += [self.best, self.unused_path(f"best_e{best_epoch:04d}_", ".pt")]
        if archive_epoch is not None:
            names.append(self.unused_path(f"epoch_e{archive_epoch:04d}_", ".pt"))
        if ring_step is not None:
            names.append(self.ring_file(ring_step))
        copies = 0 if self.has_links else len(names) + self.latest.exists()
        self.make_room(size_of(checkpoint) * (1 + copies), tell)
        temporary = write_beside(self.latest, functools.partial(dump, checkpoint))
        try:
            for name in names:
                self._link(temporary, name)
            if self.latest.exists():
                self._link(self.latest, self.previous)
            replace(temporary, self.latest)
            self.new = _identity(self.latest)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to report
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(self.folder)
        self.good = self.new
        for kind in ("epoch", "best"):
            for old in self.archives(kind)[:-keep_archived]:
                remove(old)
        if ring_step is not None:
            self.prune_ring(newest=ring_step)
        return self.latest

    def latest_in_words(self) -> str:
        """Describe the state of `latest` after a save that failed."""
        try:
            found = _identity(self.latest)
        except FileNotFoundError:
            return f"{self.latest} is not there"
        except OSError as error:
            return f"{self.latest} cannot be read ({error.strerror})"
        if found == self.good:
            return f"{self.latest} is still the last good one"
        if found == self.new:
            return f"{self.latest} is the new one, which a power cut may still destroy"
        return f"{self.latest} was not written by this run"

    def _link(self, source: Path, target: Path) -> None:
        self.has_links = _replace_with_link(source, target) and self.has_links

    def make_room(self, needed: int, tell: Callable[[str], None] = print) -> None:
        """Remove as few of the oldest archives as it takes to have `needed` bytes free.

        An archive stays while any other file, such as `latest` or a user's link, is a hard link to
        the same bytes, since its removal would free nothing. If all archives together would free
        too little, none is removed.

        Raises:
            OSError: ENOSPC with the figures; nothing was removed.
        """
        free = free_space(self.folder)
        if free is None or free >= needed:
            return
        doomed, freed = self._oldest_archives(needed - free)
        if free + freed < needed:
            raise OSError(
                errno.ENOSPC,
                f"No space left on device: {megabytes(needed)} needed, {megabytes(free)} free "
                f"and {megabytes(freed)} in archives that could be removed; free some space, or "
                "give --save_dir on another disk",
                str(self.folder),
            )
        for path in doomed:
            remove(path)
        tell(
            f"{self.folder}: {megabytes(free)} free, {megabytes(needed)} needed; removed "
            f"{len(doomed)} old archives ({megabytes(freed)}): {', '.join(p.name for p in doomed)}"
        )

    def _oldest_archives(self, wanted: int) -> tuple[list[Path], int]:
        """Return the oldest archives whose removal frees `wanted` bytes, and the bytes they free.

        If that takes more than there are, all that free anything are returned.
        """
        links: dict[int, list[Path]] = {}  # inode -> archives, oldest first
        for _, path in self._numbered("epoch|best"):
            links.setdefault(path.stat().st_ino, []).append(path)
        doomed: list[Path] = []
        freed = 0
        for paths in links.values():
            status = paths[0].stat()
            if freed < wanted and status.st_nlink == len(paths):
                doomed += paths
                freed += status.st_blocks * 512
        return doomed, freed

    def unused_path(self, what: str, suffix: str = "") -> Path:
        """Return a dated path that no file has: a second may see two, and clocks are set back."""
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        path = self.folder / f"{self.name}_{what}_{stamp}{suffix}"
        again = 1
        while os.path.lexists(path):
            again += 1
            path = path.with_name(f"{self.name}_{what}_{stamp}-{again}{suffix}")
        return path

    def archives(self, kind: str) -> list[Path]:
        """Return the archives of a kind ("epoch" or "best"), oldest epoch first."""
        return [path for _, path in self._numbered(kind)]

    def others(self) -> list[Path]:
        """Return the checkpoints to resume if `latest` and `previous` are unusable, best first.

        They are step checkpoints, then archives, newest first, then `best`, which may not exist.
        """
        kinds = ("ring", "epoch", "best")
        return [*(p for kind in kinds for _, p in reversed(self._numbered(kind))), self.best]

    def all_files(self) -> list[Path]:
        """Return every existing file of the run."""
        named = [self.latest, self.previous, self.best, self.metrics, self.report]
        shared = self.folder / f"{self.name}_best.safetensors"
        named += [shared, shared.with_suffix(".md")]
        named += [self.folder / f"{self.name}_{end}" for end in ("tb", "wandb")]
        numbered = [path for _, path in self._numbered("epoch|best|ring|quarantine|panic")]
        return [path for path in named if os.path.lexists(path)] + numbered

    def remove_leftovers(self) -> None:
        """Remove partly written files of a killed save; call with the folder's lock held."""
        restore_replaced(self.folder, f"{self.name}_")
        for path in self.folder.glob(f".{self.name}_*{TEMPORARY_SUFFIX}"):
            remove(path)

    def set_aside(self) -> Path | None:
        """Move an earlier run's files into a dated folder, so that a new run overwrites nothing.

        Returns that folder, or None if there were no files.
        """
        old = self.all_files()
        if not old:
            return None
        aside = self.unused_path("before")
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)
        sync_folder(aside)
        sync_folder(self.folder)
        return aside


def megabytes(count: float) -> str:
    """Format a number of bytes in decimal units, as `512.0 MB` or `2.1 GB`."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def _identity(path: Path) -> tuple[int, ...]:
    """Return device, inode, size and modification time, which change when a file is replaced."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically: after a crash `path` has the old content or the new one.

    Raises:
        OSError: the disk is full, read-only or failing; `path` is unchanged.
    """
    replace(write_beside(path, functools.partial(dump, checkpoint)), path)
    sync_folder(path.parent)


def _replace_with_link(source: Path, target: Path) -> bool:
    """Replace `target` atomically by a hard link to `source`, or by a copy; False for a copy."""
    temporary = target.with_name(f".{target.name}{TEMPORARY_SUFFIX}")
    remove(temporary)
    linked = True
    try:
        os.link(source, temporary)
    except OSError:
        linked = False
        with open(source, "rb") as whole:
            write_beside(target, functools.partial(shutil.copyfileobj, whole))
    replace(temporary, target)
    remove(temporary)  # rename does nothing if both names are already links to one file
    return linked


def find_run(folder: str | os.PathLike[str], tag: str, codebooks: int | None) -> RunFiles | None:
    """Find the run in a folder that a command with this --tag resumes; None if there is none.

    A tag matches only the run with this tag. Without a tag the untagged run is resumed, or if there
    is none, the only tagged one. `codebooks` None matches any number of codebooks.

    Raises:
        CheckpointError: several runs match.
    """
    count = codebooks if codebooks is not None else r"\d+"
    runs = {
        m[1]: m[2] or ""
        for p in Path(folder).glob("rvq_*.pt")
        if (m := re.fullmatch(rf"(rvq_{count}cb(?:_(.+))?)_(?:latest|previous)\.pt", p.name))
    }
    matching = [n for n, t in runs.items() if t == tag] or ([] if tag else list(runs))
    if len(matching) > 1:
        raise CheckpointError(
            f"{folder}: several runs could be resumed ({', '.join(sorted(matching))}); "
            "name one with --tag or --resume, or start anew with --no-resume"
        )
    return RunFiles(folder, matching[0]) if matching else None


def load_latest(
    files: RunFiles, *, keep_damaged: bool = False
) -> tuple[dict[str, Any], Path, list[str]]:
    """Load `latest`, or `previous` if `latest` is damaged or missing.

    Returns the checkpoint, its path and the errors of `latest`. A damaged `latest` is renamed, so
    that the next save does not make it `previous`; with `keep_damaged` it stays as it is.

    Raises:
        CheckpointError: neither can be loaded; the message lists what else could be resumed.
        OSError, MemoryError: a file cannot be read now, and may be good. No error changes a file.
    """
    complaints: list[str] = []
    for path in (files.latest, files.previous):
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            complaints.append(str(error))
            continue
        if path == files.latest:
            files.good = _identity(path)
        if path == files.previous and os.path.lexists(files.latest) and not keep_damaged:
            files.latest.rename(files.unused_path("damaged", ".pt"))
        return checkpoint, path, complaints
    offers = [f"  --resume {p}" for p in files.others() if p.exists()]
    ways = "resume as below, or start anew with" if offers else "there is no other: start anew with"
    said = (
        f"{files.folder}: neither latest nor previous of {files.name} can be loaded, nothing was "
        f"changed; {ways} --no-resume"
    )
    raise CheckpointError("\n".join((said, *(f"  {c}" for c in complaints), *offers)))
