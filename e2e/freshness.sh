#!/usr/bin/env bash
# What real clients see of an upstream's bad days: stopped, rate limited, a token server that refuses everybody, a tag moved and deleted.
# docker, podman, containerd and regctl each keep pulling what they may, and see the new digest once the old one is past its time.
SUITE=freshness
. "$(dirname "$0")/lib.sh"
client_home
stop_on_exit

TAG=v1
TTL=2 # seconds
UPSTREAMS="plain.test limited.test guarded.test"

# ── a cache with short-lived tags, and its upstreams ──

# plain.test is a registry that lets things be deleted; limited.test is nginx in front of it, which says 429 while the file $LIMIT is
# there; guarded.test has the token server.
LIMIT=$E2E_WORK/limit

cache_config() { # CACHE_DIR, in place of lib.sh's
  local credentials="{ username = \"$UPSTREAM_USER\", password = \"$UPSTREAM_PASSWORD\" }"
  cat <<TOML
listen = "127.0.0.1:$PORT_cache"
admin_listen = "127.0.0.1:$PORT_admin"
cache_dir = "$1"
default_upstream = "plain.test"
TOML
  cache_upstream plain.test "http://127.0.0.1:$PORT_anon" ${TTL}s
  cache_upstream limited.test "http://127.0.0.1:$PORT_redirect" ${TTL}s
  cache_upstream guarded.test "http://127.0.0.1:$PORT_token" ${TTL}s "$credentials"
}

plain_start() {
  local config=$E2E_WORK/plain.yml
  cat >"$config" <<YAML
version: 0.1
log: { level: warn, accesslog: { disabled: false } }
storage: { filesystem: { rootdirectory: $E2E_WORK/registry }, delete: { enabled: true } }
http: { addr: "127.0.0.1:$PORT_anon", secret: e2e, relativeurls: true }
YAML
  start_server plain "http://127.0.0.1:$PORT_anon/v2/" docker-registry serve "$config"
}

limiter_start() {
  mkdir -p "$E2E_WORK/limiter"
  cat >"$E2E_WORK/limiter.conf" <<NGINX
daemon off; master_process off; worker_processes 1; pid $E2E_WORK/limiter/pid; error_log stderr warn;
events { worker_connections 512; }
http {
  access_log /dev/stdout;
  client_body_temp_path $E2E_WORK/limiter/body; proxy_temp_path $E2E_WORK/limiter/proxy; fastcgi_temp_path $E2E_WORK/limiter/fcgi;
  uwsgi_temp_path $E2E_WORK/limiter/uwsgi; scgi_temp_path $E2E_WORK/limiter/scgi;
  server {
    listen 127.0.0.1:$PORT_redirect;
    location / {
      if (-f $LIMIT) { return 429; }
      add_header ratelimit-limit "100;w=21600"; add_header ratelimit-remaining "76;w=21600";
      proxy_set_header Host \$http_host;
      proxy_pass http://127.0.0.1:$PORT_anon;
    }
    error_page 429 @limited;
    location @limited { default_type application/json; add_header Retry-After 3 always; return 429 '{"errors":[{"code":"TOOMANYREQUESTS"}]}'; }
  }
}
NGINX
  start_server limiter "http://127.0.0.1:$PORT_redirect/v2/" nginx -p "$E2E_WORK/limiter" -c "$E2E_WORK/limiter.conf"
}

expire() { sleep $((TTL + 1)); }
move() { skopeo copy -q --all --dest-tls-verify=false "oci:$E2E_WORK/image:$1" "docker://127.0.0.1:$PORT_anon/$REPO:$TAG"; }
asked() { curl -s -o /dev/null -D - -H 'Accept: */*' "http://$CACHE/v2/$1/$REPO/manifests/$TAG"; } # UPSTREAM: the answer's head
status_of() { asked "$1" | awk 'NR == 1 { print $2 }'; }
says() { asked "$1" | grep -i "$2"; }                                                       # UPSTREAM PATTERN
metric() { curl -s "http://127.0.0.1:$PORT_admin/metrics" | grep "^oci_remote_cache_$1"; }

# ── the clients: PULL UPSTREAM into an empty store, then tell the digest of the index that came ──

