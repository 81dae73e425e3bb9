"""The admin socket: answers, refusals, and who may bind it."""

import socket
import stat
from pathlib import Path

import pytest

from vcproxy.ops import admin


async def test_answers_and_unknown_names(tmp_path: Path) -> None:
    path = str(tmp_path / "admin.sock")
    routes = {"/status": lambda _: {"healthy": True, "digest": b"\0"}, "/tenants": lambda query: {}[query["tenant"]]}
    async with admin.serve(path, routes):
        assert stat.S_IMODE((tmp_path / "admin.sock").stat().st_mode) == 0o600
        assert (await admin.fetch(path, "/status"))["healthy"] is True
        with pytest.raises(admin.AdminError, match="acme"):
            await admin.fetch(path, "/tenants", {"tenant": "acme"})
        with pytest.raises(admin.AdminError, match="has no /nodes"):
            await admin.fetch(path, "/nodes")
        with pytest.raises(admin.AdminError, match="another vcproxy"):
            async with admin.serve(path, routes):
                pass
    assert not (tmp_path / "admin.sock").exists()


async def test_a_dead_process_s_socket_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "admin.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    async with admin.serve(path, {"/status": lambda _: 1}):
        assert await admin.fetch(path, "/status") == 1


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(admin.AdminError, match="is vcproxy running"):
        await admin.fetch(str(tmp_path / "none.sock"), "/status")
