# The image of everything this project runs: a worker for its deployments (the default), `vrt train`, `dvc repro`, and the
# servers of compose.yaml. docs/container.md tells how to use it.
#
#   docker build --tag vrt .                                      the build of torch that PyPI has, which on x86-64 is the one for CUDA
#   docker build --tag vrt --build-arg TORCH_WHEELS=ADDRESS .     another one, such as PyTorch's for CPUs: the page that lists its wheels
#
# The GPU's driver comes from the host; torch brings the rest of CUDA.

FROM debian:bookworm-slim AS base
# git: DVC asks it. tini: process 1 must wait for the orphans that a killed launcher leaves, which Python does not.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git python3 tini \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/vrt/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

FROM base AS packages
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/vrt
ARG TORCH_WHEELS=
COPY requirements.lock /tmp/
# As in the Makefile: the lock is complete but for what torch itself pins, which the CUDA build has and the CPU build has not.
# hadolint ignore=DL3013
RUN torch="$(grep '^torch==' /tmp/requirements.lock)" \
    && if [ -n "$TORCH_WHEELS" ]; then pip install --no-cache-dir --no-index --no-deps --find-links "$TORCH_WHEELS" "$torch"; fi \
    && pip install --no-cache-dir --no-deps --requirement /tmp/requirements.lock \
    && pip install --no-cache-dir --constraint /tmp/requirements.lock "$torch"

FROM base
# What will be mounted belongs to the user from the start: a new volume takes over owner and rights.
RUN useradd --uid 1000 --create-home vrt \
    && install --directory --owner=vrt --group=vrt /srv/vrt /srv/vrt/checkpoints /srv/vrt/reports /srv/vrt/.vrt /srv/vrt/.dvc /srv/vrt/.dvc/cache /srv/s3
WORKDIR /srv/vrt
# Gigabytes, and made of the lock file alone: a change of the code neither makes this layer anew nor has it loaded again where it is pulled.
COPY --from=packages /opt/vrt /opt/vrt
COPY --chown=1000:1000 pyproject.toml dvc.yaml params.yaml prefect.yaml .dvcignore ./
COPY --chown=1000:1000 .dvc/config .dvc/
COPY --chown=1000:1000 deploy deploy
COPY --chown=1000:1000 recipes recipes
COPY --chown=1000:1000 data data
COPY --chown=1000:1000 pipelines pipelines
COPY --chown=1000:1000 vrt vrt
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .
USER 1000
# There is no git here, and DVC wants to be told.
RUN dvc config --local core.no_scm true
# The commit, for the record of every training: there is no git here that could be asked.
ARG REVISION=
ENV VRT_CODE_VERSION="${REVISION:-unknown: the image was built without REVISION}"
LABEL org.opencontainers.image.title="VRT training that can't be lost" \
      org.opencontainers.image.revision=$REVISION
# Whatever runs here needs the servers that the environment names.
HEALTHCHECK --interval=30s --timeout=20s --start-period=2m CMD ["vrt", "services", "status", "--given"]
# A training that is told so saves the step at hand and publishes it.
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "pipelines"]
