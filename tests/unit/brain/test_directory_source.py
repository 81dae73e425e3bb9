"""Tenants from a real folder, with a real watch: what editors, `cp` and mounted ConfigMaps do to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.brain.polling import until
from tests.unit.brain.test_manifests import SERVICE, SLICE
from vcproxy.brain.sources import SourceComplete, SourceEvent, TenantFound, TenantGone
from vcproxy.brain.sources.directory import DirectorySource, Loaded, read_folder
from vcproxy.brain.sources.folder import Folder
from vcproxy.kube.kubeconfig import Credentials
from vcproxy.kube.reflector import Deleted, Event, Listed, Upserted

KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:6443", certificate-authority-data: CA}}]
users: [{name: u, user: {token: TOKEN}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
"""


@pytest.fixture(scope="module")
def kubeconfig() -> str:
    import base64

    import trustme

    return KUBECONFIG.replace("CA}", base64.b64encode(trustme.CA().cert_pem.bytes()).decode() + "}")


class Seen:
    """What a source said, with the objects of its folders as they are now."""

    def __init__(self) -> None:
        self.tenants: dict[str, TenantFound] = {}
        self.complete = False
        self.gone: list[str] = []
        self.found = 0
        self.objects: dict[str, dict[tuple[str, tuple[str, str]], Any]] = {}
        self.deleted = 0
        self._group: asyncio.TaskGroup | None = None
        self._tasks: dict[str, asyncio.Task[Any]] = {}

    def start(self, group: asyncio.TaskGroup) -> None:
        self._group = group

    def take(self, event: SourceEvent) -> None:
        match event:
            case TenantFound(uid, _, access):
                self.tenants[uid] = event
                self.found += 1
                if isinstance(access, Folder):
                    assert self._group is not None
                    self._tasks[uid] = self._group.create_task(access.run(lambda *said: self._take(uid, *said)))
            case TenantGone(uid):
                del self.tenants[uid]
                self.gone.append(uid)
                if uid in self._tasks:
                    self._tasks.pop(uid).cancel()
            case SourceComplete():
                assert not self.complete
                self.complete = True

    def _take(self, uid: str, kind: str, event: Event[Any]) -> None:
        held = self.objects.setdefault(uid, {})
        match event:
            case Listed(objects):
                for key in [key for key in held if key[0] == kind]:
                    del held[key]
                held.update({(kind, found.key): found for found in objects})
            case Upserted(found):
                held[kind, found.key] = found
            case Deleted(key):
                del held[kind, key]
                self.deleted += 1

    def names(self, uid: str) -> set[str]:
        """Names of the objects of a folder."""
        return {key[1] for _, key in self.objects.get(uid, {})}

    def token(self, uid: str) -> str:
        access = self.tenants[uid].access
        assert isinstance(access, Credentials)
        return access.token


@contextlib.asynccontextmanager
async def watching(path: Path) -> AsyncIterator[tuple[Seen, DirectorySource]]:
    seen, source = Seen(), DirectorySource(path)
    async with asyncio.TaskGroup() as group:
        seen.start(group)
        task = group.create_task(source.run(seen.take))
        try:
            yield seen, source
        finally:
            task.cancel()
            for other in seen._tasks.values():
                other.cancel()


