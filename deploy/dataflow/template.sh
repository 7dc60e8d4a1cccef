#!/usr/bin/env bash
# Step 2: write the template, a small file in Cloud Storage that names the image and describes the parameters.
#
#   PROJECT=... BUCKET=... IMAGE=REPOSITORY/mmbeam:TAG deploy/dataflow/template.sh
#
# PROJECT   the project that is billed
# BUCKET    a bucket, without gs://, for the template and what jobs stage
# IMAGE     what build.sh pushed
# TEMPLATE  where the template goes (default: gs://$BUCKET/templates/mmbeam.json)
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${PROJECT:?set PROJECT (see the head of $0)}" "${BUCKET:?set BUCKET}" "${IMAGE:?set IMAGE}"

flags=(
    --project "$PROJECT"
    # The launcher's machine runs this image, and in it FLEX_TEMPLATE_PYTHON_PY_FILE: deploy/dataflow/launcher.py.
    --image "$IMAGE"
    --sdk-language PYTHON
    # The parameters: Dataflow refuses a job with others, or without those that are required.
    --metadata-file deploy/dataflow/metadata.json
)
gcloud dataflow flex-template build "${TEMPLATE:-gs://$BUCKET/templates/mmbeam.json}" "${flags[@]}"
