#!/bin/sh
# Alt text for the pictures that a table lists: COLUMN of TABLE.csv has paths (for URLs, use --url-column).
# Usage: alt_text.sh TABLE.csv COLUMN MODEL
set -eu
mmbeam caption --input "$1" --path-column "$2" --output alt_text --model "$3" --max-new-tokens 40
mmbeam export alt_text alt_text.csv --columns key,caption,metadata
