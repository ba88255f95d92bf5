"""Built aside, synced, renamed: what is saved is there whole, or the old content still is.

    write temp -> fsync(temp) -> rename(temp, path) -> fsync(directory)

A rename is atomic for other processes.  For a power cut the order needs the syncs: without
the first, the new name may arrive before the bytes; without the second, the name may be lost.
"""

import ctypes
import errno
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..engine.errors import CheckpointError

Content = bytes | Iterable[Any]  # or the C-contiguous buffers that make it up, in order


class Disk:
    """The calls by which everything is written; a test puts a failing one in their place."""

    def open(self, path: Path) -> io.FileIO:
        return open(path, "xb", buffering=0)  # a new file; its mode follows the umask

    def write(self, file: io.FileIO, chunk: memoryview) -> int:
        return file.write(chunk)  # how many bytes went out: may be fewer than given

    def fsync(self, file: io.FileIO) -> None:
        os.fsync(file.fileno())

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def exchange(self, a: Path, b: Path) -> None:
        """Swap two names in one step.  OSError(ENOSYS) where the system has no such call."""
        libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        swap = getattr(libc, "renameat2", None)
        if swap is None:
            raise OSError(errno.ENOSYS, "no renameat2")
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <linux/fs.h>
        if swap(here, os.fsencode(a), here, os.fsencode(b), exchange):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def fsync_dir(self, path: Path) -> None:
        if os.name == "nt":  # where a directory cannot be opened
            return
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)


disk = Disk()

_count = itertools.count()
_in_progress: set[Path] = set()


def replace_file(path: str | os.PathLike, content: Content) -> None:
    """The file at `path` holds `content` (bytes, or an iterable of buffers), or is as before.

    At every moment, kill and power cut included, `path` is the old file or the whole new one.
    A map of the old file stays valid.  A symbolic link at `path` is replaced, not followed.

    Errors: `CheckpointError` naming `path`, with the old content in place and nothing left
    beside it; if only the last sync failed, the new file stands and the message says so.
    What `content` itself raises (other than OSError) passes through; the old content stays.
    Leftovers `.name.tmp-*` of killed processes are cleared; writers of one directory must
    therefore see one another's process numbers (one machine, one container).
    """
    _replace(Path(os.path.abspath(path)), lambda temp: _write(temp, content), disk.rename)


def replace_directory(path: str | os.PathLike, files: Mapping[str, Content]) -> None:
    """The directory `path` holds exactly `files`, name by name, or is as before.

    For files that mean something only together, such as an adapter and its config.
    At every moment `path` is one of: absent (if it was), the old directory, the new one.
    - No kill and no power cut leaves a mixture.
    - A reader that opens two files one after the other may meet one of each when a swap
      falls between.  It can tell by a digest of one file kept in the other, or open the
      directory first and the files relative to it (`dir_fd`): those are of one save.  An inode
      number tells nothing: the next save may get it again.  What is opened or mapped stays valid.
    - Of two writers the last one wins, whole.
    - Without renameat2 (not Linux, some network file systems) two renames take the place of
      the swap: a kill between them leaves `path` absent and the old directory beside it as
      `.name.old-*`, and the next save puts it back first.

    Errors: as `replace_file`; and `CheckpointError` for a name that is not a plain file name,
    or when `path` is no directory, is a link, or holds other files, which would be lost.
    """
    path = Path(os.path.abspath(path))
    for name in files:
        if not name or name in (".", "..") or set(name) & set("/\\\0"):
            raise CheckpointError(f"{path}: expected plain file names, found {name!r}")
    expect_former_save(path, files)

    def build(temp: Path) -> None:
        disk.mkdir(temp)
        for name, content in files.items():
            _write(temp / name, content)
        disk.fsync_dir(temp)

    _replace(path, build, _swap)


