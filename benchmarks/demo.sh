#!/bin/sh
# The whole line on images that the project draws: train on clean "web" images, search degraded camera images.
# Usage: demo.sh FOLDER, with the three commands on PATH. Takes under ten minutes on two cores.
set -eu
out=$1

say() { printf '\n\033[1m$ %s\033[0m\n' "$*" >&2; "$@"; }

rm -rf "$out"
mkdir -p "$out"
say clipret-train data scenes "$out/web" --count 3000 --style web --seed 11
say clipret-train data scenes "$out/camera" --count 1500 --style surveillance --seed 12
say clipret-train fit "$out/web/captions.csv" --model clipret-small --set augment=surveillance --set crop_area=0.25 --epochs 40 --out "$out/run"
say clipret-export "$out/run" "$out/bundle" --fp16
say clipret-search index "$out/bundle" "$out/camera/images" "$out/gallery"
say clipret-search eval "$out/gallery" "$out/camera/queries.csv" --html "$out/results.html"
say clipret-search query "$out/gallery" "a red bus" "一辆黄色的卡车" -k 5
printf '\nOpen %s to see what was found.\n' "$out/results.html" >&2
