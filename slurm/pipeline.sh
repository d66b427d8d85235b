#!/bin/bash
# Submit all stages from the login node: the templates in this folder, each depending on the previous one.
#   slurm/pipeline.sh dataset=imagenet model=resnet18,resnet50
# sbatch reads your centre's partition and account from SBATCH_PARTITION and SBATCH_ACCOUNT.
set -euo pipefail
here=$(dirname "$0")

data=() models=0 # settings of the data stages, which do not accept a list of models
for argument in "$@"; do
    case $argument in
        model=*) models=$(tr -dc , <<<"$argument" | wc -c) ;; # highest array index: number of models minus one
        *) data+=("$argument") ;;
    esac
done

dependency=()
submit() { # OPTIONS TEMPLATE SETTINGS …: submit a job; the next one depends on it
    local job
    job=$(sbatch --parsable "${dependency[@]}" "$@")
    job=${job%%;*}
    echo "$job  ${*}"
    # Without the second option a job whose dependency failed would stay pending forever.
    dependency=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
}

for stage in download process upload; do
    submit "$here/$stage.sbatch" "${data[@]}"
done
if ((models > 0)); then
    submit "--array=0-$models" "$here/sweep.sbatch" "$@"
else
    submit "$here/train.sbatch" "$@"
fi
