"""Saving: at every call, kill, full disk and power cut, the old content or the new, whole."""

import errno
import itertools
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from killed import killer

from minilora.engine.errors import CheckpointError
from minilora.files import atomic
from minilora.files.atomic import Disk, replace_directory, replace_file

CALLS = sorted(name for name in vars(Disk) if not name.startswith("_"))

OLD = {"config.json": b"old " * 3, "weights": b"OLD!" * 5000}
NEW = {"config.json": b"new", "weights": b"NEW" * 4000}


class Watched(Disk):
    """A disk that writes its calls down, and asks `before` what to do about each."""

    def __init__(self, before=lambda disk, name, arguments: None):
        self.log, self.done, self.before = [], [], before  # calls asked for, calls carried out


def _watched(name):
    def call(self, *arguments):
        self.log.append((name, *arguments))
        answer = self.before(self, name, arguments)
        if answer is None:
            answer = getattr(Disk, name)(self, *arguments)
        self.done.append((name, *arguments))
        return answer

    return call


for _name in CALLS:
    setattr(Watched, _name, _watched(_name))


class Killed(BaseException):
    """The process is no more; it makes no calls."""


def failing_at(k, code):
    """The k-th call fails, once; with "short" it writes one byte only, if it is a write."""

    def before(disk, name, arguments):
        if len(disk.log) - 1 == k:
            if code == "short":
                return Disk.write(disk, arguments[0], arguments[1][:1]) if name == "write" else None
            raise OSError(code, os.strerror(code))
        return None

    return before


def killed_at(k, partial):
    """The process dies at the k-th call, perhaps with half a write done."""

    def before(disk, name, arguments):
        if len(disk.log) - 1 >= k:
            if name == "write" and partial and len(disk.log) - 1 == k:
                Disk.write(disk, arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise Killed

    return before


def without_exchange(before):
    """The same on a file system that cannot swap two names."""

    def inner(disk, name, arguments):
        answer = before(disk, name, arguments)
        if name == "exchange":
            raise OSError(errno.EINVAL, "no exchange here")
        return answer

    return inner


def save_file(path, state):
    replace_file(path, state["weights"])


def load_file(path):
    return path.read_bytes() if path.exists() else None


def load_directory(path):
    return (
        {name: (path / name).read_bytes() for name in os.listdir(path)} if path.exists() else None
    )


# what is saved, how it is read back, whether something is there before, whether it can be swapped
CASES = {
    "new file": (save_file, load_file, False, True),
    "old file": (save_file, load_file, True, True),
    "new directory": (replace_directory, load_directory, False, True),
    "old directory": (replace_directory, load_directory, True, True),
    "old directory, no exchange": (replace_directory, load_directory, True, False),
}
cases = pytest.mark.parametrize("case", CASES)


class Scene:
    """A fresh directory with the old state in it, and what `path` must be before and after."""

    def __init__(self, root, case):
        self.save, self.load, there, self.swaps = CASES[case]
        root.mkdir()
        self.path = root / "saved"
        if there:
            self.save(self.path, OLD)
        self.old = self.load(self.path)
        self.new = NEW if self.save is replace_directory else NEW["weights"]

    def attempt(self, monkeypatch, before):
        """Save the new state on a disk that does what `before` says; the error, and the disk."""
        disk = Watched(before if self.swaps else without_exchange(before))
        raised = None
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "disk", disk)
            try:
                self.save(self.path, NEW)
            except (CheckpointError, Killed) as error:
                raised = error
        return raised, disk

    def leftovers(self):
        return [name for name in os.listdir(self.path.parent) if name != "saved"]


@cases
def test_a_fault_at_every_call(tmp_path, monkeypatch, case):
    for code in (errno.ENOSPC, errno.EIO, errno.EINTR, "short"):
        for k in itertools.count():
            scene = Scene(tmp_path / f"{code}-{k}", case)
            error, disk = scene.attempt(monkeypatch, failing_at(k, code))
            log = disk.log
            name = log[min(k, len(log) - 1)][0]
            if error is None:
                assert scene.load(scene.path) == scene.new
                # a swap has another way than a rename, and what resists removal waits
                assert len(log) <= k or code == "short" or name in ("rename", "unlink", "rmdir")
            else:
                assert str(scene.path) in str(error)
                assert code == "short" or os.strerror(code) in str(error)
                last = "power cut" in str(error)  # only the sync after the rename has failed
                assert last == (name == "fsync_dir" and log[k][1] == scene.path.parent)
                assert scene.load(scene.path) == (scene.new if last else scene.old)
                # the old half of a swap is kept until it is known that the swap will last
                assert last or not scene.leftovers()
            if len(log) <= k:
                break
            scene.save(scene.path, OLD)
            assert not scene.leftovers()
        assert k > 4


