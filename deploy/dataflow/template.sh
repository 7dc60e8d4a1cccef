#!/usr/bin/env bash
# Step 2: write the template, a small file in Cloud Storage that names the image and describes the parameters.
#
#   PROJECT=... BUCKET=... IMAGE=REPOSITORY/mmbeam:TAG deploy/dataflow/template.sh
#
# PROJECT   the project that is billed
# BUCKET    a bucket, without gs://, for the template and the files that jobs stage
# IMAGE     the image that build.sh pushed
# TEMPLATE  address of the template (default: gs://$BUCKET/templates/mmbeam.json)
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${PROJECT:?set PROJECT (see the head of $0)}" "${BUCKET:?set BUCKET}" "${IMAGE:?set IMAGE}"

flags=(
    --project "$PROJECT"
    # The launcher's machine runs this image, and FLEX_TEMPLATE_PYTHON_PY_FILE in it: deploy/dataflow/launcher.py.
    --image "$IMAGE"
    --sdk-language PYTHON
    # The parameters. Dataflow refuses a job with unknown parameters or without the required ones.
    --metadata-file deploy/dataflow/metadata.json
)
gcloud dataflow flex-template build "${TEMPLATE:-gs://$BUCKET/templates/mmbeam.json}" "${flags[@]}"
