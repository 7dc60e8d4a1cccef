#!/usr/bin/env bash
# Step 1: build the image that the launcher and the workers run, and push it to where Dataflow can pull it.
#
#   IMAGE=REPOSITORY/mmbeam:TAG [DEVICE=cuda|cpu] [MODELS="ORG/NAME@REVISION ..."] deploy/dataflow/build.sh
#
# IMAGE   the image's name in an Artifact Registry repository, with a new tag for each build: workers of a running job
#         pull it when they start, and must get the image that the job was launched with
# DEVICE  the build of torch (default: cuda)
# MODELS  hub models to store in the image, so that no worker contacts the hub (default: none)
# HF_TOKEN, if set, is used to download MODELS; the image does not contain it.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${IMAGE:?set IMAGE=REPOSITORY/mmbeam:TAG (see the head of $0)}"

flags=(
    --file deploy/docker/Dockerfile
    # As root, and with the launcher of Flex Templates beside Beam's harness.
    --target dataflow
    # The platform of Dataflow's machines, independent of the machine that builds the image.
    --platform linux/amd64
    --build-arg "DEVICE=${DEVICE:-cuda}"
    --build-arg "MODELS=${MODELS:-}"
    --tag "$IMAGE"
)
if [[ -n "${HF_TOKEN:-}" ]]; then
    # A build secret, read from the environment. No layer contains it.
    flags+=(--secret "id=hf_token,env=HF_TOKEN")
fi
# BuildKit builds only the stages that the target needs, and supports secrets.
DOCKER_BUILDKIT=1 docker build "${flags[@]}" .
docker push "$IMAGE"
