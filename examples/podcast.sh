#!/bin/sh
# Transcribe a folder of episodes, and write subtitles and plain text. MODEL is a Whisper checkpoint.
# Usage: podcast.sh EPISODES MODEL
set -eu
mmbeam caption --input "$1" --output transcripts --model "$2" --task transcribe
mmbeam export transcripts subtitles --format vtt
mmbeam export transcripts texts --format txt
