#!/bin/sh
# The measurements behind docs/methods, in one result file:
#
#     sh docs/measure_methods.sh methods.db
#     python docs/method_pages.py methods.db
#
# Stopped, it goes on where it was. shapes-qwen needs torchvision (the extra `vit` brings it).
set -eu
out=${1:?give the name of a result file}

measure() {
    python -m foveate bench --seeds 3 --no-timing --out "$out" "$@"
}

measure --model shapes-llava --suite shapes --limit 200 --keep 0.5,0.25,0.17,0.11,0.06 --pruners \
    'cdpruner,divprune,fopru,globalcom2,focusui,hiprune,todre,visionzip,fastv,random@fastv,corematching,random@corematching'

# these have a schedule in place of a budget; each beside chance with that schedule
scheduled=
for method in 'tome(r=8)' 'tome(r=16)' 'tome(r=24)' 'tome(r=30)' \
    'pitome(ratio=0.9)' 'pitome(ratio=0.8)' 'pitome(ratio=0.7)' 'pitome(ratio=0.5)' \
    'transprune(ratios=(0.95,0.9,0.75))' transprune 'transprune(ratios=(0.5,0.25,0.125))' 'transprune(ratios=(0.25,0.125,0.0625))'
do
    scheduled="$scheduled,$method,random@$method"
done
measure --model shapes-llava --suite shapes --limit 200 --keep 0.5 --pruners "$scheduled"

measure --model shapes-qwen --suite screens --limit 100 --keep 0.5,0.3,0.2,0.1,0.05 --pruners focusui,pospad:focusui
measure --model shapes-qwen --suite clips --limit 100 --keep 0.5,0.25,0.12,0.06 --pruners quota
measure --model shapes-next --suite shapes-wide --limit 100 --keep 0.5,0.25,0.1 --pruners globalcom2
