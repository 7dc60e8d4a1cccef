#!/usr/bin/env bash
# Step 3: start a job from the template. It returns when Dataflow has taken the job, and not at the job's end.
#
#   PROJECT=... REGION=... BUCKET=... IMAGE=... deploy/dataflow/run.sh input='gs://BUCKET/shards/*.tar' \
#       output=gs://BUCKET/out model=openai/clip-vit-base-patch32
#
# NAME=VALUE  the parameters of metadata.json; `command=caption` captions
# PROJECT     the project that is billed
# REGION      where the workers are: that of the buckets, or every byte that is read costs transfer
# BUCKET      a bucket, without gs://, for what the job stages
# IMAGE       what build.sh pushed and template.sh was given
# TEMPLATE    what template.sh wrote (default: gs://$BUCKET/templates/mmbeam.json)
# WORKERS     as many machines at most, and from the start (default: 2)
# GPU         of each machine (default: nvidia-l4); "" for none, with DEVICE=cpu in build.sh
# DRIVER      which of Dataflow's NVIDIA drivers (default: its own choice), for example 5xx, its newest. The image's
#             torch is built for CUDA 13 and wants 580 or later
# MACHINE     their type (default: g2-standard-8, which has one L4; without GPU n2-standard-8)
# DISK        of each in GB (default: 100)
# SERVICE_ACCOUNT, SUBNETWORK  the workers' (default: the project's own); a subnetwork is used without public addresses
set -euo pipefail
: "${PROJECT:?set PROJECT (see the head of $0)}" "${REGION:?set REGION}" "${BUCKET:?set BUCKET}" "${IMAGE:?set IMAGE}"
GPU="${GPU-nvidia-l4}"
WORKERS="${WORKERS:-2}"

parameters=("$@")

# A parameter that this script sets, unless it was given.
default() {
    local given
    for given in "${parameters[@]}"; do
        if [[ "$given" == "$1="* ]]; then return; fi
    done
    parameters+=("$1=$2")
}

default sdk_container_image "$IMAGE"
default disk_size_gb "${DISK:-100}"
# A worker in which one unit takes two hours hangs: it is ended, and the unit is done again elsewhere.
default element_processing_timeout_minutes 120
if [[ -n "$GPU" ]]; then
    # One GPU for each machine, since one process of each holds the model. Dataflow installs the driver.
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
    # The job's description and its package list; a few MB, to be deleted whenever no job runs.
    --staging-location "gs://$BUCKET/staging"
    --temp-location "gs://$BUCKET/temp"
    # Lists the shards, hashes the model and plans: 1 GB of memory for 100,000 shards, beside torch.
    --launcher-machine-type n2-standard-4
    --worker-machine-type "$MACHINE"
    # All from the start: autoscaling begins with one, and learns late how long a unit takes.
    --num-workers "$WORKERS"
    --max-workers "$WORKERS"
)
if [[ -n "${SERVICE_ACCOUNT:-}" ]]; then
    flags+=(--service-account-email "$SERVICE_ACCOUNT")
fi
if [[ -n "${SUBNETWORK:-}" ]]; then
    # Needs Private Google Access there; models must be in the image or in a bucket, since the hub is out of reach.
    flags+=(--subnetwork "$SUBNETWORK" --disable-public-ips)
fi
for parameter in "${parameters[@]}"; do
    # One parameter for each flag, and in the place of the comma a separator that no value holds (a control character).
    flags+=(--parameters "^"$'\x1f'"^$parameter")
done
gcloud dataflow flex-template run "mmbeam-$(date +%Y%m%d-%H%M%S)" "${flags[@]}"
