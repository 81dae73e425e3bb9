"""Tenants from a folder: `NAME.kubeconfig` for one with an API server, a folder `NAME` of manifests for one without.

The folder may be edited by hand, filled by `cp` or rsync, or be a mounted ConfigMap (whose files are links into a
folder that is swapped); so what a watch says is only a reason to look. Looking compares inode, size and times of every
file with what was read; that costs microseconds a file, and reads and parses, in a thread, what differs. A slow look
from time to time finds what no watch saw (network file systems, too few inotify watches).

Nothing half-written is believed:
- A file that does not parse keeps its last good content; so does one whose last line has no end, for a second.
- What is missing is gone when it has been missing for a second (folder.py for objects, here for tenants).
- A folder one of whose files was never readable says nothing at all: what it would have listed is unknown.
- When the folder as a whole cannot be read, no tenant is gone.
"""

import asyncio
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from vcproxy.brain.sources import Access, Kind, Problem, SourceComplete, SourceSink, TenantFound, TenantGone
from vcproxy.brain.sources.folder import REMOVAL_SECONDS, Folder
from vcproxy.brain.sources.manifests import MAX_BYTES, Key, Manifest, ManifestError, Object, parse_manifest
from vcproxy.kube.errors import KubeconfigError
from vcproxy.kube.kubeconfig import Credentials, load_kubeconfig
from vcproxy.model.tenant import SUPER_UID

LOOK_SECONDS = 10.0
"""How often to look without being told to."""
UNFINISHED_SECONDS = 0.2
"""When to look again at a file that is being written."""
NAME = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,57}[a-z0-9])?")
"""A DNS label; 59 characters, since the uid is `dir-NAME`."""

_KUBECONFIG = ".kubeconfig"
_MANIFESTS = (".yaml", ".yml", ".json")
_ENDS = (b"\n", b"}", b"]")

Stamp = tuple[int, ...]


class Loaded(NamedTuple):
    """One file as last read. `content` is the last good one, None if there never was any; `error` "" if it is this one.

    `stamp`: inode, size and times; () to read it again at the next look. `unfinished`: the stamp with which it was
    first seen without an end, and when.
    """

    stamp: Stamp
    content: Manifest | Credentials | None
    error: str
    unfinished: tuple[Stamp, float] | None = None


class Look(NamedTuple):
    """What one look at the folder found. `files`: by path; `tenants`: names, with their files."""

    files: dict[str, Loaded]
    kubeconfigs: dict[str, str]
    folders: dict[str, tuple[str, ...]]
    problems: tuple[Problem, ...]


def uid_of(name: str) -> str:
    """The uid of the directory tenant of this name."""
    return f"dir-{name}"


