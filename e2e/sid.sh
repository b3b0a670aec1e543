# A root of Debian sid for the clients that the machine's own Debian is too old for. Sourced by modern.sh; needs lib.sh and install.sh.
#
# Built once, kept in the suite's cache folder and never written to afterwards: sid_enter lays a throw-away layer over it. That is done
# in a mount namespace of the script's own, so that nothing stays mounted however the script ends. Sid moves: what is in the root is what
# was newest when it was built. Remove the folder to get a newer one.

SID_BASE=$E2E_CACHE/sid
SID_PACKAGES=podman,skopeo,docker.io,docker-cli,containerd,runc,crun,ca-certificates,iptables

sid_build() {
  [ ! -d "$SID_BASE" ] || return 0
  command -v mmdebstrap >/dev/null || E2E_PACKAGES="mmdebstrap:mmdebstrap" install_packages
  say "building the Debian sid root $SID_BASE: some minutes, 0.6 GB"
  SID_PARTIAL=$SID_BASE.partial.$$
  mkdir -p "$E2E_CACHE"
  # A mirror that stands still outlives the date in its Release file; its signature is checked all the same.
  nice mmdebstrap --quiet --variant=minbase --include="$SID_PACKAGES" --aptopt='Acquire::Check-Valid-Until "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    sid "$SID_PARTIAL" "$(debian_mirror)" </dev/null &&
    mv -T "$SID_PARTIAL" "$SID_BASE"
}

# The mirror that this machine's own packages come from, for sid too.
debian_mirror() {
  local found
  found=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' | grep -v security | head -n 1)
  echo "${found:-http://deb.debian.org/debian}"
}

# Runs the calling script again, in a mount namespace of its own: what it mounts is nowhere else, and gone with its last process.
sid_apart() { # SCRIPT [ARGS...]
  [ -z "${SID_APART:-}" ] || return 0
  SID_APART=1 exec unshare --mount --propagation private bash "$@"
}

# A root of its own for this run. The daemons of today need their root to be a mount point, and nothing in it shared.
sid_enter() {
  SID_ROOT=$E2E_WORK/sid/root
  mkdir -p "$E2E_WORK/sid"
  mount -t tmpfs -o mode=755 sid "$E2E_WORK/sid" && mkdir "$SID_ROOT" "$E2E_WORK/sid/upper" "$E2E_WORK/sid/work" &&
    mount -t overlay -o "lowerdir=$SID_BASE,upperdir=$E2E_WORK/sid/upper,workdir=$E2E_WORK/sid/work" sid "$SID_ROOT" &&
    mount --make-rprivate "$SID_ROOT" &&
    mount -t proc proc "$SID_ROOT/proc" &&
    mount --rbind /sys "$SID_ROOT/sys" &&
    mount --rbind /dev "$SID_ROOT/dev" &&
    mount -t tmpfs -o mode=755 run "$SID_ROOT/run" &&
    mkdir -p "$SID_ROOT$E2E_WORK" &&
    mount --bind "$E2E_WORK" "$SID_ROOT$E2E_WORK"
}

# For the script's trap.
sid_leave() {
  [ -z "${SID_PARTIAL:-}" ] || rm -rf --one-file-system "$SID_PARTIAL"
  ! mountpoint -q "$E2E_WORK/sid" || umount --recursive --lazy "$E2E_WORK/sid"
}

in_sid() (sid_exec "$@")

# To be started in the background: the process is the command itself, so that a signal reaches it.
sid_exec() {
  export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
  exec chroot "$SID_ROOT" "$@"
}

sid_version() { in_sid dpkg-query -W -f '${Version}' "$1"; } # PACKAGE
