#!/bin/bash
# The whole way by hand, from the login node: the templates of this folder, each after the one before.
#   slurm/pipeline.sh dataset=imagenet model=resnet18,resnet50
# sbatch reads your centre's partition and account from SBATCH_PARTITION and SBATCH_ACCOUNT.
set -euo pipefail
here=$(dirname "$0")

data=() models=0 # the settings of the stages of data, for which a list of models means nothing
for word in "$@"; do
    case $word in
        model=*) models=$(tr -dc , <<<"$word" | wc -c) ;; # the highest index: one less than models
        *) data+=("$word") ;;
    esac
done

after=()
send() { # OPTIONS TEMPLATE SETTINGS …: submit, and let what comes next wait for it
    local job
    job=$(sbatch --parsable "${after[@]}" "$@")
    job=${job%%;*}
    echo "$job  ${*}"
    # Without the second option a job whose need failed would stay pending for ever.
    after=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
}

for stage in download process upload; do
    send "$here/$stage.sbatch" "${data[@]}"
done
if ((models > 0)); then
    send "--array=0-$models" "$here/sweep.sbatch" "$@"
else
    send "$here/train.sbatch" "$@"
fi
