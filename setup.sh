# Sourced by the scripts. Sets PYTHON to an interpreter that has the packages of requirements.txt:
# the user's own where it has them all, else one in .venv, made or completed here. Nothing outside
# this folder is changed.

has_packages() {
    "$1" - <<'PYTHON' 2>/dev/null
import importlib.metadata, sys
assert sys.version_info >= (3, 11)
for line in open("requirements.txt"):
    name, _, version = line.strip().partition("==")
    if version:  # 2.13.0+cpu is a build of 2.13.0
        assert importlib.metadata.version(name).split("+")[0] == version
PYTHON
}

find_python() {
    local candidate
    for candidate in .venv/bin/python python3 python; do
        if has_packages "$candidate"; then
            PYTHON=$candidate
            return
        fi
    done
    echo "setting up .venv with the packages of requirements.txt (once; several GB with CUDA)"
    local base=""
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    if [[ -z $base ]]; then
        echo "error: Python 3.11 or newer is needed and was not found on PATH" >&2
        return 2
    fi
    # without pip: left by an interrupted start, or by a system that lacked python3-venv
    .venv/bin/python -m pip --version >/dev/null 2>&1 || "$base" -m venv .venv
    .venv/bin/python -m pip install --quiet --requirement requirements.txt
    PYTHON=.venv/bin/python
}

# where_it_is ARGUMENT: the whole path of a YAML that stands where the user does, in CALLED_FROM; any
# other argument as it is.
where_it_is() {
    local argument=$1
    [[ $argument == *.y*ml && -f $CALLED_FROM/$argument ]] && argument=$CALLED_FROM/$argument
    printf '%s' "$argument"
}

# launch EXPECT DEFAULT_YAML [YAML ...] [KEY=VALUE ...]: check all input, then train. One process runs
# by itself and keeps its exit code; torchrun, for several, turns every failure into 1.
launch() {
    local expect=$1 default=$2
    shift 2
    if [[ ! ${NPROC_PER_NODE:-1} =~ ^[1-9][0-9]*$ ]]; then
        echo "error: NPROC_PER_NODE is '$NPROC_PER_NODE'; give the number of processes, from 1" >&2
        exit 2
    fi
    local argument first=""
    for argument in "$@"; do
        shift
        set -- "$@" "$(where_it_is "$argument")"
        if [[ -z $first && $argument == *.y*ml && ! $argument =~ ^[[:alpha:]_][[:alnum:]_]*= ]]; then
            first=$argument
        fi
    done
    if [[ -z $first ]]; then
        first=$default
        set -- "$default" "$@"
    fi
    find_python
    # micro-batches differ in shape: growing segments keep the memory of a GPU in one piece
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
    if [[ $(basename "$first") == quickstart.yaml ]]; then
        bash preprocessing/quickstart.sh "$PYTHON"
    fi
    "$PYTHON" run.py "$@" --check --expect "$expect"
    for argument in "$@"; do
        case $argument in --check | --help | -h) exit 0 ;; esac # said once
    done

    local gpus
    gpus=$("$PYTHON" -c 'from engine.launch import count_gpus; print(count_gpus())')
    NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
    if ((gpus > 0 && NPROC_PER_NODE > gpus)); then
        echo "error: NPROC_PER_NODE is $NPROC_PER_NODE, but $gpus GPUs can be used here" >&2
        exit 2
    fi
    if ((NPROC_PER_NODE == 1)); then
        exec "$PYTHON" run.py "$@" --expect "$expect"
    fi
    # workers that are asked to stop finish their step and save: more than the usual 30 s
    # the host's own name, which torchrun would ask for, is often not known to any DNS
    exec "$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nnodes 1 \
        --nproc_per_node "$NPROC_PER_NODE" --shutdown-timeout 900 \
        run.py "$@" --expect "$expect"
}
