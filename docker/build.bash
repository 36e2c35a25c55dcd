#!/usr/bin/env bash
# Build the image that docker/train.bash runs.
set -euo pipefail
unset CDPATH # with it, cd prints where it went

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
nvidia=nvcr.io/nvidia/pytorch:26.07-py3

usage() {
    cat <<END
Usage: docker/build.bash [--cpu|--gpu] [--base IMAGE] [options of \`docker build\`]

Builds the image cifar100:cpu or cifar100:gpu; the latter by default where nvidia-smi finds a GPU.

  --cpu         on a slim Python image
  --gpu         on $nvidia
  --base IMAGE  on this image: another of NVIDIA's PyTorch images (25.03 or newer), or one by its digest
  --help        this text

Everything after these goes to \`docker build\`, such as --pull or --no-cache. What the container writes belongs to the user
who builds. If PIP_CONFIG_FILE names a file, pip reads it while it installs, and the image does not keep it: for a mirror,
or for an index with PyTorch for CPUs alone, some gigabytes smaller.
END
}

fail() {
    printf 'docker/build.bash: %s\n' "$2" >&2
    exit "$1"
}

kind=cpu
if nvidia-smi --list-gpus >/dev/null 2>&1; then
    kind=gpu
fi
base=
while [[ $# -gt 0 ]]; do
    case $1 in
        --cpu | --gpu) kind=${1#--} ;;
        --base)
            [[ -n ${2:-} ]] || fail 2 "--base: name an image, such as $nvidia"
            base=$2
            shift
            ;;
        -h | --help)
            usage
            exit
            ;;
        *) break ;;
    esac
    shift
done
if [[ -z $base && $kind == gpu ]]; then
    base=$nvidia
fi

command -v docker >/dev/null || fail 1 "docker is not installed, or not on the PATH"
answer=$(docker version 2>&1) ||
    fail 1 "docker does not answer: is it started, and may you use it? It says: ${answer##*$'\n'}"

# The container's user is never root: with sudo it is the user behind it.
uid=${SUDO_UID:-$(id -u)}
gid=${SUDO_GID:-$(id -g)}
if [[ $uid == 0 ]]; then
    uid=1000 gid=1000
fi

arguments=(--file "$root/docker/Dockerfile" --tag "cifar100:$kind")
arguments+=(--build-arg "HOST_UID=$uid" --build-arg "HOST_GID=$gid")
if [[ -n $base ]]; then
    arguments+=(--build-arg "BASE=$base")
fi
if [[ -n ${PIP_CONFIG_FILE:-} ]]; then
    [[ -f $PIP_CONFIG_FILE ]] || fail 2 "PIP_CONFIG_FILE = $PIP_CONFIG_FILE: there is no such file"
    arguments+=(--secret "id=pip.conf,src=$PIP_CONFIG_FILE")
fi
# BuildKit reads Dockerfile.dockerignore and knows secrets; the older builder does neither.
export DOCKER_BUILDKIT=1
exec docker build "${arguments[@]}" "$@" "$root"
