FROM python:3.13-slim AS build
WORKDIR /src
RUN python -m venv --without-pip /opt/atomic-balance
# The dependencies alone: they are installed anew only if what names them has changed.
COPY requirements.txt setup.cfg ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c "import configparser as c; p = c.RawConfigParser(); p.read('setup.cfg'); print(p['options']['install_requires'])" \
        > dependencies.txt && \
    pip --python /opt/atomic-balance install --quiet --disable-pip-version-check --constraint requirements.txt \
        --requirement dependencies.txt
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/atomic-balance install --quiet --disable-pip-version-check --no-deps .

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
