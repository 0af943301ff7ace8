#!/usr/bin/env bash
# One GPU, one command, MINUTES in all, no network (`make gpu` calls it): checks the engine there, measures it, then makes
# as many runs of the small sweep as the minutes allow, and adds their rows to results/small.
#
#   MINUTES=12   after which everything stops; what is finished by then is kept
#   DATA=DIR     the folder of the public data
#   WHEELS=DIR   wheels of the packages that are missing here; one too large to carry comes in parts, NAME.whl.part-*
#   JOBS=4       runs at a time
#   ARGS=...     further options of the runs
#   DEVICE=cuda  or cpu, for a trial
#   OUT=DIR      where benchmarks, rows and tables go (default: outputs/gpu)
#   RUNS=DIR     where runs go (default: results/runs)
#   RESULTS=DIR  whose rows are added to (default: results)
#   PYTHON=...   an interpreter with PyTorch for the card
set -uo pipefail
cd "$(dirname "$0")/.."
export DEVICE=${DEVICE:-cuda}
deadline=$(($(date +%s) + ${MINUTES:-12} * 60))
python=${PYTHON:-python3} out=${OUT:-outputs/gpu} results=${RESULTS:-results} runs=${RUNS:-results/runs}
mkdir -p "$out"

within() { # run a command until its share of what is left has gone: within PERCENT COMMAND...
    local left=$((($(date +%s) - deadline) * -$1 / 100))
    shift
    if ((left < 20)); then
        echo "no time left for: $*"
        return 1
    fi
    echo "== up to $left s: $*"
    timeout --signal=INT --kill-after=20 "$left" "$@"
}

if [[ -n ${WHEELS:-} ]]; then # PyTorch, which fits the card, is here already
    rm -f "$out"/*.whl # of a start that was cut off
    for part in "$WHEELS"/*.whl.part-*; do
        [[ -e $part ]] && cat "$part" >>"$out/$(basename "${part%.part-*}")"
    done
    "$python" -m pip install --quiet --no-index --no-deps $(ls "$WHEELS"/*.whl "$out"/*.whl 2>/dev/null) || exit 1
    rm -f "$out"/*.whl
fi

"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'
within 20 "$python" -m pytest -q -n 0 tests/test_gpu.py 2>&1 | tail -40
[[ $DEVICE == cuda ]] && within 50 "$python" -m massdpo.benchmark gpu "$out"
within 95 "$python" run.py -m sweeps=small size=small "trainer.device=$DEVICE" trainer.eval_batch_size=64 logger=none \
    "runs_dir=$runs" ${DATA:+"data_dir=$DATA"} ${ARGS:-} hydra/launcher=joblib "hydra.launcher.n_jobs=${JOBS:-4}"
"$python" -m massdpo.report small --runs "$runs" --out "$results" >"$out/report.txt" && cp "$results"/small/{rows.csv,prompts.npz,means.md} "$out"
