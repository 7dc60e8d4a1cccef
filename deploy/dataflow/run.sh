#!/usr/bin/env bash
# Step 3: start a job from the template. Returns when Dataflow has accepted the job, not at the end of the job.
#
#   PROJECT=... REGION=... BUCKET=... IMAGE=... deploy/dataflow/run.sh input='gs://BUCKET/shards/*.tar' \
#       output=gs://BUCKET/out model=openai/clip-vit-base-patch32
#
# NAME=VALUE  the parameters of metadata.json; `command=caption` captions
# PROJECT     the project that is billed
# REGION      region of the workers; use that of the buckets, or reading is billed as transfer
# BUCKET      a bucket, without gs://, for the files that the job stages
# IMAGE       the image of build.sh and template.sh
# TEMPLATE    the file that template.sh wrote (default: gs://$BUCKET/templates/mmbeam.json)
# WORKERS     most machines at a time (default: 2)
# START       machines at the start (default: WORKERS); with fewer, Dataflow adds more as it estimates the rest
# GPU         of each machine (default: nvidia-l4); "" for none, with DEVICE=cpu in build.sh
# DRIVER      NVIDIA driver that Dataflow installs (default: its default version); 5xx is its newest. The image's torch is
#             built for CUDA 13 and needs 580 or later
# MACHINE     machine type (default: g2-standard-8, which has one L4; without GPU n2-standard-8)
# DISK        per machine, in GB (default: 100)
# SERVICE_ACCOUNT, SUBNETWORK  of the workers (default: the project's default); with SUBNETWORK they have no public addresses
set -euo pipefail
: "${PROJECT:?set PROJECT (see the head of $0)}" "${REGION:?set REGION}" "${BUCKET:?set BUCKET}" "${IMAGE:?set IMAGE}"
GPU="${GPU-nvidia-l4}"
WORKERS="${WORKERS:-2}"

parameters=("$@")

# Set a parameter, unless the user has set it.
default() {
    local parameter
    for parameter in "${parameters[@]}"; do
        if [[ "$parameter" == "$1="* ]]; then return; fi
    done
    parameters+=("$1=$2")
}

default sdk_container_image "$IMAGE"
default disk_size_gb "${DISK:-100}"
# A worker in which one unit takes two hours hangs: Dataflow ends it and repeats the unit elsewhere.
default element_processing_timeout_minutes 120
if [[ -n "$GPU" ]]; then
    # One GPU per machine, since one process per machine holds the model. Dataflow installs the driver.
    default device cuda
    driver="install-nvidia-driver${DRIVER:+:$DRIVER}"
    default dataflow_service_options "worker_accelerator=type:$GPU;count:1;$driver"
    MACHINE="${MACHINE:-g2-standard-8}"
else
    default device cpu
    MACHINE="${MACHINE:-n2-standard-8}"
fi

flags=(
    --project "$PROJECT"
    --region "$REGION"
    --template-file-gcs-location "${TEMPLATE:-gs://$BUCKET/templates/mmbeam.json}"
    # The job description and its package list: a few MB that may be deleted when no job is running.
    --staging-location "gs://$BUCKET/staging"
    --temp-location "gs://$BUCKET/temp"
    # The launcher lists the shards, hashes the model and plans: 1 GB of memory for 100,000 shards, in addition to torch.
    --launcher-machine-type n2-standard-4
    --worker-machine-type "$MACHINE"
    # All workers from the start: autoscaling begins with one, and estimates the duration of a unit too late.
    --num-workers "${START:-$WORKERS}"
    --max-workers "$WORKERS"
)
if [[ -n "${SERVICE_ACCOUNT:-}" ]]; then
    flags+=(--service-account-email "$SERVICE_ACCOUNT")
fi
if [[ -n "${SUBNETWORK:-}" ]]; then
    # The subnetwork needs Private Google Access. Workers cannot reach the hub: store models in the image or in a bucket.
    flags+=(--subnetwork "$SUBNETWORK" --disable-public-ips)
fi
for parameter in "${parameters[@]}"; do
    # One parameter per flag. The separator is a control character instead of a comma, since values may contain commas.
    flags+=(--parameters "^"$'\x1f'"^$parameter")
done
gcloud dataflow flex-template run "mmbeam-$(date +%Y%m%d-%H%M%S)" "${flags[@]}"