podman_resolves() {
  STORE=$(new_store)
  podman_in "$STORE" pull -q --tls-verify=false "$CACHE/$1/$REPO:$TAG" >/dev/null || return
  podman_in "$STORE" image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$CACHE/$1/$REPO:$TAG" | sed 's/.*@//'
}
docker_resolves() {
  dockerd_start >/dev/null || return
  docker_cli pull -q "$CACHE/$1/$REPO:$TAG" >/dev/null &&
    docker_cli image inspect --format '{{join .RepoDigests "\n"}}' "$CACHE/$1/$REPO:$TAG" | sed 's/.*@//'
  dockerd_stop
}
containerd_resolves() {
  containerd_hosts "$1" "http://$CACHE"
  containerd_start >/dev/null || return
  ctr_pull "$1/$REPO:$TAG" >/dev/null &&
    ctr_cli images ls "name==$1/$REPO:$TAG" | awk 'NR == 2 { print $3 }'
  containerd_stop
}
regctl_resolves() {
  local folder
  folder=$(new_store)
  regctl image copy "$CACHE/$1/$REPO:$TAG" "ocidir://$folder:$TAG" >/dev/null && regctl image digest "ocidir://$folder:$TAG"
}

CLIENTS="podman docker containerd"
if command -v regctl >/dev/null; then
  CLIENTS="$CLIENTS regctl"
  regctl registry set "$CACHE" --tls disabled --skip-check
else
  skip "regctl: it is not installed, it needs Go"
fi

each_sees() { # WHAT UPSTREAM DIGEST
  local client digest
  for client in $CLIENTS; do
    digest=$("${client}_resolves" "$2" 2>"$E2E_WORK/client.log" | grep -Fx "$3")
    same "$client: $1" "$digest" "$3"
  done
}
each_is_refused() { # WHAT UPSTREAM
  local client
  for client in $CLIENTS; do
    if [ -n "$("${client}_resolves" "$2" 2>/dev/null | grep '^sha256:')" ]; then
      fail "$client: $1"
    else
      ok "$client: $1"
    fi
  done
}

OLD=$(index_digest v1)
NEW=$(index_digest v2)

cache_start
plain_start
limiter_start
upstream_start token
for upstream in $UPSTREAMS; do each_sees "$upstream: cold pull" "$upstream" "$OLD"; done
check "the rate limit's headers are on /metrics" metric 'upstream_ratelimit_remaining{upstream="limited.test",credential="anonymous"} 76'

# The rate limit: 429 for everything.
touch "$LIMIT"
expire
check "limited: what is stale says so" says limited.test 'warning: 299.*rate-limited'
each_sees "limited: the old digest while the upstream says 429" limited.test "$OLD"
same "limited: what was never held is 429" "$(curl -s -o /dev/null -w '%{http_code}' "http://$CACHE/v2/limited.test/$REPO/manifests/v2")" 429
rm "$LIMIT"

# The token server refuses to answer, then refuses everybody.
stop auth
expire
sleep "$TOKEN_LIFE"
check "guarded: what is stale says so" says guarded.test 'warning: 299.*token-failed'
each_sees "guarded: the old digest without a token server" guarded.test "$OLD"
start_server auth "http://127.0.0.1:$PORT_auth/" python3 "$E2E_DIR/token_server.py" \
  "$PORT_auth" "$E2E_WORK/token.key" "$E2E_WORK/token.crt" somebody else "$TOKEN_LIFE"
sleep 2
same "guarded: a refusal is no outage" "$(status_of guarded.test)" 403
each_is_refused "guarded: nothing is served that the upstream refuses" guarded.test
check "guarded: /readyz says who refuses" curl -sf "http://$CACHE/readyz" -o "$E2E_WORK/readyz"
check "guarded: and whom" grep -q 'guarded.test.*our own credential' "$E2E_WORK/readyz"
stop auth token
upstream_start token
sleep 2
blobs_before=$(grep -c 'GET .*/blobs/' "$E2E_WORK/token.log")
each_sees "guarded: everything is back at the first 200" guarded.test "$OLD"
same "guarded: and no blob was fetched again" "$(grep -c 'GET .*/blobs/' "$E2E_WORK/token.log")" "$blobs_before"

