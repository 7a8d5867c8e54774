# The server: docs/install.md says how it is built for processors and for NVIDIA GPUs, and how it is run.
ARG BASE=python:3.11-slim-bookworm

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE} AS server
# The bases for GPUs have no Python.
# hadolint ignore=DL3008
RUN command -v python3 \
    || { apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3-venv \
    && rm -rf /var/lib/apt/lists/*; }
# torch comes first and alone: what needs it keeps the build that is there.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    python3 -m venv /opt/calm \
    && /opt/calm/bin/pip install --no-cache-dir -c /constraints.txt --extra-index-url "${TORCH_INDEX}" torch
RUN --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/calm/bin/pip install --no-cache-dir -c /constraints.txt "$(ls /wheels/*.whl)[serve]" \
    && useradd --create-home --uid 10001 calm
ENV PATH=/opt/calm/bin:$PATH \
    HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/calm
VOLUME ["/model"]
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import *; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/health', timeout=4)"]
# What follows the name of the image replaces the last line, as in: docker run ... calm /model --name mine
ENTRYPOINT ["calm", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/model"]
