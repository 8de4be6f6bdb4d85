# syntax=docker/dockerfile:1
# Semion for NVIDIA GPUs: driver 580 or newer on the host, A100, H100, H200, B200. Never built or run so far.
#
#   docker build --tag semion .                                     MAX_JOBS=N as --build-arg: compilers at a time
#   docker run --gpus all --shm-size 16g --volume "$PWD:/work" semion train /work/run.toml
#
# Versions are those of requirements/gpu.txt and gpu_source.txt; here stand only the system's. The tags below can be moved by
# their owner, a digest cannot: print them with
#   docker buildx imagetools inspect nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04 --format '{{.Manifest.Digest}}'
# and pass --build-arg DEVEL_DIGEST=@sha256:... and --build-arg BASE_DIGEST=@sha256:... (or write them in as the defaults).
#
# Stages: `packages` installs wheels, `source` compiles what has none, `kernels` our own; the image takes their results in
# that order, so that a change of our code moves one small layer, not the packages'. It starts from the `base` flavour
# because torch's wheels bring CUDA's libraries, cuDNN and NCCL: a second copy would only be the wrong version. At run time
# Triton (vLLM, megatron-core) compiles a launcher with gcc and Python's headers and brings its own ptxas, and Transformer
# Engine compiles with NVRTC and the headers of the wheels; nothing needs nvcc, for engines switch off what vLLM would compile
# with it, FlashInfer's attention on B200 among it (engine/inference/nvcc.py; untried on a GPU).

ARG BASE_DIGEST=""
ARG DEVEL_DIGEST=""

FROM nvidia/cuda:13.0.2-base-ubuntu24.04${BASE_DIGEST} AS base
ENV PATH=/opt/semion/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ gcc git libnuma1 python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

FROM base AS packages
RUN python3.12 -m venv /opt/semion
COPY requirements /requirements
RUN pip install --no-deps --only-binary=:all: -r /requirements/gpu.txt

FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04${DEVEL_DIGEST} AS source
ARG MAX_JOBS=8
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
COPY --from=packages /opt/semion /opt/semion
COPY requirements /requirements
# The headers are those of the wheels that torch loads; the base image's cuDNN is another version.
ENV PATH=/opt/semion/bin:/usr/local/cuda/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    CUDA_HOME=/usr/local/cuda \
    CPLUS_INCLUDE_PATH=/opt/semion/lib/python3.12/site-packages/nvidia/cudnn/include:/opt/semion/lib/python3.12/site-packages/nvidia/nccl/include \
    TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0" \
    NVTE_PYTORCH_FORCE_BUILD=TRUE \
    APEX_CPP_EXT=1 \
    APEX_CUDA_EXT=1
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels -r /requirements/gpu_source.txt

FROM source AS kernels
COPY setup.py pyproject.toml LICENSE /semion/
COPY csrc /semion/csrc
COPY engine /semion/engine
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /own /semion

FROM base AS semion
# From the CUDA repository that the base image has configured.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends nsight-systems-2025.6.3=2025.6.3.* \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 semion \
    && useradd --create-home --uid 10001 --gid 10001 semion \
    && install --directory --owner semion --group semion /work
COPY --from=packages /opt/semion /opt/semion
RUN --mount=type=bind,from=source,source=/wheels,target=/wheels \
    pip install --no-deps --no-index /wheels/*.whl
RUN --mount=type=bind,from=kernels,source=/own,target=/own \
    pip install --no-deps --no-index /own/*.whl
COPY configs /usr/share/semion/configs
ENV PATH=$PATH:/opt/nvidia/nsight-systems/2025.6.3/bin \
    CUDNN_HOME=/opt/semion/lib/python3.12/site-packages/nvidia/cudnn \
    NVTE_CUDA_INCLUDE_DIR=/opt/semion/lib/python3.12/site-packages/nvidia/cu13/include
USER 10001:10001
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=60s --start-period=60s --retries=3 CMD ["semion", "doctor"]
ENTRYPOINT ["semion"]
CMD ["doctor"]
