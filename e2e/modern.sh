#!/usr/bin/env bash
# The newest clients, out of a Debian sid root: podman 5 with partial pulls of zstd:chunked images, containerd 2 with parallel ranges,
# docker 28 with both of its image stores. Heavy (the first run builds the root) and unpinned: only run when named.
SUITE=modern
. "$(dirname "$0")/lib.sh"
. "$E2E_DIR/install.sh"
. "$E2E_DIR/sid.sh"
sid_apart "$0" "$@"

stop_on_exit
trap 'stop_all; sid_leave' EXIT
sid_build || { fail "a root of Debian sid can be built"; exit 0; }
client_home
unset STORAGE_DRIVER
check "the root of Debian sid can be entered" sid_enter || exit 0
for package in podman docker.io containerd; do say "$package $(sid_version "$package")"; done

MODERN_REPO=modern/app
HUB_IMAGE=${LIBRARY_REPO#library/}:v1
MIB=1048576
LIMIT=100 # seconds for one command of a client

# In place of the suite's own: what clients of docker.io ask, and an upstream that is slow on each connection.
cache_config() { # CACHE_DIR
  cat <<TOML
listen = "127.0.0.1:$PORT_cache"
admin_listen = "127.0.0.1:$PORT_admin"
cache_dir = "$1"
default_upstream = "docker.io"
TOML
  cache_upstream docker.io "http://127.0.0.1:$PORT_anon" 10m
  cache_upstream anon.test "http://127.0.0.1:$PORT_anon" 10m
  cache_upstream slow.test "http://127.0.0.1:$PORT_fault" 10m
}

slow_start() {
  local dir=$E2E_WORK/slow
  mkdir -p "$dir"
  cat >"$dir.conf" <<NGINX
daemon off; master_process off; worker_processes 1; pid $dir/pid; error_log stderr warn;
events { worker_connections 128; }
http {
  log_format e2e '\$remote_addr - - [\$time_local] "\$request" \$status \$body_bytes_sent "\$http_range"';
  access_log /dev/stdout e2e;
  client_body_temp_path $dir/body; proxy_temp_path $dir/proxy; fastcgi_temp_path $dir/fcgi;
  uwsgi_temp_path $dir/uwsgi; scgi_temp_path $dir/scgi;
  server {
    listen 127.0.0.1:$PORT_fault;
    location / { proxy_pass http://127.0.0.1:$PORT_anon; proxy_set_header Host \$http_host; limit_rate 8m; }
  }
}
NGINX
  start_server slow "http://127.0.0.1:$PORT_fault/v2/" nginx -p "$dir" -c "$dir.conf"
}

# ── both sides' access logs ──

log_length() { wc -l <"$E2E_WORK/$1.log"; } # NAME
since() { tail -n "+$(($2 + 1))" "$E2E_WORK/$1.log"; } # NAME LINES

# GETs of blobs that the upstream answered: requests and bytes. All blobs, or one.
upstream_sent() { # NAME LINES [DIGEST]
  since "$1" "$2" | awk -v blob="/blobs/${3:-}" '
    $6 == "\"GET" && index($7, blob) && $9 ~ /^20[06]$/ { requests++; bytes += $10 }
    END { print requests + 0, bytes + 0 }'
}

# The same of what clients got from the cache, and how many of the answers were ranges.
client_got() { # LINES [DIGEST]
  answers_since "$1" | jq -r --arg blob "/blobs/${2:-}" 'select(.method == "GET" and (.path | contains($blob))) | "\(.status) \(.bytes)"' |
    awk '{ requests++; bytes += $2; parts += $1 == 206 } END { print requests + 0, bytes + 0, parts + 0 }'
}

answers_since() { since cache "$1" | jq -cR 'fromjson? | select(.target == "access")'; } # LINES
requests_without_ns() { # LINES
  answers_since "$1" | jq -r 'select(.path | contains("ns=docker.io") | not) | .path' | grep -vc '^/healthz'
}

upstream_counter() {
  curl -s "http://127.0.0.1:$PORT_admin/metrics" | awk '/^[a-z_]*upstream_bytes[a-z_]*\{/ { bytes += $2 } END { printf "%d\n", bytes }'
}

# Until the cache has fetched nothing for two seconds.
settle() {
  local before now tries
  before=$(upstream_counter)
  for tries in $(seq 20); do
    sleep 2
    now=$(upstream_counter)
    [ "$now" != "$before" ] || return 0
    before=$now
  done
}

at_most() { # WHAT GOT LIMIT
  if [ "$2" -le "$3" ]; then ok "$1: $2 of at most $3"; else fail "$1: $2, more than $3"; fi
}
at_least() { # WHAT GOT LIMIT
  if [ "$2" -ge "$3" ]; then ok "$1: $2"; else fail "$1: $2, less than $3"; fi
}

raw_manifest() { skopeo inspect --raw --tls-verify=false "docker://127.0.0.1:$PORT_anon/$MODERN_REPO:$1"; } # TAG
layer_of() { raw_manifest "$1" | jq -r '.layers[-1] | "\(.digest) \(.size)"'; } # TAG
image_digest() { echo "sha256:$(raw_manifest "$1" | sha256sum | cut -d ' ' -f 1)"; } # TAG

# ── podman ──

# A store that takes only what it lacks of an image.
lazy_store() {
  local store
  store=$(new_store)
  cat >"$store.conf" <<TOML
[storage]
driver = "overlay"
graphroot = "$store/root"
runroot = "$store/run"
[storage.options.pull_options]
enable_partial_images = "true"
TOML
  echo "$store"
}

podman5() { # STORE ARGS...
  PODMAN_IGNORE_CGROUPSV1_WARNING=1 CONTAINERS_STORAGE_CONF=$1.conf TMPDIR=$1 in_sid timeout --foreground "$LIMIT" podman "${@:2}"
}
podman_pull() { podman5 "$1" pull -q --tls-verify=false "$2"; } # STORE IMAGE

# The whole tree of an image, as one sum: a partial pull is not checked against the layer's digest.
tree_sum() { # STORE IMAGE
  local tree
  tree=$(podman5 "$1" image mount "$2") || return
  in_sid sh -c "cd '$tree' && find . -type f -print0 | sort -z | xargs -0 sha256sum" | sha256sum | cut -d ' ' -f 1
  podman5 "$1" image umount "$2" >/dev/null
}

push_chunked() { # STORE TAG
  podman5 "$1" pull -q "oci:$E2E_WORK/modern:$2" >"$1.id" &&
    podman5 "$1" push -q --tls-verify=false --compression-format zstd:chunked --force-compression \
      "$(cat "$1.id")" "docker://127.0.0.1:$PORT_anon/$MODERN_REPO:$2" &&
    raw_manifest "$2" | jq -e '.layers[-1].annotations | has("io.github.containers.zstd-chunked.manifest-checksum")'
}

direct_image() { echo "127.0.0.1:$PORT_anon/$MODERN_REPO:$1"; } # TAG
cached_image() { echo "$CACHE/anon.test/$MODERN_REPO:$1"; }     # TAG

# A store that holds an image already.
store_with() { # TAG
  local store
  store=$(lazy_store)
  podman_pull "$store" "$(direct_image "$1")" >/dev/null && echo "$store"
}

# What a client moves when nothing stands between it and the registry; leaves the tree's sum in SUM_<tag>.
measure_direct() { # TAG STORE
  local from requests bytes
  from=$(log_length anon)
  check "podman, $1: direct pull" podman_pull "$2" "$(direct_image "$1")"
  read -r requests bytes < <(upstream_sent anon "$from")
  say "podman, $1: a direct pull takes $bytes bytes of blobs in $requests requests"
  printf -v "SUM_$1" '%s' "$(tree_sum "$2" "$(direct_image "$1")")"
}

has_right_tree() { # WHAT TAG STORE
  local sum=SUM_$2
  same "$1: the pulled files are the image's" "$(tree_sum "$3" "$(cached_image "$2")")" "${!sum}"
}

# A cold cache asks of the upstream what the client asks of it; leaves that number of bytes in LAZY_ASKED.
lazy_cold() { # WHAT TAG STORE
  local cache_from upstream_from counted got asked parts requests moved
  cache_from=$(log_length cache)
  upstream_from=$(log_length anon)
  counted=$(upstream_counter)
  check "$1: cold pull" podman_pull "$3" "$(cached_image "$2")" || return
  settle
  read -r got asked parts < <(client_got "$cache_from")
  read -r requests moved < <(upstream_sent anon "$upstream_from")
  say "$1: the client took $asked bytes in $got requests ($parts ranges); the upstream sent $moved in $requests, of which" \
    "$(($(upstream_counter) - counted)) were read"
  LAZY_ASKED=$asked
  at_least "$1: it was a partial pull, range requests" "$parts" 1
  at_most "$1: bytes from upstream, 1.1 times what was asked for" "$moved" "$((asked * 11 / 10))"
  has_right_tree "$1" "$2" "$3"
}

lazy_warm() { # WHAT TAG STORE
  local cache_from
  cache_from=$(log_length cache)
  check "$1, upstream stopped: pull" podman_pull "$3" "$(cached_image "$2")" || return
  same "$1, upstream stopped: every blob was a hit" "$(verdicts "$cache_from")" hit
  has_right_tree "$1, upstream stopped" "$2" "$3"
}

verdicts() { # LINES
  answers_since "$1" | jq -r 'select(.kind == "blob") | .verdict' | sort -u | xargs
}

# What a cache that holds a part can do alone: either is right, and how it ended is told.
lazy_partly_held() { # WHAT TAG STORE
  local cache_from
  cache_from=$(log_length cache)
  if podman_pull "$3" "$(cached_image "$2")" >"$E2E_WORK/partly.log" 2>&1; then
    say "$1: a pull of what is only partly held succeeds"
    has_right_tree "$1" "$2" "$3"
    return
  fi
  say "$1: a pull of what is only partly held fails: $(tail -n 1 "$E2E_WORK/partly.log")"
  answers_since "$cache_from" | jq -r 'select(.kind == "blob")
    | "        \(.method) \(.path | split("/") | last | .[0:19]) \(.status) \(.verdict) \(.bytes) bytes \(.end) \(.why // "")"'
}

parked() { [ -n "$(find "$CACHE_DIR/parked" -type f 2>/dev/null)" ]; }

# The command succeeds, and costs at most LIMIT bytes of blobs from the upstream.
fetches_at_most() { # WHAT LIMIT COMMAND...
  local what=$1 limit=$2 from requests moved
  from=$(log_length anon)
  check "$what" "${@:3}" || return
  settle
  read -r requests moved < <(upstream_sent anon "$from")
  at_most "$what: bytes from upstream, in $requests requests" "$moved" "$limit"
}

copy_whole() { # TAG
  timeout --foreground "$LIMIT" skopeo copy -q --src-tls-verify=false "docker://$(cached_image "$1")" "dir:$(new_store)"
}

with_podman() {
  local stores=() tag
  for tag in lazy1 lazy2 lazy3 lazy4; do
    check "podman: pushes $tag as zstd:chunked" push_chunked "$(lazy_store)" "$tag" || return
  done
  measure_direct lazy1 "$(lazy_store)"
  measure_direct lazy2 "$(store_with lazy1)"
  measure_direct lazy4 "$(store_with lazy3)"
  for tag in 0 1 2 3 4 5; do stores[tag]=$(store_with lazy1); done

  cache_start
  lazy_cold "podman, empty store" lazy1 "$(lazy_store)"
  upstream_stop anon
  lazy_warm "podman, empty store" lazy1 "$(lazy_store)"
  upstream_start anon
  cache_stop
  with_a_part "podman, with the one before" "${stores[@]:0:4}"
  with_an_outage "podman, with the one before" "${stores[@]:4:2}"
  # Most layers are no larger than this one, and are fetched whole unless they were made for pieces.
  cache_start
  lazy_cold "podman, 12 MiB, with the one before" lazy4 "$(store_with lazy3)"
  check "podman, 12 MiB: skopeo copies the whole image" copy_whole lazy4
  upstream_stop anon
  lazy_warm "podman, 12 MiB, after a whole pull" lazy4 "$(lazy_store)"
  upstream_start anon
  cache_stop
}

# A part of a layer is held, then all of it.
with_a_part() { # WHAT STORE...
  local what=$1
  shift
  cache_start
  lazy_cold "$what" lazy2 "$1"
  upstream_stop anon
  lazy_partly_held "$what, upstream stopped at once" lazy2 "$2"
  upstream_start anon
  check "$what: the part is parked" wait_until 60 parked
  fetches_at_most "$what, part parked: pull" "$((LAZY_ASKED * 11 / 10))" podman_pull "$3" "$(cached_image lazy2)"
  has_right_tree "$what, part parked" lazy2 "$3"
  check "$what: skopeo copies the whole image" copy_whole lazy2
  upstream_stop anon
  lazy_warm "$what, after a whole pull" lazy2 "$4"
  lazy_warm "podman, empty store, after a whole pull" lazy2 "$(lazy_store)"
  check "$what: every file under blobs/ hashes to its name" hashes_match
  upstream_start anon
  cache_stop
}

# The upstream is away when somebody asks for a layer of which a part is parked: that part is still there afterwards.
with_an_outage() { # WHAT STORE...
  local what=$1 size
  shift
  read -r _ size < <(layer_of lazy2)
  cache_start
  check "$what: cold pull, once more" podman_pull "$1" "$(cached_image lazy2)"
  check "$what: the part is parked" wait_until 60 parked
  upstream_stop anon
  lazy_partly_held "$what, part parked, upstream stopped" lazy2 "$2"
  upstream_start anon
  # An upstream that failed is left alone for a second.
  fetches_at_most "$what, part parked, upstream back: skopeo copies the whole image" "$((size - 2 * MIB))" \
    wait_until 20 copy_whole lazy2
  check "$what: every file under blobs/ hashes to its name" hashes_match
  cache_stop
}

# ── containerd ──

containerd2_start() { # with a new store
  local store
  store=$(new_store)
  CONTAINERD_SOCKET=$store/containerd.sock
  cat >"$store.toml" <<TOML
version = 3
root = "$store/root"
state = "$store/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
address = "$CONTAINERD_SOCKET"
[plugins."io.containerd.internal.v1.opt"]
path = "$store/opt"
[plugins."io.containerd.transfer.v1.local"]
max_concurrent_downloads = 4
concurrent_layer_fetch_buffer = $((8 * MIB))
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux/$(own_arch)"
snapshotter = "native"
TOML
  start containerd sid_exec containerd --config "$store.toml"
  wait_until 30 ctr2 version && return
  tail -n 20 "$E2E_WORK/containerd.log"
  return 1
}
ctr2() { in_sid timeout --foreground "$LIMIT" ctr -a "$CONTAINERD_SOCKET" "$@"; }
ctr2_pull() { ctr2 images pull --hosts-dir "$E2E_WORK/hosts" --snapshotter native "$1"; } # IMAGE
ctr2_digest() { ctr2 images ls "name==$1" | awk 'NR == 2 { print $3 }'; }              # IMAGE

ctr2_pulled() { # WHAT IMAGE DIGEST
  check "$1: containerd starts, empty" containerd2_start || return
  check "$1" ctr2_pull "$2" && same "$1: the digest is the upstream's" "$(ctr2_digest "$2")" "$3"
  stop containerd
}

parallel_cold() { # NAME TAG LOG
  local what="containerd, $1 $2" cache_from upstream_from counted layer size got asked parts requests moved
  read -r layer size < <(layer_of "$2")
  cache_from=$(log_length cache)
  upstream_from=$(log_length "$3")
  counted=$(upstream_counter)
  ctr2_pulled "$what, cold" "$1.test/$MODERN_REPO:$2" "$(image_digest "$2")"
  settle
  read -r got asked parts < <(client_got "$cache_from" "$layer")
  read -r requests moved < <(upstream_sent "$3" "$upstream_from" "$layer")
  say "$what: the layer has $size bytes; the client took $asked in $got requests ($parts ranges); the upstream sent $moved in $requests," \
    "all that was read is $(($(upstream_counter) - counted))"
  at_least "$what: ranges were asked for in parallel" "$parts" 2
  if [ "$size" -le $((32 * MIB)) ]; then
    same "$what: the upstream was asked once" "$requests" 1
  fi
  at_most "$what: bytes from upstream, the layer's size + 2 %" "$moved" "$((size * 102 / 100))"
}

with_containerd() {
  local small large name
  small=$(image_digest small)
  large=$(image_digest large)
  for name in anon slow; do containerd_hosts "$name.test" "http://$CACHE"; done
  for name in anon slow; do
    cache_start
    [ "$name" = anon ] || slow_start
    parallel_cold "$name" small "$name"
    parallel_cold "$name" large "$name"
    upstream_stop anon
    stop slow
    ctr2_pulled "containerd, $name small, warm, upstream stopped" "$name.test/$MODERN_REPO:small" "$small"
    ctr2_pulled "containerd, $name large, warm, upstream stopped" "$name.test/$MODERN_REPO:large" "$large"
    check "containerd, $name: every file under blobs/ hashes to its name" hashes_match
    check "containerd, $name: nothing left in spool/" wait_until 10 spool_empty
    upstream_start anon
    cache_stop
  done
}

# ── docker ──

dockerd28_start() { # classic|containerd: with a new store
  local store driver=vfs snapshotter=false
  store=$(new_store)
  [ "$1" = classic ] || { driver=native snapshotter=true; }
  DOCKER_SOCKET=$E2E_WORK/docker28.sock
  jq -n --arg store "$store" --arg mirror "http://$CACHE" --arg socket "unix://$DOCKER_SOCKET" --arg driver "$driver" \
    --argjson snapshotter "$snapshotter" '{
    "data-root": ($store + "/data"), "exec-root": ($store + "/exec"), "pidfile": ($store + "/pid"), "hosts": [$socket],
    "storage-driver": $driver, "iptables": false, "ip6tables": false, "bridge": "none", "registry-mirrors": [$mirror],
    "features": { "containerd-snapshotter": $snapshotter }
  }' >"$store.json"
  start dockerd28 sid_exec dockerd --config-file "$store.json"
  wait_until 60 docker28 info && return
  tail -n 20 "$E2E_WORK/dockerd28.log"
  return 1
}
docker28() { in_sid timeout --foreground "$LIMIT" docker -H "unix://$DOCKER_SOCKET" "$@"; }
docker28_has_index_digest() {
  docker28 image inspect --format '{{join .RepoDigests "\n"}}' "$HUB_IMAGE" | grep -F "@$(index_digest v1)"
}

docker28_pulled() { # STORE_KIND WHAT
  local from
  check "docker, $1: dockerd starts, empty" dockerd28_start "$1" || return
  from=$(log_length cache)
  check "docker, $1: $2" docker28 pull -q "$HUB_IMAGE" &&
    check "docker, $1: $2: the digest is the upstream's" docker28_has_index_digest
  stop dockerd28
  [ "$1" = classic ] || same "docker, $1: $2: requests without ?ns=docker.io" "$(requests_without_ns "$from")" 0
}

with_docker() {
  local kind
  for kind in classic containerd; do
    cache_start
    docker28_pulled "$kind" "cold pull"
    upstream_stop anon
    docker28_pulled "$kind" "warm pull into an empty store, upstream stopped"
    check_store "docker, $kind" v1 "$(own_arch)"
    upstream_start anon
    cache_stop
  done
}

# ── all of them ──

CACHE=127.0.0.1:$PORT_cache
python3 "$E2E_DIR/make_modern_image.py" "$E2E_WORK/modern" "$(command -v busybox)" "$(own_arch)" || die "no image"
upstream_start anon
for tag in small large; do push "oci:$E2E_WORK/modern:$tag" "$MODERN_REPO:$tag"; done
with_podman
with_containerd
with_docker
exit 0