def _replace(
    path: Path, build: Callable[[Path], None], put: Callable[[Path, Path], Path | None]
) -> None:
    """`build` a new thing aside, `put` it in place, sync; then remove what `put` displaced."""
    temp = _beside(path, "tmp")
    try:
        _clear_leftovers(path)  # before `temp` counts as ours: a dead process may have left it
        _in_progress.add(temp)
        build(temp)
        displaced = put(temp, path)
    except OSError as error:
        _remove(temp)
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path}: not saved ({reason}); what was there stays") from error
    except BaseException:
        _remove(temp)
        raise
    finally:
        _in_progress.discard(temp)
    try:
        disk.fsync_dir(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"{path}: saved, but may not survive a power cut ({reason})"
        ) from error
    if displaced is not None:  # the old one is kept until the new one is certain to stay
        _remove(displaced)


def _write(path: Path, content: Content) -> None:
    """A new file with `content`, synced."""
    with disk.open(path) as file:
        for chunk in (content,) if isinstance(content, bytes) else content:
            rest = memoryview(chunk)
            rest = rest.cast("B") if rest.nbytes else memoryview(b"")
            while rest:
                written = disk.write(file, rest)
                if not written:
                    raise OSError(errno.EIO, "nothing written")
                rest = rest[written:]
        disk.fsync(file)


def _swap(temp: Path, path: Path) -> Path | None:
    """The directory `temp` becomes `path`; returns where the one that was `path` is now."""
    try:
        disk.rename(temp, path)
        return None
    except OSError:
        if not path.is_dir():  # refused for another reason than an older save in its place
            raise
    try:
        disk.exchange(temp, path)
        return temp
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise
    old = _beside(path, "old")
    disk.rename(path, old)
    try:
        disk.rename(temp, path)
    except BaseException:
        disk.rename(old, path)
        raise
    return old


def expect_former_save(path: Path, files: Iterable[str]) -> None:
    """Errors: `CheckpointError` if replacing `path` would lose anything but `files`."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path}: expected a directory or nothing, found a file or a link")
    others = sorted(set(os.listdir(path)) - set(files))
    if others:
        raise CheckpointError(
            f"{path}: expected only {', '.join(files)}; found {', '.join(others[:3])}, which "
            "would be lost; save to a directory of its own"
        )


def _beside(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.{kind}-{os.getpid()}-{next(_count)}"


def _clear_leftovers(path: Path) -> None:
    """Remove what killed saves of `path` left; put an old directory back if it has no other."""
    form = re.compile(rf"\.{re.escape(path.name)}\.(tmp|old)-(\d{{1,9}})-\d+")
    matches = [form.fullmatch(name) for name in os.listdir(path.parent)]
    stale = [m for m in matches if m and not _being_written(path.parent / m[0], int(m[2]))]
    if stale:  # one may be the old half of a swap, needed until the swap is known to last
        disk.fsync_dir(path.parent)
    for match in stale:
        leftover = path.parent / match[0]
        if match[1] == "old" and not os.path.lexists(path):
            disk.rename(leftover, path)
        _remove(leftover)


def clear_stale(directory: Path, form: re.Pattern) -> None:
    """Remove what killed saves of files named as `form` left in a directory.

    A save clears leftovers of its own name only; for names that are never written again.
    """
    for name in os.listdir(directory):
        match = re.fullmatch(r"\.(.+)\.tmp-(\d{1,9})-\d+", name)
        stale = match and form.fullmatch(match[1])
        if stale and not _being_written(directory / name, int(match[2])):
            _remove(directory / name)


def _being_written(temp: Path, pid: int) -> bool:
    if pid == os.getpid():  # perhaps only the same number: process 1 of a restarted container
        return temp in _in_progress
    if os.name == "nt":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(temp: Path) -> None:
    """Remove a file or a flat directory if it is there; what resists waits for the next save."""
    with suppress(OSError):
        if temp.is_dir():
            for name in os.listdir(temp):
                disk.unlink(temp / name)
            disk.rmdir(temp)
        else:
            disk.unlink(temp)