def breaking():
    """Content that cannot be had."""
    yield b"some"
    raise RuntimeError("no more content")


@cases
@pytest.mark.parametrize("partial", [False, True])
def test_a_kill_at_every_call(tmp_path, monkeypatch, case, partial):
    for k in itertools.count():
        scene = Scene(tmp_path / str(k), case)
        error, _ = scene.attempt(monkeypatch, killed_at(k, partial))
        if error is None:
            break
        if not scene.swaps and not scene.path.exists():  # the documented gap between two renames
            with pytest.raises(RuntimeError):  # the next save, even one that fails, closes it
                replace_directory(scene.path, {"weights": breaking()})
            assert scene.load(scene.path) == scene.old
        assert scene.load(scene.path) in (scene.old, scene.new)
        scene.save(scene.path, OLD)
        assert not scene.leftovers()
        assert scene.load(scene.path) == (
            OLD if scene.save is replace_directory else OLD["weights"]
        )
    assert k > 4


def calls(log, root):
    """The log in one line per call, temporary names by kind."""

    def name(argument):
        path = argument if isinstance(argument, Path) else Path(argument.name)
        text = str(path.relative_to(root))
        return re.sub(r"\.saved\.(tmp|old)-\d+-\d+", r"\1", text)

    return [" ".join([c, *(name(a) for a in args if not isinstance(a, memoryview))])
            for c, *args in log]  # fmt: skip


WRITTEN = "open {0}, write {0}, fsync {0}"
ASIDE = ", ".join(["mkdir tmp", *(WRITTEN.format(f"tmp/{name}") for name in NEW), "fsync_dir tmp"])
CLEARED = "unlink {0}/config.json, unlink {0}/weights, rmdir {0}"
ORDER = {
    "new file": WRITTEN.format("tmp") + ", rename tmp saved, fsync_dir .",
    "old file": WRITTEN.format("tmp") + ", rename tmp saved, fsync_dir .",
    "new directory": ASIDE + ", rename tmp saved, fsync_dir .",
    "old directory": ASIDE
    + ", rename tmp saved, exchange tmp saved, fsync_dir ., "
    + CLEARED.format("tmp"),
    "old directory, no exchange": ASIDE
    + ", rename tmp saved, exchange tmp saved, rename saved old, rename tmp saved, fsync_dir ., "
    + CLEARED.format("old"),
}


@cases
def test_the_order_of_the_calls(tmp_path, monkeypatch, case):
    scene = Scene(tmp_path / "root", case)
    error, disk = scene.attempt(monkeypatch, lambda *_: None)
    assert error is None
    found = calls(disk.log, tmp_path / "root")
    assert sorted(found) == sorted(ORDER[case].split(", "))  # a directory lists in any order
    unordered = ("unlink",)
    assert [c for c in found if not c.startswith(unordered)] == [
        c for c in ORDER[case].split(", ") if not c.startswith(unordered)
    ]


# A power cut: what was not synced may be there, in part, or not at all, in any combination.