class DirectorySource:
    """Tells of the tenants in `path`; see the module. `clock` counts seconds."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._files: dict[str, Loaded] = {}
        self._said: dict[str, Access | None] = {}
        self._missing: dict[str, float] = {}
        self._problems: tuple[Problem, ...] = ()
        self._watch_problem: tuple[Problem, ...] = ()
        self._complete = False
        self._changed = asyncio.Event()

    def problems(self) -> list[Problem]:
        """Files and names that cannot be used, each with file, line and field."""
        return [*self._watch_problem, *self._problems]

    async def run(self, sink: SourceSink) -> NoReturn:
        """Look, tell, wait for changes, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            while True:
                self._changed.clear()
                again = await self._look(sink)
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(again, LOOK_SECONDS)):
                        await self._changed.wait()
        raise AssertionError("unreachable")

    async def _watch(self) -> NoReturn:
        import watchfiles  # for whoever has a folder

        while True:
            try:
                # 50 ms of quiet, at most 200: a file is read when its writer pauses, and often but once. A thread asks
                # for the interpreter at each such step, for as long as the folder is watched: not too often.
                changes = watchfiles.awatch(self._path, watch_filter=None, step=50, debounce=200, rust_timeout=60_000)
                self._watch_problem = ()
                async for _ in changes:
                    self._changed.set()
                    if not self._path.is_dir():
                        break
            except (OSError, RuntimeError) as error:
                cure = f"create it, or raise fs.inotify.max_user_watches; it is looked at every {LOOK_SECONDS:g} s"
                self._watch_problem = (Problem(str(self._path), f"cannot be watched: {error}; {cure}"),)
            await asyncio.sleep(1)
            self._changed.set()

    async def _look(self, sink: SourceSink) -> float:
        """One look, told to `sink`; returns in how many seconds the next one is due."""
        try:
            look = await asyncio.to_thread(read_folder, self._path, self._files, self._clock())
        except OSError as error:
            self._problems = (
                Problem(str(self._path), f"cannot be read: {error.strerror}; its tenants stay as they are"),
            )
            return LOOK_SECONDS
        self._files, self._problems = look.files, look.problems
        now = self._clock()
        due = [now + UNFINISHED_SECONDS] if any(not held.stamp for held in look.files.values()) else []
        for name, path in look.kubeconfigs.items():
            content = look.files[path].content
            self._say(sink, name, content if isinstance(content, Credentials) else None)
        for name, paths in look.folders.items():
            folder = self._said.get(name)
            if not isinstance(folder, Folder):
                folder = Folder()
            objects = _merged({path: look.files[path] for path in paths})
            again = folder.update(objects, now=now) if objects is not None else None
            due.extend([again] if again is not None else [])
            self._say(sink, name, folder)
        due.extend(self._judge_missing(sink, look, now))
        if not self._complete:
            self._complete = True
            sink(SourceComplete())
        return max(0.0, min(due) - now) if due else LOOK_SECONDS

    def _say(self, sink: SourceSink, name: str, access: Access | None) -> None:
        known = self._said.get(name)
        if name in self._said and (known == access or access is None):
            return  # credentials that turned bad are no reason to forget good ones
        self._said[name] = access
        sink(TenantFound(uid_of(name), name, access, strict=False))

    def _judge_missing(self, sink: SourceSink, look: Look, now: float) -> list[float]:
        """Say who is gone; returns when those who are only missing will be."""
        self._missing = {
            name: self._missing.get(name, now)
            for name in self._said
            if name not in look.kubeconfigs and name not in look.folders
        }
        for name in [name for name, since in self._missing.items() if now - since >= REMOVAL_SECONDS]:
            del self._missing[name], self._said[name]
            sink(TenantGone(uid_of(name)))
        return [since + REMOVAL_SECONDS for since in self._missing.values()]


def _merged(files: Mapping[str, Loaded]) -> Mapping[tuple[Kind, Key], Object] | None:
    """The objects of a folder's files, the first file in alphabetical order winning; None if one was never readable."""
    objects: dict[tuple[Kind, Key], Object] = {}
    for path in sorted(files, reverse=True):
        content = files[path].content
        if not isinstance(content, Manifest):
            return None
        objects.update(content.objects)
    return objects


# --- reading, in a thread ---------------------------------------------------------------------------------------------


