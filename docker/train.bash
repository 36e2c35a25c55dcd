#!/usr/bin/env bash
# Train in a container that docker/build.bash has built.
set -euo pipefail
unset CDPATH # with it, cd prints where it went

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'END'
Usage: docker/train.bash [--cpu|--gpu] PRESET [options of `cifar100 train`]
       docker/train.bash [--cpu|--gpu] PRESET --teacher RUN [options of `cifar100 distill`]

Trains the preset, one of `presets/` or a YAML file, in the image cifar100:gpu where nvidia-smi finds a GPU, else in
cifar100:cpu. Exit codes are those of `cifar100 train`. Ctrl-C saves, and `docker/train.bash PRESET --resume last` goes on.

  --cpu, --gpu  choose
  --help        this text

These folders are the container's, too; the variables name others, and are understood as by cifar100 itself:

  CIFAR100_DATA_DIR    data sets; default: ~/.cache/cifar100
  CIFAR100_RUNS_DIR    runs, which are runs/... inside; default: runs in this repository
  CIFAR100_CACHE_DIR   a teacher's logits; default: ~/.cache/cifar100/computed
  HF_HOME              timm's weights; default: ~/.cache/huggingface

A run or file that an option names (--teacher, --weights) is one of runs/..., as in --teacher runs/NAME/TIME-seed0.
Other commands: docker compose --file docker/compose.yaml run --rm cpu COMMAND (or gpu).
END
}

fail() {
    printf 'docker/train.bash: %s\n' "$2" >&2
    exit "$1"
}

kind=cpu
if nvidia-smi --list-gpus >/dev/null 2>&1; then
    kind=gpu
fi
while [[ ${1:-} == -* ]]; do
    case $1 in
        --cpu | --gpu) kind=${1#--} ;;
        -h | --help)
            usage
            exit
            ;;
        *) fail 2 "$1: options of \`cifar100 train\` come after the preset; --help tells of this script's own" ;;
    esac
    shift
done
[[ $# -gt 0 ]] || fail 2 "name a preset, such as quickstart; \`ls $root/presets\` shows them all"
preset=$1
shift

# CSV, as docker reads it: a path may hold commas and quotes.
bind() {
    printf 'type=bind,"source=%s",target=%s%s' "${1//\"/\"\"}" "$2" "${3:-}"
}

mounts=()
if [[ $preset != */* && -f $root/presets/$preset.yaml ]]; then
    : # the wheel has it
elif [[ -f $preset && $preset == *.y*ml ]]; then
    name=$(basename "$preset")
    [[ $name =~ ^[A-Za-z0-9._-]+$ ]] || fail 2 "$preset: a preset's file needs a name of letters, digits, '.', '_', '-'"
    mounts+=(--mount "$(bind "$(cd "$(dirname "$preset")" && pwd)/$name" "/cifar100/presets/$name" ,readonly)")
    preset=presets/$name
else
    fail 2 "$preset: there is neither a preset nor a YAML file of this name; \`ls $root/presets\` shows the presets"
fi

command -v docker >/dev/null || fail 1 "docker is not installed, or not on the PATH"
answer=$(docker version 2>&1) ||
    fail 1 "docker does not answer: is it started, and may you use it? It says: ${answer##*$'\n'}"
docker image inspect "cifar100:$kind" >/dev/null 2>&1 ||
    fail 1 "there is no image cifar100:$kind yet; build it: $root/docker/build.bash --$kind"

# Docker would make a missing folder itself, as root; and root's would be closed to the container's user (see build.bash).
share() {
    set -- "${1/#\~\//$HOME/}" "$2" # as cifar100 itself reads it
    if [[ ! -d $1 ]]; then
        mkdir -p "$1" || fail 1 "$1: cannot be made"
        if [[ $EUID == 0 ]]; then
            chown "${SUDO_UID:-1000}:${SUDO_GID:-1000}" "$1"
        fi
    fi
    mounts+=(--mount "$(bind "$(cd "$1" && pwd)" "$2")")
}
cache=${XDG_CACHE_HOME:-$HOME/.cache}
share "${CIFAR100_DATA_DIR:-$cache/cifar100}" /cifar100/data
share "${CIFAR100_RUNS_DIR:-$root/runs}" /cifar100/runs
share "${CIFAR100_CACHE_DIR:-$cache/cifar100/computed}" /cifar100/cache
share "${HF_HOME:-$cache/huggingface}" /cifar100/huggingface

# --init passes Ctrl-C and SIGTERM on to the tool, which finishes its epoch's files: give it a minute.
arguments=(--rm --init --stop-timeout 60)
# Training has no workers. `bench` has some for its plain way, and NCCL's ranks meet in shared memory: 64 MB, docker's
# default, are too little for these.
arguments+=(--shm-size 1g)
if [[ $kind == gpu ]]; then
    arguments+=(--gpus all)
fi
if [[ -t 0 && -t 1 ]]; then
    arguments+=(--interactive --tty)
fi
for variable in NO_COLOR FORCE_COLOR OMP_NUM_THREADS; do
    arguments+=(--env "$variable") # without a value here, docker sets none there
done
command=train
for argument in "$@"; do
    case $argument in
        --teacher | --teacher=*) command=distill ;;
    esac
done
exec docker run "${arguments[@]}" "${mounts[@]}" "cifar100:$kind" "$command" --preset "$preset" "$@"
