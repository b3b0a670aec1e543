# What every test script shares: reporting, processes, the four upstreams, the cache, and what is asked of its folder.
# Sourced. `run` and `demo` set up the work folder and the ports (e2e_init); client scripts find them in the environment.
#
# Words: KIND is one of anon, basic, token, redirect: four doors to one registry folder. Its key in the cache is KIND.test.

set -u
export LC_ALL=C no_proxy=127.0.0.1,localhost NO_PROXY=127.0.0.1,localhost
E2E_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
E2E_DIR=$E2E_ROOT/e2e
KINDS="anon basic token redirect"
REPO=demo/app
LIBRARY_REPO=library/oci-remote-cache-e2e # what dockerd asks its mirror for; nobody has published that name
UPSTREAM_USER=puller
UPSTREAM_PASSWORD=sesame-e2e
TOKEN_LIFE=4 # seconds
export TOKEN_STATUS=${E2E_WORK:-}/token.status # while it is there, the token server answers everybody with the status in it

# ── reporting ──

say() { printf -- '-- %s\n' "$*"; }
die() { printf 'e2e: %s\n' "$*" >&2; exit 1; }

# $SUITE, the script's name, leads every line. Lines are kept for the sum at the end.
report() {
  printf '%-7s %s: %s\n' "$1" "$SUITE" "$2"
  printf '%s\n' "$1" >>"$E2E_WORK/results"
}
ok() { report ok "$1"; }
skip() { report skipped "$1"; }
fail() { # WHAT [FILE]: a failed check, with the end of a log below it
  report FAIL "$1"
  [ -z "${2:-}" ] || tail -n 15 "$2" | sed 's/\x1b\[[0-9;]*m//g; s/^/        | /'
}

# check WHAT COMMAND...: one line; the command's output is shown when it fails.
check() {
  local what=$1 log=$E2E_WORK/check.log
  shift
  if "$@" >"$log" 2>&1; then ok "$what"; return 0; fi
  fail "$what" "$log"
  return 1
}

# refuses WHAT COMMAND...: the command has to fail.
refuses() {
  local what=$1 log=$E2E_WORK/check.log
  shift
  if "$@" >"$log" 2>&1; then fail "$what" "$log"; else ok "$what"; fi
}

same() { # WHAT GOT WANTED
  if [ "$2" = "$3" ]; then ok "$1"; return; fi
  printf 'got    %s\nwanted %s\n' "$2" "$3" >"$E2E_WORK/check.log"
  fail "$1" "$E2E_WORK/check.log"
}

# ── work folder and ports ──

e2e_init() {
  # A short name: podman refuses a run folder of more than 50 characters, and a socket's path has an end too.
  E2E_WORK=$(mktemp -d /tmp/orc-e2e.XXXXXX)
  export E2E_WORK TOKEN_STATUS=$E2E_WORK/token.status
  local names="anon basic token auth redirect cdn backing cache admin fault proxy socks" ports name
  # Below the range that the kernel gives to outgoing connections, so that none of those can take one of ours.
  ports=$(python3 - $names <<'PY'
import random, socket, sys
kept = []
while len(kept) < len(sys.argv) - 1:
    s = socket.socket()
    try:
        s.bind(("127.0.0.1", random.randrange(20000, 32000)))
        kept.append(s)
    except OSError:
        s.close()
print(*(s.getsockname()[1] for s in kept))
PY
  ) || die "no free ports"
  set -- $ports
  for name in $names; do
    export "PORT_$name=$1"
    shift
  done
}

# Every client finds its settings below the work folder, never the machine's or the caller's own.
client_home() {
  export HOME=$E2E_WORK/home
  unset XDG_RUNTIME_DIR XDG_CONFIG_HOME XDG_DATA_HOME XDG_CACHE_HOME REGISTRY_AUTH_FILE DOCKER_CONFIG DOCKER_HOST
  export CONTAINERS_CONF=$HOME/containers.conf CONTAINERS_REGISTRIES_CONF=$HOME/registries.conf STORAGE_DRIVER=vfs
  export REGCTL_CONFIG=$HOME/regctl.json
  mkdir -p "$HOME/.config/containers"
  printf '{"default":[{"type":"insecureAcceptAnything"}]}\n' >"$HOME/.config/containers/policy.json"
  printf 'unqualified-search-registries = []\n' >"$CONTAINERS_REGISTRIES_CONF"
  # runc, cgroupfs and limits that a container without CAP_SYS_RESOURCE may set too.
  cat >"$CONTAINERS_CONF" <<'TOML'
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
TOML
}

