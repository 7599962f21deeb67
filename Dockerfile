# docker build -t onebase .
# docker run --gpus all -p 8000:8000 -e ONEBASE_API_KEY -e ONEBASE_ADMIN_KEY -v onebase:/data onebase PATH_OR_HUB_ID

# The image sets what the NVIDIA container toolkit looks for. CUDA's libraries come with torch's own packages, so the
# small "base" variant is enough; the host's driver has to be new enough for the CUDA version that torch brings.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

# Triton compiles a stub with gcc and Python's headers when a kernel first runs, and the CPU's kernels are compiled for
# the machine at the first start: they are needed at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/onebase
ENV PATH=/opt/onebase/bin:$PATH

# constraints.txt holds the versions of the last full test run, which used torch's CPU build. The package index has the
# CUDA build under the same version number, and that is what is installed here. For an image without CUDA, install torch
# from torch's CPU index first. torch has a layer of its own: it is large and seldom changes.
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt torch
COPY . ./
RUN pip install --no-cache-dir --constraint constraints.txt .

# The server needs no rights but to write its data. A named volume at /data takes this owner over; a bind mount has to
# be writable for uid 10001. The home folder is for caches of compiled kernels.
RUN useradd --uid 10001 --create-home onebase && install --directory --owner=onebase /data
USER onebase
WORKDIR /data

# Inside a container, loopback is reachable by nobody. An address other than loopback wants ONEBASE_API_KEY and
# ONEBASE_ADMIN_KEY, or ONEBASE_INSECURE=true: without either the server refuses to start.
ENV ONEBASE_HOST=0.0.0.0 \
    ONEBASE_DATA_DIR=/data/onebase \
    HF_HOME=/data/huggingface
EXPOSE 8000

# /health answers while the model is still being loaded, so that a long start is no failure; /ready is for load balancers.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('ONEBASE_PORT', '8000') + '/health', timeout=3)"]

# SIGTERM lets requests in flight finish for 30 seconds: give `docker stop` as long (--time 40).
ENTRYPOINT ["onebase", "serve"]
