# Installs what the suite needs and the machine lacks. Sourced by run and demo; needs say() and die() of lib.sh.
# Debian packages come from the machine's own sources, Go programs as modules of a fixed version into a folder outside the checkout.

E2E_CACHE=${E2E_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/oci-remote-cache-e2e}
REGCTL_VERSION=v0.11.7
CRANE_VERSION=v0.22.1

# command:package. Not busybox: any busybox would count then, and only a static one runs in an image that holds nothing else.
E2E_PACKAGES="
  podman:podman skopeo:skopeo dockerd:docker.io docker:docker.io containerd:containerd ctr:containerd
  docker-registry:docker-registry nginx:nginx-light htpasswd:apache2-utils runc:runc crun:crun
  docker-credential-pass:golang-docker-credential-helpers pass:pass gpg:gnupg tinyproxy:tinyproxy microsocks:microsocks
  curl:curl jq:jq openssl:openssl python3:python3 ip:iproute2"

install_packages() { # [COMMAND...]: what these need; everything when none is named
  local pair missing=()
  for pair in $E2E_PACKAGES; do
    [ $# -eq 0 ] || [[ " $* " == *" ${pair%%:*} "* ]] || continue
    command -v "${pair%%:*}" >/dev/null || [[ " ${missing[*]} " == *" ${pair##*:} "* ]] || missing+=("${pair##*:}")
  done
  dpkg-query -W -f '${Status}' busybox-static 2>/dev/null | grep -q 'ok installed' || missing+=(busybox-static)
  [ "${#missing[@]}" -gt 0 ] || return 0
  say "installing packages: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq || die "apt-get update failed"
  apt-get install -y -qq --no-install-recommends ca-certificates "${missing[@]}" >/dev/null || die "cannot install: ${missing[*]}"
}

# go_tool NAME PACKAGE VERSION: builds it once; fails when there is no Go or the build fails.
go_tool() {
  local dir=$E2E_CACHE/$1-$3
  [ ! -x "$dir/$1" ] || return 0
  command -v go >/dev/null || return 1
  say "building $1 $3"
  mkdir -p "$dir"
  GOBIN=$dir GOFLAGS=-mod=mod go install "$2@$3"
}

# Puts regctl and crane on PATH. Clients that are not there are skipped by their scripts.
install_go_tools() {
  export PATH="$E2E_CACHE/regctl-$REGCTL_VERSION:$E2E_CACHE/crane-$CRANE_VERSION:$PATH"
  go_tool regctl github.com/regclient/regclient/cmd/regctl "$REGCTL_VERSION" || say "no regctl: it needs Go"
  go_tool crane github.com/google/go-containerregistry/cmd/crane "$CRANE_VERSION" || say "no crane: it needs Go"
}

# The product, built where the checkout's cargo puts it, unless E2E_BIN names one.
build_product() {
  E2E_BIN=${E2E_BIN:-${CARGO_TARGET_DIR:-$E2E_ROOT/target}/release/oci-remote-cache}
  export E2E_BIN
  [ ! -x "$E2E_BIN" ] || return 0
  say "building the release binary"
  (cd "$E2E_ROOT" && cargo build --release) || die "the release build failed"
}