class Model:
    """A file system of the worst kind that the rules allow, fed with a log of calls.

    A node is a list [written, synced] for a file, and a name for a directory.  `names` maps
    (directory, name) to a node.  Changes of names wait in `pending` until their directory is
    synced; each may be lost on its own.
    """

    def __init__(self, root):
        self.root, self.durable, self.pending = root, {}, []
        self.fresh = itertools.count()
        self.scan(root, "root")
        self.names = dict(self.durable)

    def scan(self, path, directory):
        for item in os.scandir(path):
            if item.is_dir():
                node = f"directory {next(self.fresh)}"
                self.scan(item.path, node)
            else:
                node = [Path(item.path).read_bytes()] * 2
            self.durable[directory, item.name] = node

    def key(self, path):
        directory = "root"
        *parents, name = Path(path).relative_to(self.root).parts
        for parent in parents:
            directory = self.names[directory, parent]
        return directory, name

    def change(self, changes):
        self.pending.append(changes)
        self.names.update(changes)

    def feed(self, call, *arguments):
        if call == "open":
            self.change({self.key(arguments[0]): [b"", b""]})
        elif call == "mkdir":
            self.change({self.key(arguments[0]): f"directory {next(self.fresh)}"})
        elif call == "write":
            self.names[self.key(arguments[0].name)][0] += bytes(arguments[1])
        elif call == "fsync":
            node = self.names[self.key(arguments[0].name)]
            node[1] = node[0]
        elif call in ("unlink", "rmdir"):
            self.change({self.key(arguments[0]): None})
        elif call in ("rename", "exchange"):
            a, b = map(self.key, arguments)
            gone = None if call == "rename" else self.names[b]
            self.change({a: gone, b: self.names[a]})
        elif call == "fsync_dir":
            relative = Path(arguments[0]) != self.root
            directory = self.names[self.key(arguments[0])] if relative else "root"
            for changes in self.pending:
                if any(key[0] == directory for key in changes):
                    self.durable.update(changes)
            self.pending = [c for c in self.pending if not any(k[0] == directory for k in c)]

    def states(self, name):
        """All that may be found under `name` after a power cut at this moment."""
        for kept in itertools.product([False, True], repeat=len(self.pending)):
            names = dict(self.durable)
            for changes in itertools.compress(self.pending, kept):
                names.update(changes)
            node = names.get(("root", name))
            if isinstance(node, str):
                files = {n: v for (d, n), v in names.items() if d == node and v is not None}
                for contents in itertools.product(*map(self.contents, files.values())):
                    yield dict(zip(files, contents, strict=True))
            else:
                yield from [None] if node is None else self.contents(node)

    @staticmethod
    def contents(node):
        written, synced = node
        if written == synced:
            return [written]
        return [synced, written, written[: len(written) // 2], bytes(len(written))]


def first_bad_state(model, log, allowed):
    """The number of the call after which a power cut could leave something else; or None."""
    for i, entry in enumerate([None, *log]):
        if entry is not None:
            model.feed(*entry)
        for state in model.states("saved"):
            if state not in allowed:
                return i
    return None


def allowed(scene, *states):
    """What a power cut may leave: old, new, and the gap that is documented."""
    gap = () if scene.swaps else (None,)
    return (scene.old, scene.new, *gap, *states)


@cases
def test_a_power_cut_after_every_call(tmp_path, monkeypatch, case):
    scene = Scene(tmp_path / "root", case)
    model = Model(tmp_path / "root")
    error, disk = scene.attempt(monkeypatch, lambda *_: None)
    assert error is None
    assert first_bad_state(model, disk.done, allowed(scene)) is None
    assert list(model.states("saved")) == [scene.new] * 2 ** len(model.pending)  # and it stays


@cases
@pytest.mark.parametrize("call", ["fsync", "fsync_dir"])
def test_the_model_notices_a_sync_left_out(tmp_path, monkeypatch, case, call):
    scene = Scene(tmp_path / "root", case)
    model = Model(tmp_path / "root")
    _, disk = scene.attempt(monkeypatch, lambda *_: None)
    forgetful = [entry for entry in disk.done if entry[0] != call]
    bad = first_bad_state(model, forgetful, allowed(scene))
    if "file" in case and call == "fsync_dir":  # there it protects the new file, not the old
        assert scene.old in model.states("saved")
    else:
        assert bad is not None


@cases
def test_a_power_cut_in_the_save_after_a_kill(tmp_path, monkeypatch, case):
    newer = {"config.json": b"newer", "weights": b"NEWER" * 100}
    for k in itertools.count():
        scene = Scene(tmp_path / str(k), case)
        model = Model(scene.path.parent)
        error, disk = scene.attempt(monkeypatch, killed_at(k, partial=False))
        if error is None:
            break
        again = Watched()
        if not scene.swaps:
            again.before = without_exchange(again.before)
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "disk", again)
            scene.save(scene.path, newer)
        last = newer if scene.save is replace_directory else newer["weights"]
        assert first_bad_state(model, disk.done + again.done, allowed(scene, last)) is None


# Real kills, real limits, real readers

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(atomic.__file__).parents[2])}

LOOP = """
import itertools, sys
from killed import forked
from minilora.files.atomic import replace_directory, replace_file
path, kind = sys.argv[1:]
forked()
for i in itertools.count(1):
    a, b = (bytes([i % 256]) * n for n in (3_000_000, 300_000))
    if kind == "file":
        replace_file(path, [a, b])
    else:
        replace_directory(path, {"a": a, "b": b})
"""


