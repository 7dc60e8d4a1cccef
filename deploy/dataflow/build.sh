#!/usr/bin/env bash
# Step 1: build the image that the launcher and the workers run, and push it to where Dataflow can pull it.
#
#   IMAGE=REPOSITORY/mmbeam:TAG [DEVICE=cuda|cpu] [MODELS="ORG/NAME@REVISION ..."] deploy/dataflow/build.sh
#
# IMAGE   its name in a repository of Artifact Registry, with a tag of its own for each build: workers of a running
#         job pull it when they start, and must find the one that the job was launched with
# DEVICE  what its torch is for (default: cuda)
# MODELS  hub models to put into it, so that no worker asks the hub (default: none)
# HF_TOKEN, if it is set, is used for MODELS, and does not stay in the image.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${IMAGE:?set IMAGE=REPOSITORY/mmbeam:TAG (see the head of $0)}"

flags=(
    --file deploy/docker/Dockerfile
    # As root, and with the launcher of Flex Templates beside Beam's harness.
    --target dataflow
    # Dataflow's machines with GPUs are of this kind, whatever the machine is that builds.
    --platform linux/amd64
    --build-arg "DEVICE=${DEVICE:-cuda}"
    --build-arg "MODELS=${MODELS:-}"
    --tag "$IMAGE"
)
if [[ -n "${HF_TOKEN:-}" ]]; then
    # A secret of the build: read from the environment, written to no layer.
    flags+=(--secret "id=hf_token,env=HF_TOKEN")
fi
# BuildKit builds only the stages that the target needs, and knows secrets.
DOCKER_BUILDKIT=1 docker build "${flags[@]}" .
docker push "$IMAGE"