# Called by the trap of run and demo, after every script has stopped its own processes.
e2e_remove() {
  local mount
  awk -v work="$E2E_WORK/" 'index($2, work) == 1 { print $2 }' /proc/self/mounts | sort -r | while read -r mount; do
    umount -l "$mount"
  done
  rm -rf --one-file-system "$E2E_WORK"
}

# ── processes: started, waited for and stopped by pid ──

declare -A PIDS=()

start() { # NAME COMMAND...; the log is $E2E_WORK/NAME.log, added to at each start
  local name=$1
  shift
  "$@" >>"$E2E_WORK/$name.log" 2>&1 </dev/null &
  PIDS[$name]=$!
}

stop() { # NAME...: SIGTERM, and SIGKILL after 30 s
  local name pid tries
  for name in "$@"; do
    pid=${PIDS[$name]:-}
    [ -n "$pid" ] || continue
    kill "$pid" 2>/dev/null
    for tries in $(seq 300); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    [ "$tries" -lt 300 ] || kill -KILL "$pid" 2>/dev/null
    wait "$pid" 2>/dev/null
    unset "PIDS[$name]"
  done
}

stop_all() { stop "${!PIDS[@]}"; }
stop_on_exit() {
  trap stop_all EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

wait_until() { # SECONDS COMMAND...
  local tries=$(($1 * 10))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$tries" -gt 0 ] || return 1
    tries=$((tries - 1))
    sleep 0.1
  done
}

answers() { curl -sk -o /dev/null --max-time 2 "$1"; } # any status will do

start_server() { # NAME URL COMMAND...: started and answering, or the suite cannot go on
  local name=$1 url=$2
  shift 2
  start "$name" "$@"
  wait_until 20 answers "$url" && kill -0 "${PIDS[$name]}" 2>/dev/null && return
  tail -n 20 "$E2E_WORK/$name.log" >&2
  die "$name does not answer at $url"
}

# ── the upstreams ──

registry_start() { # NAME PORT [MORE YAML]
  local config=$E2E_WORK/$1.yml
  cat >"$config" <<YAML
version: 0.1
log: { level: warn, accesslog: { disabled: false } }
storage: { filesystem: { rootdirectory: $E2E_WORK/registry }, maintenance: { uploadpurging: { enabled: false } } }
http: { addr: "127.0.0.1:$2", secret: e2e, relativeurls: true }
${3:-}
YAML
  start_server "$1" "http://127.0.0.1:$2/v2/" docker-registry serve "$config"
}

# Once for a run: the password file and the token server's key pair.
upstream_secrets() {
  htpasswd -Bbn -C 5 "$UPSTREAM_USER" "$UPSTREAM_PASSWORD" >"$E2E_WORK/htpasswd"
  chmod 644 "$E2E_WORK/htpasswd"
  openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=e2e \
    -keyout "$E2E_WORK/token.key" -out "$E2E_WORK/token.crt" 2>/dev/null || die "openssl made no key"
}

upstream_start() { # KIND...
  local kind
  for kind in "$@"; do "upstream_start_$kind"; done
}

upstream_start_anon() { registry_start anon "$PORT_anon"; }

upstream_start_basic() {
  registry_start basic "$PORT_basic" "auth: { htpasswd: { realm: e2e, path: $E2E_WORK/htpasswd } }"
}

upstream_start_token() {
  start_server auth "http://127.0.0.1:$PORT_auth/" python3 "$E2E_DIR/token_server.py" \
    "$PORT_auth" "$E2E_WORK/token.key" "$E2E_WORK/token.crt" "$UPSTREAM_USER" "$UPSTREAM_PASSWORD" "$TOKEN_LIFE"
  registry_start token "$PORT_token" "auth: { token: { realm: \"http://127.0.0.1:$PORT_auth/token\", service: e2e,
    issuer: e2e, rootcertbundle: $E2E_WORK/token.crt } }"
}