def read_folder(path: Path, known: Mapping[str, Loaded], now: float) -> Look:
    """One look, at `now` (monotonic seconds): files that are as `known` are not read again.

    Raises OSError if the folder itself cannot be read.
    """
    look = Look({}, {}, {}, ())
    problems: list[Problem] = []
    with os.scandir(path) as entries:
        found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in found:
        is_folder = entry.is_dir()
        if not is_folder and not entry.name.endswith(_KUBECONFIG):
            continue
        name = entry.name if is_folder else entry.name.removesuffix(_KUBECONFIG)
        if not NAME.fullmatch(name) or name == SUPER_UID:
            cure = f"rename it: a tenant's name is a DNS label of at most 59 characters other than {SUPER_UID!r}"
            problems.append(Problem(entry.path, f"{name[:64]!r} cannot be the name of a tenant; {cure}"))
        elif not is_folder:
            _load(entry.path, known, look.files, _kubeconfig, now)
            look.kubeconfigs[name] = entry.path
        elif name in look.kubeconfigs or (path / f"{name}{_KUBECONFIG}").exists():
            problems.append(Problem(entry.path, f"is ignored: {name}{_KUBECONFIG} names the same tenant; remove one"))
        else:
            look.folders[name] = _load_folder(entry.path, known, look.files, problems, now)
    problems.extend(Problem(file, held.error) for file, held in look.files.items() if held.error)
    for held in look.files.values():
        if isinstance(held.content, Manifest):
            problems.extend(Problem(note.partition(":")[0], note) for note in held.content.notes)
    problems.extend(_duplicates(look))
    return look._replace(problems=tuple(problems))


def _load_folder(
    path: str, known: Mapping[str, Loaded], files: dict[str, Loaded], problems: list[Problem], now: float
) -> tuple[str, ...]:
    """The manifest files of one tenant, loaded into `files`. A folder that cannot be read keeps those it had."""
    try:
        with os.scandir(path) as entries:
            paths = sorted(
                entry.path
                for entry in entries
                if entry.name.endswith(_MANIFESTS) and not entry.name.startswith(".") and entry.is_file()
            )
    except OSError as error:
        problems.append(Problem(path, f"cannot be read: {error.strerror}; its objects stay as they are"))
        paths = [file for file in known if file.startswith(f"{path}{os.sep}")]
        files.update({file: known[file] for file in paths})
        return tuple(paths)
    for file in paths:
        _load(file, known, files, _manifest, now)
    return tuple(file for file in paths if file in files)


def _load(
    file: str,
    known: Mapping[str, Loaded],
    files: dict[str, Loaded],
    parse: Callable[[str, bytes], Manifest | Credentials],
    now: float,
) -> None:
    old = known.get(file)
    try:
        with Path(file).open("rb") as opened:
            status = os.fstat(opened.fileno())
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            if old is not None and old.stamp == stamp:
                files[file] = old
                return
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                raise ManifestError(file, 0, "", f"is not a regular file of at most {MAX_BYTES >> 20} MiB")
            data = opened.read()
        if not data.endswith(_ENDS):
            # How long it has been so is not asked of its times: they are of another clock, or of this one before it was
            # set, and a time to come would be waited for.
            seen = old.unfinished if old is not None and old.unfinished and old.unfinished[0] == stamp else (stamp, now)
            if now - seen[1] < REMOVAL_SECONDS:
                files[file] = Loaded((), old.content if old else None, "", seen)
                return
        files[file] = Loaded(stamp, parse(file, data), "")
    except FileNotFoundError:
        return  # gone since the folder was listed
    except OSError as error:
        files[file] = Loaded((0,), old.content if old else None, f"{file}: cannot be read: {error.strerror}")
    except (ManifestError, KubeconfigError, UnicodeDecodeError) as error:
        message = str(error) if isinstance(error, ManifestError) else f"{file}: {error}"
        files[file] = Loaded(stamp, old.content if old else None, message)


def _kubeconfig(file: str, data: bytes) -> Credentials:
    return load_kubeconfig(data)


def _manifest(file: str, data: bytes) -> Manifest:
    return parse_manifest(data.decode(), file)


def _duplicates(look: Look) -> list[Problem]:
    """Objects that several files of a tenant define."""
    problems: list[Problem] = []
    for paths in look.folders.values():
        owner: dict[tuple[Kind, Key], str] = {}
        for path in paths:
            content = look.files[path].content
            for kind, key in content.objects if isinstance(content, Manifest) else ():
                first = owner.setdefault((kind, key), path)
                if first != path:
                    problems.append(Problem(path, f"{path}: {kind} {'/'.join(key)} is also in {first}, which counts"))
    return problems
