#!/bin/sh
# Write reports from a picture and its notes: embed both, train a fusion model on the vectors, and generate from them.
# SHARDS hold a picture, its notes (.txt) and, for training, the report in the field "report" of .json.
# A generated report is a draft for a physician, not a finding.
# Usage: medical_report.sh SHARDS ENCODER EPOCHS
set -eu
mmbeam embed --input "$1" --output features --model "$2"
mmbeam train --input features --output reporter --captions report --epochs "$3"
mmbeam caption --input features --output reports --model reporter
mmbeam evaluate reports --reference report
mmbeam export reports reports.jsonl --columns key,caption