# A registry that asks for a password and sends blobs off to another origin, which does not take one: as S3 does.
upstream_start_redirect() {
  registry_start backing "$PORT_backing"
  mkdir -p "$E2E_WORK/nginx"
  cat >"$E2E_WORK/nginx.conf" <<NGINX
daemon off; master_process off; worker_processes 1; pid $E2E_WORK/nginx/pid; error_log stderr warn;
events { worker_connections 512; }
http {
  access_log /dev/stdout;
  client_body_temp_path $E2E_WORK/nginx/body; proxy_temp_path $E2E_WORK/nginx/proxy; fastcgi_temp_path $E2E_WORK/nginx/fcgi;
  uwsgi_temp_path $E2E_WORK/nginx/uwsgi; scgi_temp_path $E2E_WORK/nginx/scgi;
  server {
    listen 127.0.0.1:$PORT_redirect;
    auth_basic e2e; auth_basic_user_file $E2E_WORK/htpasswd;
    proxy_set_header Host \$http_host; proxy_set_header Authorization "";
    location / { proxy_pass http://127.0.0.1:$PORT_backing; }
    # try_files and not a bare return: the password is asked for first.
    location ~ ^/v2/.+/blobs/ { try_files /nonexistent @elsewhere; }
    location @elsewhere { return 307 http://127.0.0.1:$PORT_cdn\$request_uri; }
  }
  server {
    listen 127.0.0.1:$PORT_cdn;
    if (\$http_authorization) { return 400; }
    location / { proxy_pass http://127.0.0.1:$PORT_backing; }
  }
}
NGINX
  start_server nginx "http://127.0.0.1:$PORT_redirect/v2/" nginx -p "$E2E_WORK/nginx" -c "$E2E_WORK/nginx.conf"
}

upstream_stop() { # KIND...
  local kind
  for kind in "$@"; do
    case $kind in
      token) stop token auth ;;
      redirect) stop nginx backing ;;
      *) stop "$kind" ;;
    esac
  done
}

# The log that has one line for each request for bytes.
upstream_log() { # KIND
  case $1 in redirect) echo "$E2E_WORK/backing.log" ;; *) echo "$E2E_WORK/$1.log" ;; esac
}

# Makes the image and pushes it once; every kind serves the same folder.
seed() {
  local layout=$E2E_WORK/image tag
  say "seeding the registry: two tags, two platforms, five layers each"
  python3 "$E2E_DIR/make_image.py" "$layout" "$(command -v busybox)" "$(dpkg --print-architecture)" || die "no image"
  upstream_start anon
  for tag in v1 v2; do
    push "oci:$layout:$tag" "$REPO:$tag"
  done
  push "oci:$layout:v1" "$LIBRARY_REPO:v1"
  upstream_stop anon
}

push() { # SOURCE NAME:TAG
  skopeo copy -q --all --dest-tls-verify=false "$1" "docker://127.0.0.1:$PORT_anon/$2" || die "cannot push $2"
}

# What a client of this platform must have: the index first, then manifest, config, layers.
digests() { cat "$E2E_WORK/image.$1.$2.digests"; } # TAG all|ARCH
index_digest() { digests "$1" all | head -n 1; }   # TAG
own_arch() { dpkg --print-architecture; }

# ── the cache ──

CACHE=127.0.0.1:${PORT_cache:-0}

cache_upstream() { # KEY URL TAG_TTL [CREDENTIALS]
  printf '[upstreams."%s"]\nurl = "%s"\ntag_ttl = "%s"\n' "$1" "$2" "$3"
  [ -z "${4:-}" ] || printf 'credentials = %s\n' "$4"
}

# redirect.test has a tag_ttl that passes between two pulls, so that stale tags are served too.
cache_config() { # CACHE_DIR
  local credentials="{ username = \"$UPSTREAM_USER\", password = \"$UPSTREAM_PASSWORD\" }"
  cat <<TOML
listen = "127.0.0.1:$PORT_cache"
admin_listen = "127.0.0.1:$PORT_admin"
cache_dir = "$1"
default_upstream = "anon.test"
TOML
  cache_upstream anon.test "http://127.0.0.1:$PORT_anon" 10m
  cache_upstream basic.test "http://127.0.0.1:$PORT_basic" 10m "$credentials"
  cache_upstream token.test "http://127.0.0.1:$PORT_token" 10m "$credentials"
  cache_upstream redirect.test "http://127.0.0.1:$PORT_redirect" 1s "$credentials"
  cache_upstream fault.test "http://127.0.0.1:$PORT_fault" 10m
}

