#!/usr/bin/env bash
# Upstreams behind real proxies: tinyproxy (HTTP, with a password) and microsocks (SOCKS5, with a password). Registry, token server and
# content host are all reached through them, and when a proxy goes, what was pulled is served on.
SUITE=proxies
. "$(dirname "$0")/lib.sh"
client_home
stop_on_exit

PROXY_USER=gate
PROXY_PASSWORD=proxy-sesame
TINYPROXY_URL="http://$PROXY_USER:$PROXY_PASSWORD@127.0.0.1:$PORT_proxy"
# The environment's proxies count for nothing: nobody listens there.
export HTTP_PROXY=http://127.0.0.1:1 HTTPS_PROXY=http://127.0.0.1:1 ALL_PROXY=http://127.0.0.1:1

tinyproxy_start() {
  cat >"$E2E_WORK/tinyproxy.conf" <<CONF
Port $PORT_proxy
Listen 127.0.0.1
Timeout 60
MaxClients 100
LogLevel Connect
Allow 127.0.0.1
BasicAuth $PROXY_USER $PROXY_PASSWORD
CONF
  start_server tinyproxy "http://127.0.0.1:$PORT_proxy/" tinyproxy -d -c "$E2E_WORK/tinyproxy.conf"
}
microsocks_start() {
  start microsocks microsocks -i 127.0.0.1 -p "$PORT_socks" -u "$PROXY_USER" -P "$PROXY_PASSWORD"
  wait_until 10 bash -c "exec 3<>/dev/tcp/127.0.0.1/$PORT_socks" || die "microsocks does not listen"
}

cache_behind() { # PROXY URL
  CACHE=127.0.0.1:$PORT_cache
  CACHE_DIR=$(mktemp -d "$E2E_WORK/cache.XXXXXX")
  (umask 077; { printf 'proxy = "%s"\n' "$1"; cache_config "$CACHE_DIR"; } >"$CACHE_DIR.toml")
  start_server cache "http://$CACHE/healthz" "$E2E_BIN" serve --config "$CACHE_DIR.toml"
}
copy() { # KIND TAG
  skopeo copy -q --all --src-tls-verify=false "docker://$CACHE/$1.test/$REPO:$2" "dir:$(new_store)"
}

through() { # LABEL PROXY URL LOG WORD
  local before kind
  cache_behind "$2"
  for kind in $KINDS; do
    before=$(grep -c "$4" "$3")
    check "$1: $kind, cold" copy "$kind" v1
    check "$1: $kind went through the proxy" test "$(grep -c "$4" "$3")" -gt "$before"
  done
  check_store "$1" v1 all
}

upstream_start $KINDS
tinyproxy_start
microsocks_start
through tinyproxy "$TINYPROXY_URL" "$E2E_WORK/tinyproxy.log" 'Request'
stop tinyproxy
sleep 2 # redirect.test's tags have come of age
check "tinyproxy: gone, the image is served on" copy redirect v1
refuses "tinyproxy: gone, what is not held cannot be had" copy anon v2
tinyproxy_start
sleep 3
check "tinyproxy: back, what was not held is pulled" copy anon v2
same "tinyproxy: no log line holds the password" "$(grep -c "$PROXY_PASSWORD" "$E2E_WORK/cache.log")" 0
cache_stop
for scheme in socks5 socks5h; do
  through "$scheme" "$scheme://$PROXY_USER:$PROXY_PASSWORD@127.0.0.1:$PORT_socks" "$E2E_WORK/microsocks.log" 'connected to'
  cache_stop
done
cache_behind "socks5://$PROXY_USER:wrong@127.0.0.1:$PORT_socks"
refuses "socks5: a wrong password" copy anon v1
curl -s "http://$CACHE/v2/anon.test/$REPO/manifests/v1" >"$E2E_WORK/refused"
check "socks5: the error names the proxy" grep -q "the proxy socks5://127.0.0.1:$PORT_socks" "$E2E_WORK/refused"
same "socks5: and nobody's password" "$(cat "$E2E_WORK/refused" "$E2E_WORK/cache.log" | grep -c "$PROXY_USER:")" 0
cache_stop
exit 0
