#!/bin/bash
#: Turn the built images into squash files for pyxis, where every node sees them.
#:
#:   containers/import.sh /shared/images [spark-nemo-trainer spark-nemo-rollout]
#:
#: Needs docker (with the images built) and enroot on this machine. Put the printed paths into slurm/site.env.
set -euo pipefail
case ${1:---help} in -h|--help) sed -n 's/^#: \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
folder=$1
shift
images=("$@")
(( ${#images[@]} )) || images=(spark-nemo-trainer spark-nemo-rollout)
for program in enroot docker; do
    command -v "$program" >/dev/null || { echo "$program is not installed here" >&2; exit 1; }
done
mkdir -p "$folder"
for image in "${images[@]}"; do
    # Under another name until it is complete: a job must never start from half an image.
    rm -f "$folder/.$image.sqsh"
    enroot import --output "$folder/.$image.sqsh" "dockerd://$image"
    mv "$folder/.$image.sqsh" "$folder/$image.sqsh"
    echo "$folder/$image.sqsh"
done
