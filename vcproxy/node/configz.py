"""/configz and /proxyMode on the metrics address, as kube-proxy has them: what this process runs with.

Tools ask these: conformance suites read `/proxyMode`, inventories and support scripts read `/configz`. The document
says what is in force, defaults included, and never where nobody set anything.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from vcproxy.ops.configfile import API_VERSION
from vcproxy.ops.metrics import Handler

_SAFE = {"X-Content-Type-Options": "nosniff"}


def handlers(configuration: Mapping[str, Any], *, mode: str) -> Mapping[str, Handler]:
    """The routes. `configuration`: plain data by API group, kube-proxy's form. `mode`: how the node is programmed."""
    document = msgspec.json.encode(configuration)

    async def configz(_: web.Request) -> web.Response:
        return web.Response(body=document, content_type="application/json", headers=_SAFE)

    async def proxy_mode(_: web.Request) -> web.Response:
        return web.Response(text=mode, content_type="text/plain", charset="utf-8", headers=_SAFE)

    return {"/configz": configz, "/proxyMode": proxy_mode}


def document(config: msgspec.Struct) -> dict[str, Any]:
    """A configuration of ours in the same form."""
    plain = {"apiVersion": API_VERSION, "kind": type(config).__name__, **msgspec.to_builtins(config)}
    return {API_VERSION.partition("/")[0]: plain}