def write(path: Path, text: str) -> None:
    """As careful programs write: complete or not at all."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.rename(path)


def problems(source: DirectorySource) -> str:
    return "\n".join(f"{found.subject}: {found.message}" for found in source.problems())


async def test_tenants_that_are_there_and_tenants_that_come(tmp_path: Path, kubeconfig: str) -> None:
    write(tmp_path / "acme" / "web.yaml", f"{SERVICE}---\n{SLICE}")
    write(tmp_path / "globex.kubeconfig", kubeconfig)
    async with watching(tmp_path) as (seen, source):
        await until(lambda: seen.complete)
        assert set(seen.tenants) == {"dir-acme", "dir-globex"}
        assert seen.tenants["dir-acme"].name == "acme"
        await until(lambda: seen.names("dir-acme") == {"web", "web-1"})
        write(tmp_path / "initech" / "web.yaml", SERVICE)
        write(tmp_path / "hooli.kubeconfig", kubeconfig)
        await until(lambda: {"dir-initech", "dir-hooli"} <= set(seen.tenants))
        await until(lambda: seen.names("dir-initech") == {"web"})
        write(tmp_path / "initech" / "more.json", '{"kind": "Node", "metadata": {"name": "n1"}}')
        await until(lambda: seen.names("dir-initech") == {"web", "n1"})
        assert problems(source) == ""


async def test_a_change_comes_through_at_once(tmp_path: Path) -> None:
    write(tmp_path / "acme" / "web.yaml", SERVICE)
    async with watching(tmp_path) as (seen, _):
        await until(lambda: seen.names("dir-acme") == {"web"})
        began = time.monotonic()
        write(tmp_path / "acme" / "web.yaml", SERVICE.replace("port: 80", "port: 81"))
        key = ("Service", ("default", "web"))
        await until(lambda: seen.objects["dir-acme"][key].spec.ports[0].port == 81)
        assert time.monotonic() - began < 1, "only removals wait"
        assert seen.found == 1
        assert seen.deleted == 0


async def test_what_is_removed_goes_after_a_second_not_before(tmp_path: Path, kubeconfig: str) -> None:
    write(tmp_path / "acme" / "a.yaml", SERVICE)
    write(tmp_path / "acme" / "b.yaml", SLICE)
    write(tmp_path / "globex.kubeconfig", kubeconfig)
    async with watching(tmp_path) as (seen, _):
        await until(lambda: seen.names("dir-acme") == {"web", "web-1"})
        began = time.monotonic()
        (tmp_path / "acme" / "b.yaml").unlink()
        (tmp_path / "globex.kubeconfig").unlink()
        await until(lambda: seen.names("dir-acme") == {"web"})
        await until(lambda: seen.gone == ["dir-globex"])
        assert time.monotonic() - began >= 1
        shutil.rmtree(tmp_path / "acme")
        await until(lambda: "dir-acme" in seen.gone)
        assert seen.names("dir-acme") == {"web"}, "a tenant goes as a whole"


async def test_what_is_away_for_a_moment_was_never_away(tmp_path: Path, kubeconfig: str) -> None:
    write(tmp_path / "acme" / "web.yaml", SERVICE)
    write(tmp_path / "globex.kubeconfig", kubeconfig)
    async with watching(tmp_path) as (seen, _):
        await until(lambda: seen.complete and seen.names("dir-acme") == {"web"})
        for _ in range(3):
            shutil.move(tmp_path / "acme", tmp_path.parent / f"{tmp_path.name}-aside")
            (tmp_path / "globex.kubeconfig").rename(tmp_path / ".globex")
            await asyncio.sleep(0.1)  # long enough to be looked at, too short to be believed
            shutil.move(tmp_path.parent / f"{tmp_path.name}-aside", tmp_path / "acme")
            (tmp_path / ".globex").rename(tmp_path / "globex.kubeconfig")
        write(tmp_path / "last.kubeconfig", kubeconfig)
        await until(lambda: "dir-last" in seen.tenants)
        assert seen.gone == []
        assert seen.deleted == 0
        assert seen.found == 3


async def test_half_written_files_wipe_nothing(tmp_path: Path) -> None:
    path = tmp_path / "acme" / "all.yaml"
    whole = f"{SERVICE}---\n{SLICE}"
    write(path, whole)
    async with watching(tmp_path) as (seen, source):
        await until(lambda: seen.names("dir-acme") == {"web", "web-1"})
        before = dict(seen.objects["dir-acme"])
        with path.open("w") as file:  # truncated in place, and written slowly
            for cut in (0, 30, 120, 150, len(SERVICE), len(SERVICE) + 60, len(whole)):
                file.write(whole[file.tell() : cut])
                file.flush()
                os.fsync(file.fileno())
                write(tmp_path / f"marker{cut}" / "web.yaml", SERVICE)
                await until(lambda cut=cut: seen.names(f"dir-marker{cut}") == {"web"})
                assert seen.objects["dir-acme"] == before, f"after {cut} characters"
        await until(lambda: problems(source) == "")
        assert seen.objects["dir-acme"] == before
        assert seen.deleted == 0


async def test_a_file_that_turns_bad_keeps_its_last_good_content(tmp_path: Path) -> None:
    write(tmp_path / "acme" / "web.yaml", SERVICE)
    async with watching(tmp_path) as (seen, source):
        await until(lambda: seen.names("dir-acme") == {"web"})
        write(tmp_path / "acme" / "web.yaml", SERVICE.replace("port: 80\n", "port: eighty\n"))
        await until(lambda: f"{tmp_path}/acme/web.yaml:10: spec.ports[0].port: Expected `int`" in problems(source))
        assert seen.names("dir-acme") == {"web"}
        write(tmp_path / "acme" / "web.yaml", SERVICE.replace("name: web", "name: mended"))
        await until(lambda: seen.names("dir-acme") == {"mended"})
        assert problems(source) == ""


async def test_a_folder_with_a_file_that_was_never_good_says_nothing(tmp_path: Path) -> None:
    write(tmp_path / "acme" / "a.yaml", SERVICE)
    write(tmp_path / "acme" / "b.yaml", "nonsense: [\n")
    async with watching(tmp_path) as (seen, source):
        await until(lambda: seen.complete)
        assert "dir-acme" in seen.tenants, "it does exist"
        assert "dir-acme" not in seen.objects
        assert "not YAML" in problems(source)
        write(tmp_path / "acme" / "b.yaml", SLICE)
        await until(lambda: seen.names("dir-acme") == {"web", "web-1"})


async def test_credentials_that_change_are_told_and_bad_ones_are_not(tmp_path: Path, kubeconfig: str) -> None:
    path = tmp_path / "acme.kubeconfig"
    write(path, kubeconfig)
    async with watching(tmp_path) as (seen, source):
        await until(lambda: seen.complete)
        assert seen.token("dir-acme") == "TOKEN"
        write(path, kubeconfig.replace("token: TOKEN", "exec: {command: /bin/sh}"))
        await until(lambda: "user.exec" in problems(source))
        assert seen.token("dir-acme") == "TOKEN"
        write(path, kubeconfig.replace("TOKEN", "FRESH"))
        await until(lambda: seen.token("dir-acme") == "FRESH")
        assert problems(source) == ""
        assert seen.gone == []


async def test_a_kubeconfig_that_was_never_good_names_a_tenant_without_access(tmp_path: Path, kubeconfig: str) -> None:
    write(tmp_path / "acme.kubeconfig", "nonsense\n")
    async with watching(tmp_path) as (seen, _):
        await until(lambda: seen.complete)
        assert seen.tenants["dir-acme"].access is None
        write(tmp_path / "acme.kubeconfig", kubeconfig)
        await until(lambda: seen.tenants["dir-acme"].access is not None)


async def test_a_mounted_configmap_is_swapped(tmp_path: Path, kubeconfig: str) -> None:
    """The kubelet's atomic writer: NAME -> ..data/NAME, ..data -> ..TIMESTAMP, replaced by rename."""
    mount = tmp_path / "mount"
    (mount / "..one").mkdir(parents=True)
    (mount / "..one" / "acme.kubeconfig").write_text(kubeconfig)
    (mount / "..data").symlink_to("..one")
    (mount / "acme.kubeconfig").symlink_to("..data/acme.kubeconfig")
    async with watching(mount) as (seen, _):
        await until(lambda: seen.complete)
        (mount / "..two").mkdir()
        (mount / "..two" / "acme.kubeconfig").write_text(kubeconfig.replace("TOKEN", "FRESH"))
        (mount / "..data_tmp").symlink_to("..two")
        (mount / "..data_tmp").rename(mount / "..data")
        shutil.rmtree(mount / "..one")
        await until(lambda: seen.token("dir-acme") == "FRESH")
        assert seen.gone == []


