#!/bin/sh
# Make an archive searchable: pictures in a zip, a tar or a folder, by a model that has images and texts in one space.
# Usage: archive.sh ARCHIVE MODEL QUERY
set -eu
mmbeam embed --input "$1" --output vectors --model "$2" --modalities image
mmbeam search vectors "$3" --top 12
mmbeam search vectors "$3" --top 48 --html found.html