# The token server itself says no to everybody, and then that it cannot. Nothing is erased, and nothing fetched again.
token_says() { # STATUS; tag and token are past their time afterwards
  printf '%s' "$1" >"$TOKEN_STATUS.new" && mv "$TOKEN_STATUS.new" "$TOKEN_STATUS"
  sleep $((TTL + TOKEN_LIFE))
}
held() { find "$CACHE_DIR/blobs" -type f | sort; }
blob_gets() { grep -c 'GET .*/blobs/' "$E2E_WORK/token.log"; }
for status in 401 403; do
  held_before=$(held)
  blobs_before=$(blob_gets)
  token_says "$status"
  same "guarded, the token server says $status: refused" "$(status_of guarded.test)" 403
  each_is_refused "guarded, the token server says $status: nothing is served" guarded.test
  check "guarded, the token server says $status: /readyz says that somebody refuses us" \
    sh -c "curl -sf http://$CACHE/readyz | grep 'guarded.test.*our own credential'"
  each_sees "guarded, the token server says $status: another upstream is as it was" plain.test "$OLD"
  same "guarded, the token server says $status: nothing is erased" "$(held)" "$held_before"
  rm "$TOKEN_STATUS"
  sleep 2
  each_sees "guarded, after $status: everything is back" guarded.test "$OLD"
  same "guarded, after $status: no blob was fetched again" "$(blob_gets)" "$blobs_before"
  check "guarded, after $status: /readyz has nothing to say" sh -c "! curl -sf http://$CACHE/readyz | grep guarded.test"
done
token_says 503
check "guarded, the token server says 503: what is stale says so" says guarded.test 'warning: 299.*token-failed'
each_sees "guarded, the token server says 503: the old digest" guarded.test "$OLD"
rm "$TOKEN_STATUS"
sleep 2
each_sees "guarded, after 503: the digest" guarded.test "$OLD"
check "guarded, after 503: nothing is stale" wait_until 15 sh -c "! curl -s -o /dev/null -D - http://$CACHE/v2/guarded.test/$REPO/manifests/$TAG | grep -i '^warning'"

# The tag moves.
check "the tag moves" move v2
expire
for upstream in $UPSTREAMS; do each_sees "$upstream: the new digest after its time" "$upstream" "$NEW"; done
same "the history knows both" \
  "$("$E2E_BIN" tags history "plain.test/$REPO:$TAG" --json --config "$CACHE_DIR.toml" | jq -r '.[].digest' | xargs)" "$NEW $OLD"

# The registry stops.
stop limiter plain token auth
expire
for upstream in $UPSTREAMS; do each_sees "$upstream: the new digest while the registry is stopped" "$upstream" "$NEW"; done
check "stopped: what is stale says so" says plain.test 'cache-status: .*fwd=stale; detail=unreachable'
check "stopped: the old digest is there, too" \
  curl -sf -o /dev/null "http://$CACHE/v2/plain.test/$REPO/manifests/$OLD"

# Switched offline and back.
check "offline: switched on" curl -sf -X PUT "http://127.0.0.1:$PORT_admin/api/v1/offline"
check "offline: what is stale says so" says plain.test 'cache-status: .*fwd=stale; detail=offline'
each_sees "offline: the new digest" plain.test "$NEW"
check "offline: switched off" curl -sf -X DELETE "http://127.0.0.1:$PORT_admin/api/v1/offline"

# The tag is deleted: its manifest and with it every tag that names it.
plain_start
check "the tag is deleted" curl -sf -X DELETE "http://127.0.0.1:$PORT_anon/v2/$REPO/manifests/$NEW"
expire
sleep 2
same "deleted: the tag is gone" "$(status_of plain.test)" 404
each_is_refused "deleted: the tag is gone" plain.test
for digest in "$NEW" "$OLD"; do
  check "deleted: pullable by digest ($digest)" curl -sf -o /dev/null "http://$CACHE/v2/plain.test/$REPO/manifests/$digest"
done

# What the next suites expect.
for tag in v1 v2; do push "oci:$E2E_WORK/image:$tag" "$REPO:$tag"; done
check "every file under blobs/ hashes to its name" hashes_match
exit 0