async def test_a_folder_that_is_not_there_loses_nobody(tmp_path: Path) -> None:
    path = tmp_path / "tenants"
    async with watching(path) as (seen, source):
        await until(lambda: "cannot be read" in problems(source))
        assert not seen.complete
        path.mkdir()
        write(path / "acme" / "web.yaml", SERVICE)
        await until(lambda: seen.complete and seen.names("dir-acme") == {"web"})
        path.rename(tmp_path / "elsewhere")
        await until(lambda: "cannot be read" in problems(source))
        assert seen.gone == []
        (tmp_path / "elsewhere").rename(path)
        await until(lambda: problems(source) == "")
        write(path / "acme" / "web.yaml", SERVICE.replace("name: web", "name: later"))
        await until(lambda: seen.names("dir-acme") == {"later"})
        assert seen.gone == []


def test_names_and_doubles(tmp_path: Path, kubeconfig: str) -> None:
    for name in ("UPPER", "under_score", "-dash", "x" * 60, "super", "ok", "x" * 59):
        write(tmp_path / f"{name}.kubeconfig", kubeconfig)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "README.md").write_text("for people")
    write(tmp_path / "ok" / "web.yaml", SERVICE)
    write(tmp_path / "two" / "a.yaml", SERVICE)
    write(tmp_path / "two" / "b.yaml", SERVICE)
    write(tmp_path / "two" / "notes.txt", "for people")
    look = read_folder(tmp_path, {}, 0.0)
    assert set(look.kubeconfigs) == {"ok", "x" * 59}
    assert set(look.folders) == {"two"}
    said = "\n".join(problem.message for problem in look.problems)
    assert said.count("cannot be the name of a tenant") == 5
    assert "ok.kubeconfig names the same tenant" in said
    assert "Service default/web is also in" in said


def test_a_look_reads_only_what_differs(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / "acme" / f"{number}.yaml", SERVICE.replace("web", f"web{number}"))
    first = read_folder(tmp_path, {}, 0.0)
    write(tmp_path / "acme" / "3.yaml", SERVICE.replace("web", "other"))
    second = read_folder(tmp_path, first.files, 0.0)
    fresh = [path for path in second.files if second.files[path] is not first.files[path]]
    assert [Path(path).name for path in fresh] == ["3.yaml"]


@pytest.mark.parametrize("hours", [-5, 0, 5])
def test_a_file_without_an_end_is_believed_when_it_has_stayed_so(tmp_path: Path, hours: int) -> None:
    path = tmp_path / "acme" / "web.yaml"
    write(path, SERVICE.rstrip())
    dated = time.time() + hours * 3600  # by whoever's clock: another machine's, or ours before it was set
    os.utime(path, (dated, dated))
    files: dict[str, Loaded] = {}
    for now, read in ((10.0, False), (10.9, False), (11.0, True)):
        files = read_folder(tmp_path, files, now).files
        assert (files[str(path)].content is not None) == read
    write(path, SERVICE.replace("name: web", "name: other").rstrip())
    for now, read in ((12.0, False), (12.5, False), (13.0, True)):
        files = read_folder(tmp_path, files, now).files
        assert ("other" in str(files[str(path)].content)) == read