def bytes_in(path):
    """The byte values under `path`, and how many bytes: of one state, one value."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = b"".join(file.read_bytes() for file in files)
    return set(found), len(found)


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("trials", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random(tmp_path, kind, trials):
    rng, path = random.Random(trials), tmp_path / "saved"
    interrupted = 0
    with killer(LOOP, path, kind) as kill:
        for trial in range(20 * trials):  # on a slow machine a few may all fall beside a save
            if trial >= trials and interrupted:
                break
            assert kill(rng.uniform(0.001, 0.06))
            interrupted += len(os.listdir(tmp_path)) > path.exists()
            if path.exists():
                values, size = bytes_in(path)
                assert len(values) == 1
                assert size == 3_300_000
    assert interrupted  # else this test has shown nothing
    if kind == "file":
        replace_file(path, b"last")
    else:
        replace_directory(path, {"a": b"last", "b": b"last"})
    assert os.listdir(tmp_path) == ["saved"]


FULL = """
import resource, signal, sys
from minilora.engine.errors import CheckpointError
from minilora.files.atomic import replace_directory, replace_file
path, kind = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in range(0, 40):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit * 1024, resource.RLIM_INFINITY))
    try:
        if kind == "file":
            replace_file(path, b"new" * 14_000)
        else:
            replace_directory(path, {"a": b"new", "b": b"new" * 14_000})
    except CheckpointError as error:
        assert "File too large" in str(error), error
    else:
        sys.exit("saved on a full disk")
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_full_disk(tmp_path, kind):
    path = tmp_path / "saved"
    if kind == "file":
        replace_file(path, b"old" * 5000)
    else:
        replace_directory(path, {"a": b"old", "b": b"old" * 5000})
    before = bytes_in(path)
    subprocess.run([sys.executable, "-c", FULL, path, kind], check=True, env=ENVIRONMENT)
    assert bytes_in(path) == before
    assert os.listdir(tmp_path) == ["saved"]


def test_readers_beside_a_writer(tmp_path):
    file, directory = tmp_path / "file", tmp_path / "directory"
    done, torn, reads = threading.Event(), [], [0, 0]

    def state(i):
        return bytes([i]) * 100_000

    def save(i):
        replace_file(file, state(i))
        replace_directory(directory, {"a": state(i), "b": state(i)})

    def read_file():
        while not done.is_set():
            mapped = np.memmap(file, np.uint8, "r")
            time.sleep(0.001)  # held while the file is replaced
            if len(mapped) != 100_000 or mapped.min() != mapped.max():
                torn.append("file")
            reads[0] += 1

    def read_directory():
        while not done.is_set():
            here = os.open(directory, os.O_RDONLY)
            try:
                a, b = (read_at(here, name) for name in "ab")
                reads[1] += 1
                if a != b:
                    torn.append("directory")
            except FileNotFoundError:
                pass  # already replaced and being removed
            finally:
                os.close(here)

    def read_at(directory, name):
        with open(os.open(name, os.O_RDONLY, dir_fd=directory), "rb") as file:
            return file.read()

    save(0)
    readers = [threading.Thread(target=f) for f in (read_file, read_file, read_directory)]
    for reader in readers:
        reader.start()
    for i in range(1, 60):
        save(i)
    done.set()
    for reader in readers:
        reader.join()
    assert not torn
    assert min(reads) > 10


def test_two_writers(tmp_path):
    path = tmp_path / "saved"

    def loop(value):
        for _ in range(25):
            replace_directory(path, {"a": value, "b": value})

    writers = [threading.Thread(target=loop, args=[bytes([i]) * 1000]) for i in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (path / "a").read_bytes() == (path / "b").read_bytes()
    assert os.listdir(tmp_path) == ["saved"]


# What else is promised


def test_contents_of_all_kinds(tmp_path):
    path = tmp_path / "a"
    array = np.arange(6, dtype="<u2").reshape(2, 3)
    for content, expected in [
        (b"", b""),
        (b"abc", b"abc"),
        ([], b""),
        ([b"a", b"", bytearray(b"b"), memoryview(b"c")], b"abc"),
        ((b"%d" % i for i in range(3)), b"012"),
        ([array, np.empty(0)], array.tobytes()),
    ]:
        replace_file(path, content)
        assert path.read_bytes() == expected
        replace_directory(tmp_path / "d", {"x": expected})
        assert load_directory(tmp_path / "d") == {"x": expected}


def test_the_umask_is_honored(tmp_path):
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "a", b"")
        replace_directory(tmp_path / "d", {"b": b""})
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "d", "d/b")]
    assert modes == [0o640, 0o750, 0o640]


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    replace_file("a", b"1")
    replace_directory("d/", {"b": b"2"})
    assert (tmp_path / "a").read_bytes() == b"1"
    assert (tmp_path / "d" / "b").read_bytes() == b"2"