# The cache with a new, empty folder: CACHE_DIR.
cache_start() {
  CACHE=127.0.0.1:$PORT_cache
  CACHE_DIR=$(mktemp -d "$E2E_WORK/cache.XXXXXX")
  (umask 077 && cache_config "$CACHE_DIR" >"$CACHE_DIR.toml") # it holds a password
  start_server cache "http://$CACHE/healthz" "$E2E_BIN" serve --config "$CACHE_DIR.toml"
}
cache_stop() { stop cache; }

# ── what must hold in the cache's folder ──

check_store() { # LABEL TAG all|ARCH
  check "$1: the image's blobs are under blobs/" holds "$2" "$3"
  check "$1: every file under blobs/ hashes to its name" hashes_match
  check "$1: nothing left in spool/" wait_until 10 spool_empty || find "$CACHE_DIR/spool" -type f
}

holds() { # TAG all|ARCH
  local digest hex missing=0
  while read -r digest; do
    hex=${digest#*:}
    [ -f "$CACHE_DIR/blobs/${digest%%:*}/${hex:0:2}/$hex" ] || { echo "missing: $digest"; missing=1; }
  done < <(digests "$1" "$2")
  return "$missing"
}

hashes_match() {
  local file algorithm sum wrong=0
  while read -r file; do
    algorithm=${file#"$CACHE_DIR/blobs/"}
    algorithm=${algorithm%%/*}
    sum=$("${algorithm}sum" "$file")
    [ "${sum%% *}" = "${file##*/}" ] || { echo "wrong bytes: $file"; wrong=1; }
  done < <(find "$CACHE_DIR/blobs" -type f)
  return "$wrong"
}

spool_empty() { [ -z "$(find "$CACHE_DIR/spool" -type f 2>/dev/null)" ]; }

# ── clients that need more than a line ──

# A new, empty folder for a client's store, with a short path.
new_store() { mktemp -d "$E2E_WORK/s.XXXX"; }

podman_in() { # STORE ARGS...
  podman --root "$1/root" --runroot "$1/run" "${@:2}"
}

# Whether this machine can run a container at all is found out with an image that never saw the cache.
probe_layer() {
  tar -C "$(dirname "$(command -v busybox)")" -c busybox
}

dockerd_start() { # [MIRROR]: with a new store
  local store mirror=${1:-}
  store=$(new_store)
  DOCKER_SOCKET=$E2E_WORK/docker.sock
  jq -n --arg store "$store" --arg mirror "$mirror" --arg socket "unix://$DOCKER_SOCKET" '{
    "data-root": ($store + "/data"), "exec-root": ($store + "/exec"), "pidfile": ($store + "/pid"), "hosts": [$socket],
    "storage-driver": "vfs", "iptables": false, "bridge": "none",
    "registry-mirrors": (if $mirror == "" then [] else [$mirror] end)
  }' >"$store.json"
  start dockerd dockerd --config-file "$store.json"
  wait_until 60 docker_cli info && return
  tail -n 20 "$E2E_WORK/dockerd.log"
  return 1
}
dockerd_stop() { stop dockerd; }
docker_cli() { docker -H "unix://$DOCKER_SOCKET" "$@"; }

containerd_start() { # with a new store
  local store
  store=$(new_store)
  CONTAINERD_SOCKET=$store/containerd.sock
  cat >"$store.toml" <<TOML
version = 2
root = "$store/root"
state = "$store/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
address = "$CONTAINERD_SOCKET"
[plugins."io.containerd.internal.v1.opt"]
path = "$store/opt"
TOML
  start containerd containerd --config "$store.toml"
  wait_until 30 ctr_cli version && return
  tail -n 20 "$E2E_WORK/containerd.log"
  return 1
}
containerd_stop() { stop containerd; }
ctr_cli() { ctr -a "$CONTAINERD_SOCKET" "$@"; }

# containerd_hosts HOST URL [LINE]: a hosts.toml for that host. Nobody listens at its `server`, so that nothing is tried twice.
containerd_hosts() {
  mkdir -p "$E2E_WORK/hosts/$1"
  cat >"$E2E_WORK/hosts/$1/hosts.toml" <<TOML
server = "http://127.0.0.1:1"
[host."$2"]
capabilities = ["pull", "resolve"]
${3:-}
TOML
}
ctr_pull() { ctr_cli images pull --hosts-dir "$E2E_WORK/hosts" --snapshotter native "$1"; }
