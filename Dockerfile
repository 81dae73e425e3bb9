# One image for brain and node agent. Debian trixie: its nftables (1.1.3) and Python (3.13) are the ones tested beside bookworm's.
FROM debian:trixie-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements.lock requirements-dev.lock ./
# The wheel is built with pinned, hashed tools; the environment that ships has the runtime requirements only.
RUN python3 -m venv /build && /build/bin/pip install --no-cache-dir --require-hashes -r requirements-dev.lock \
 && python3 -m venv /opt/vcproxy && /opt/vcproxy/bin/pip install --no-cache-dir --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY vcproxy vcproxy
COPY backends backends
RUN /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
 && /opt/vcproxy/bin/pip install --no-cache-dir --no-deps /dist/*.whl \
 && /opt/vcproxy/bin/python -m compileall -q /opt/vcproxy

FROM debian:trixie-slim
RUN apt-get update && apt-get install -y --no-install-recommends python3 nftables \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 65532 --user-group --no-create-home vcproxy
COPY --from=build /opt/vcproxy /opt/vcproxy
ENV PATH=/opt/vcproxy/bin:$PATH PYTHONUNBUFFERED=1
# The brain needs no privilege. The node agent's DaemonSet runs it as user 0 with NET_ADMIN and the host's network.
USER 65532:65532
ENTRYPOINT ["vcproxy"]
CMD ["--help"]