def test_a_link_is_replaced_by_a_file(tmp_path):
    (tmp_path / "blob").write_bytes(b"shared")
    (tmp_path / "a").symlink_to("blob")
    replace_file(tmp_path / "a", b"mine")
    assert (tmp_path / "blob").read_bytes() == b"shared"
    assert (tmp_path / "a").read_bytes() == b"mine"


@pytest.mark.parametrize("save", [save_file, replace_directory])
def test_content_that_raises(tmp_path, save):
    path = tmp_path / "saved"
    save(path, OLD)
    before = load_file(path) if save is save_file else load_directory(path)
    with pytest.raises(RuntimeError, match="no more content"):
        save(path, {**NEW, "weights": breaking()})
    assert (load_file(path) if save is save_file else load_directory(path)) == before
    assert os.listdir(tmp_path) == ["saved"]


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"found thesis\.tex, which would be lost"):
        replace_directory(tmp_path, {"a": b""})
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(CheckpointError, match="expected a directory or nothing"):
        replace_directory(tmp_path / "thesis.tex", {"a": b""})
    (tmp_path / "link").symlink_to(".")
    with pytest.raises(CheckpointError, match="a file or a link"):
        replace_directory(tmp_path / "link", {"a": b""})
    for name in ("", ".", "..", "a/b", "a\\b", "a\0"):
        with pytest.raises(CheckpointError, match="plain file names"):
            replace_directory(tmp_path / "d", {name: b""})
    with pytest.raises(CheckpointError, match="not saved"):
        replace_file(tmp_path / "nowhere" / "a", b"")
    with pytest.raises(CheckpointError, match="not saved"):
        replace_file(tmp_path, b"")
    assert sorted(os.listdir(tmp_path)) == ["link", "thesis.tex"]


def test_only_leftovers_of_the_dead_are_cleared(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = [f".a.tmp-{gone.pid}-0", f".a.tmp-{os.getpid()}-123456789", f".a.old-{gone.pid}-3"]
    alive = [f".a.tmp-{os.getppid()}-0", f".b.tmp-{gone.pid}-0", f"a.tmp-{gone.pid}-0",
             f".a.tmp-{gone.pid}-0.txt", ".a.tmp-x-0"]  # fmt: skip
    for name in dead[:2] + alive:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / dead[2]).mkdir()
    (tmp_path / dead[2] / "b").write_bytes(b"old")
    replace_directory(tmp_path / "a", {"b": b"new"})
    assert sorted(os.listdir(tmp_path)) == sorted([*alive, "a"])
    assert load_directory(tmp_path / "a") == {"b": b"new"}


def test_stale_is_what_the_dead_left_of_files_so_named(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = [f".a-1.tmp-{gone.pid}-0", f".a-22.tmp-{os.getpid()}-123456789"]
    alive = [
        f".a-1.tmp-{os.getppid()}-0",
        f".b-1.tmp-{gone.pid}-0",
        f".a-1.old-{gone.pid}-0",
        "a-1",
    ]
    for name in dead + alive:
        (tmp_path / name).write_bytes(b"")
    atomic.clear_stale(tmp_path, re.compile(r"a-\d+"))
    assert sorted(os.listdir(tmp_path)) == sorted(alive)


def test_a_process_of_another_user_is_alive(tmp_path, monkeypatch):
    def kill(pid, number):
        assert number == 0
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    (tmp_path / ".a.tmp-1-0").write_bytes(b"")
    replace_file(tmp_path / "a", b"")
    assert sorted(os.listdir(tmp_path)) == [".a.tmp-1-0", "a"]


def test_a_disk_that_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "disk", Watched(lambda _, name, __: 0 if name == "write" else None))
    with pytest.raises(CheckpointError, match="nothing written"):
        replace_file(tmp_path / "a", b"abc")
    assert not os.listdir(tmp_path)


def test_exchange(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"")
    try:
        Disk().exchange(tmp_path / "a", tmp_path / "b")
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            pytest.skip("this system cannot swap two names")
        raise
    assert os.listdir(tmp_path / "a") == ["b"]
    with pytest.raises(FileNotFoundError):
        Disk().exchange(tmp_path / "a", tmp_path / "c")
    monkeypatch.setattr(sys, "platform", "another")
    with pytest.raises(OSError, match="renameat2") as error:
        Disk().exchange(tmp_path / "a", tmp_path / "b")
    assert error.value.errno == errno.ENOSYS


def test_a_restarted_container_has_the_same_process_number(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_count", itertools.count(5))
    (tmp_path / f".a.tmp-{os.getpid()}-5").write_bytes(b"left when it was killed")
    replace_file(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"]
