#!/usr/bin/env bash
# Runs the README's two commands, as the last commit has them, on a Debian made for it in a folder.
# It is the first process of namespaces of its own: its mounts and its processes end with it.
set -euo pipefail
if (($$ != 1)); then
    echo "This mounts things: run it as 'nox -s debian' does." >&2
    exit 1
fi
trap 'exit 130' INT TERM # which a first process ignores otherwise
suite=$1 root=$2

# Packages come from where this machine's do.
# shellcheck disable=SC2016  # it is for apt to expand
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Label: Debian' | head -n 1)
if [[ -z $mirror ]]; then
    echo "apt knows no mirror of Debian: is this Debian, and did 'apt-get update' succeed?" >&2
    exit 1
fi
(
    eval "$(apt-config shell http_proxy Acquire::http::Proxy https_proxy Acquire::https::Proxy)"
    export http_proxy https_proxy
    packages=ca-certificates,git,python3,python3-venv
    debootstrap --variant=minbase --include="$packages" "$suite" "$root" "$mirror"
)
apt-config dump | grep '^Acquire::' >"$root/etc/apt/apt.conf.d/host"
for file in /etc/{hosts,pip.conf,ssl/certs/ca-certificates.crt} ~/.pip/pip.conf ~/.config/pip/pip.conf; do
    [[ ! -f $file ]] || install -D --mode=644 "$file" "$root$file"
done
mapfile -t settings < <(env | grep -iE '^(pip_[a-z_]+|[a-z]+_proxy|ssl_cert_(file|dir))=')

git clone --quiet . "$root/kontext-async"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount --rbind /dev "$root/dev"
# Waited for in the background, so that the trap runs at once: apt would keep an interrupt to itself.
chroot "$root" env -i "${settings[@]}" HOME="$HOME" DEBIAN_FRONTEND=noninteractive \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    /kontext-async/.ci/run readme &
wait $!
