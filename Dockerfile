# NVIDIA's PyTorch image brings torch, Transformer Engine and Apex, built for each other.
ARG PYTORCH_RELEASE=25.06
FROM nvcr.io/nvidia/pytorch:${PYTORCH_RELEASE}-py3

WORKDIR /opt/megatron_opdlm
COPY pyproject.toml setup.py README.md LICENSE NOTICE ./
COPY megatron_opdlm ./megatron_opdlm

# What the image has stays as it is: the versions of its compiled packages become constraints, so pip fails rather than
# replace one (the image's own PIP_CONSTRAINT file applies as well).
RUN pip list --format=freeze \
        | grep -iE '^(torch|torchvision|triton|transformer[-_]engine|apex|flash[-_]attn|numpy)==' \
        > /opt/image-constraints.txt \
    && pip install --no-cache-dir --constraint /opt/image-constraints.txt . \
    && python -c "import importlib.metadata as m; print([m.version(p) for p in ('torch', 'transformer_engine', 'apex', 'megatron-core')])"

COPY examples ./examples
COPY docs ./docs
WORKDIR /workspace
