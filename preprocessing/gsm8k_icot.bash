#!/usr/bin/env bash
# Make data/gsm8k_{train,validation,test}.json from the iCoT files of GSM8K. Run from anywhere:
#
#   bash preprocessing/gsm8k_icot.bash                     all training rows (88 MB download)
#   TARGET_SIZE=50000 bash gsm8k_icot.bash                 50,000 of them, drawn by --seed (0)
#   GSM8K_ICOT_DIR=~/gsm8k bash gsm8k_icot.bash            from a local folder, no download
#
# TARGET_SIZE     number of training rows to draw; unset or empty: all
# GSM8K_ICOT_DIR  folder with train.txt, valid.txt and, if there is one, test.txt
# GSM8K_ICOT_URL  a mirror: the three files are fetched from $GSM8K_ICOT_URL/<name> instead
# PYTHON          interpreter, 3.10 or newer, standard library only (default: python3)
#
# Arguments are passed on to gsm8k_icot.py (--seed, --output_dir). Downloads are kept in data/raw
# and used again; one appears there under its name only after its sha256 was found right.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail

unset CDPATH
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=$(dirname "$here")/data
convert=("${PYTHON:-python3}" "$here/gsm8k_icot.py")
origin=da03/Internalize_CoT_Step_by_Step/e06a32ee5e4cd117171daeb4755d2a97ece62761/data/gsm8k

# gsm8k_icot.py checks this too, against the rows there are; here a slip costs no download.
if [[ ! ${TARGET_SIZE:-1} =~ ^[1-9][0-9]*$ ]]; then
    echo "TARGET_SIZE is '$TARGET_SIZE'; give a whole number from 1, or none for all" >&2
    exit 2
fi

download() {  # address, name
    local part=$data/raw/$2.$$.part
    echo "downloading $1"
    curl --fail --location --silent --show-error --retry 5 --connect-timeout 30 \
        --speed-limit 1 --speed-time 60 --output "$part" "$1" || {
        local code=$?
        echo "$1 was not downloaded; run again, or set GSM8K_ICOT_DIR" >&2
        exit "$code"
    }
    "${convert[@]}" --verify "${2%.txt}" "$part"
    mv "$part" "$data/raw/$2"
}

if [[ -n ${GSM8K_ICOT_DIR:-} ]]; then
    folder=$GSM8K_ICOT_DIR
else
    folder=$data/raw
    mkdir -p "$folder"
    trap 'rm -f "$data"/raw/*.$$.part' EXIT
    for name in train.txt valid.txt test.txt; do
        [[ ! -e $folder/$name ]] || continue
        # train.txt is in Git LFS: the raw address would give a pointer, the media address the file.
        base=https://raw.githubusercontent.com/$origin
        [[ $name != train.txt ]] || base=https://media.githubusercontent.com/media/$origin
        download "${GSM8K_ICOT_URL:-$base}/$name" "$name"
    done
    convert+=(--published)
fi

convert+=(--train "$folder/train.txt" --valid "$folder/valid.txt" --output_dir "$data")
if [[ -e $folder/test.txt ]]; then
    convert+=(--test "$folder/test.txt")
else
    echo "no test.txt in $folder: data/gsm8k_test.json not written"
fi
[[ -z ${TARGET_SIZE:-} ]] || convert+=(--target_size "$TARGET_SIZE")
"${convert[@]}" "$@"
