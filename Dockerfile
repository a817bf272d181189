FROM python:3.13-slim AS build
COPY requirements.txt /src/
WORKDIR /src
RUN python -m venv /opt/atomic-balance
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/atomic-balance/bin/pip install --quiet --disable-pip-version-check --constraint requirements.txt .

FROM python:3.13-slim
RUN useradd --system --no-create-home --uid 10001 atomic-balance
COPY --from=build /opt/atomic-balance /opt/atomic-balance
ENV PATH=/opt/atomic-balance/bin:$PATH HOST=0.0.0.0 PORT=3000
USER atomic-balance
WORKDIR /tmp
EXPOSE 3000
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/healthz', timeout=2)"]
CMD ["atomic-balance", "serve"]
