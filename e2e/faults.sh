#!/usr/bin/env bash
# The faults that break a client's pull from a bare registry: directly they fail, through the cache they do not.
SUITE=faults
. "$(dirname "$0")/lib.sh"
client_home
stop_on_exit

CONFIG=$(digests v1 "$(own_arch)" | sed -n 3p)
LARGE=$(digests v1 "$(own_arch)" | tail -n 1)
DIRECT=127.0.0.1:$PORT_fault
THROUGH=$CACHE/fault.test

fault_start() { # FAULT PATTERN
  : >"$E2E_WORK/fault.log"
  start_server fault "http://$DIRECT/v2/" python3 "$E2E_DIR/fault_proxy.py" "$PORT_fault" "http://127.0.0.1:$PORT_anon" "$1" "$2"
}
faults_seen() { grep -c ' fault$' "$E2E_WORK/fault.log"; }

skopeo_before() { STORE=$(new_store); }
skopeo_pull() { skopeo copy -q --src-tls-verify=false "docker://$1/$REPO:v1" "dir:$STORE"; } # WHERE
podman_before() { STORE=$(new_store); }
podman_pull() { podman_in "$STORE" pull -q --tls-verify=false "$1/$REPO:v1"; }
docker_before() { dockerd_start; }
docker_pull() { docker_cli pull -q "$1/$REPO:v1"; }
docker_after() { dockerd_stop; }
containerd_before() { # WHERE: the one host that is asked for fault.test
  containerd_hosts fault.test "http://${1%%/*}"
  containerd_start
}
containerd_pull() { ctr_pull "fault.test/$REPO:v1"; }
containerd_after() { containerd_stop; }

after() { ! declare -F "$1_after" >/dev/null || "$1_after"; } # CLIENT: for those that have something to end

pair() { # CLIENT WHAT FAULT PATTERN
  local client=$1 what="$1, $2"
  fault_start "$3" "$4"
  "${client}_before" "$DIRECT"
  refuses "$what: a bare registry's pull fails" "${client}_pull" "$DIRECT"
  check "$what: and without the fault it succeeds" "${client}_pull" "$DIRECT"
  after "$client"
  stop fault

  cache_start
  fault_start "$3" "$4"
  "${client}_before" "$THROUGH"
  check "$what: through the cache it succeeds at once" "${client}_pull" "$THROUGH"
  after "$client"
  same "$what: the upstream did fail once" "$(faults_seen)" 1
  check "$what: every file under blobs/ hashes to its name" hashes_match
  stop fault cache
}

# Both ways start from nothing: a fault proxy of its own each, the cache a new folder, the client a new store.
upstream_start anon
pair skopeo "blob truncated once" truncate "/blobs/$LARGE"
pair podman "blob truncated once" truncate "/blobs/$LARGE"
pair skopeo "manifest 503 once" status:503 /manifests/
pair containerd "manifest 503 once" status:503 /manifests/
for status in 500 502 503; do
  pair skopeo "blob $status once" "status:$status" /blobs/
  pair containerd "blob $status once" "status:$status" /blobs/
done
# dockerd forgives a layer that, and not the config.
pair docker "config blob 429 once" status:429 "/blobs/$CONFIG"
exit 0
