"""A Dockerfile, built without a container engine: each instruction does to a chroot what an engine does to a layer.

So the image that is tested is the one that the Dockerfile describes, and the two cannot drift apart. Understood is what
our Dockerfile has: FROM (of Debian), WORKDIR, COPY (from the context or another stage), RUN, ENV, USER, ENTRYPOINT, CMD;
anything else is refused by name. The result after each RUN is kept, under a key of all that went into it, as an engine
keeps layers.
"""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from e2e.cluster import rootfs
from e2e.cluster.rootfs import BuildFailed


@dataclass
class Stage:
    """What a stage is so far. root: its file system, not to be written to once it is kept; key: of all that made it."""

    root: Path
    key: str
    name: str
    directory: str = "/"
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": rootfs.PATH})
    config: dict[str, object] = field(default_factory=dict)


class Builder:
    """Builds one Dockerfile. context: what COPY copies from; cache: for kept results; base: the root of debian:SUITE-slim."""

    def __init__(self, context: Path, cache: Path, base: Path) -> None:
        self._context = context
        self._cache = cache
        self._base = base
        self._stages: dict[str, Stage] = {}
        self._used: set[Path] = set()
        self._pending: list[tuple[Path, str]] = []  # copies that the next kept result will contain

    def build(self, dockerfile: Path) -> Stage:
        """The last stage; its `config` is the OCI configuration. Raises BuildFailed naming the instruction."""
        self._cache.mkdir(parents=True, exist_ok=True)
        stage: Stage | None = None
        for instruction, rest in instructions(dockerfile.read_text()):
            if instruction == "FROM":
                if stage:
                    self._keep(stage)
                stage = self._from(rest)
            elif stage is None:
                raise BuildFailed(f"{dockerfile}: {instruction} before FROM")
            else:
                self._apply(stage, instruction, rest)
        if stage is None:
            raise BuildFailed(f"{dockerfile} has no FROM")
        self._keep(stage)
        for left in self._cache.iterdir():
            if left not in self._used:
                shutil.rmtree(left)
        stage.config["Env"] = [f"{name}={value}" for name, value in stage.environment.items()]
        return stage

    def _from(self, rest: str) -> Stage:
        match = re.fullmatch(rf"debian:{rootfs.SUITE}-slim(?: AS (\w+))?", rest)
        if not match:
            raise BuildFailed(f"FROM {rest}: only debian:{rootfs.SUITE}-slim can be made here")
        stage = Stage(root=self._base, key=_digest(str(self._base)), name=match[1] or str(len(self._stages)))
        self._stages[stage.name] = stage
        return stage

    def _apply(self, stage: Stage, instruction: str, rest: str) -> None:
        match instruction:
            case "WORKDIR":
                stage.directory = rest
                stage.key = _digest(stage.key, "WORKDIR", rest)
            case "COPY":
                for source, target, content in self._sources(stage, rest):
                    stage.key = _digest(stage.key, target, content)
                    self._pending.append((source, target))
            case "ENV":
                for assignment in shlex.split(rest):
                    name, _, value = assignment.partition("=")
                    stage.environment[name] = re.sub(r"\$(\w+)", lambda match: stage.environment[match[1]], value)
            case "RUN":
                stage.key = _digest(stage.key, "RUN", rest)
                self._keep(stage, rest)
            case "USER":
                stage.config["User"] = rest
            case "ENTRYPOINT" | "CMD":
                stage.config[instruction.capitalize()] = json.loads(rest)
            case _:
                raise BuildFailed(f"{instruction} {rest}: not understood here")

    def _sources(self, stage: Stage, rest: str) -> Iterator[tuple[Path, str, str]]:
        """(file or folder of the host, absolute path in the image, what it contains) for each source of a COPY."""
        words = shlex.split(rest)
        other = self._stages[words.pop(0).removeprefix("--from=")] if words[0].startswith("--from=") else None
        origin = other.root if other else self._context
        *sources, target = words
        for source in sources:
            into = target.endswith("/")
            path = f"{stage.directory}/{target}" if not target.startswith("/") else target
            found = origin / source.lstrip("/")
            content = _digest(other.key, source) if other else _content(found)
            yield found, f"{path}/{Path(source).name}" if into else path, content

    def _keep(self, stage: Stage, command: str | None = None) -> None:
        """Bring the stage's root up to date: pending copies, then the command; or find that done already."""
        kept = self._cache / stage.key
        self._used.add(kept)
        if not kept.exists():
            part = kept.with_name(f"{kept.name}.part")
            rootfs.copy(stage.root, part)
            (part / stage.directory.lstrip("/")).mkdir(parents=True, exist_ok=True)
            for source, target in self._pending:
                _copy(source, part / target.lstrip("/"))
            if command:
                script = f"cd {shlex.quote(stage.directory)}; {command}"
                rootfs.run(part, ["/bin/sh", "-ec", script], environment=stage.environment)
            part.rename(kept)
        self._pending.clear()
        stage.root = kept


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(instruction, arguments) each, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if line.strip():
            instruction, _, rest = line.strip().partition(" ")
            yield instruction.upper(), rest.strip()


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=_IGNORED)
    else:
        shutil.copy2(source, target)


_IGNORED = shutil.ignore_patterns("__pycache__")


def _content(path: Path) -> str:
    """A digest of a file or folder: names, modes and contents."""
    hashed = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink() and "__pycache__" not in file.parts:
            hashed.update(f"{file.relative_to(path.parent)} {file.stat().st_mode:o}\n".encode() + file.read_bytes())
    return hashed.hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
