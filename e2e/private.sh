#!/usr/bin/env bash
# Private images: what an open cache serves, who of our own clients may pull what, and where the upstream's credentials come from.
# The upstream has one public and one private repository, tokens that live for seconds, two users of whom one may pull the private
# one, and a password that is rotated.
SUITE=private
. "$(dirname "$0")/lib.sh"
client_home
stop_on_exit

PUBLIC_REPO=demo/public
PRIVATE_REPO=$REPO
OTHER=bob:builder # a login that the upstream knows, and that opens nothing of the private repository
PASSWORD_FILE=$E2E_WORK/upstream-password
CERTS=$E2E_WORK/certs

auth_start() {
  start_server auth "http://127.0.0.1:$PORT_auth/" python3 "$E2E_DIR/token_server.py" \
    "$PORT_auth" "$E2E_WORK/token.key" "$E2E_WORK/token.crt" "$UPSTREAM_USER" "@$PASSWORD_FILE" "$TOKEN_LIFE" "$PUBLIC_REPO" "$OTHER"
}
token_registry() { # NAME PORT
  registry_start "$1" "$2" "auth: { token: { realm: \"http://127.0.0.1:$PORT_auth/token\", service: e2e,
    issuer: e2e, rootcertbundle: $E2E_WORK/token.crt } }"
}

# A cache with the lines on stdin beside the usual ones.
cache_with() { # LISTEN URL
  CACHE=127.0.0.1:$PORT_cache
  CACHE_DIR=$(mktemp -d "$E2E_WORK/cache.XXXXXX")
  (
    umask 077
    cat >"$CACHE_DIR.toml" <<TOML
listen = "$1:$PORT_cache"
admin_listen = "127.0.0.1:$PORT_admin"
cache_dir = "$CACHE_DIR"
default_upstream = ""
$(cat)
TOML
  )
  start_server cache "$2://$CACHE/healthz" "$E2E_BIN" serve --config "$CACHE_DIR.toml"
}
upstream_section() { # MORE LINES
  printf '[upstreams."token.test"]\nurl = "http://127.0.0.1:%s"\ntag_ttl = "1s"\nnegative_ttl = "1s"\n%s\n' "$PORT_token" "$1"
}
by_file() { printf 'credentials = { username = "%s", password = { file = "%s" } }' "$UPSTREAM_USER" "$PASSWORD_FILE"; }

podman_pull() { # IMAGE ARGS...: into an empty store
  podman_in "$(new_store)" pull -q "${@:2}" "$CACHE/token.test/$1"
}
names_the_key() { curl -s "http://$CACHE/v2/token.test/$PRIVATE_REPO/manifests/v1" | grep -F 'serve = '; }

# ── 1: an open cache with credentials serves what is public, and nothing else ──

open_cache() {
  cache_with 0.0.0.0 http < <(upstream_section "$(by_file)")
  check "open: a public repository is served" podman_pull "$PUBLIC_REPO:v1" --tls-verify=false
  check "open: a private one is refused, and the key named" names_the_key
  refuses "open: podman cannot pull it" podman_pull "$PRIVATE_REPO:v1" --tls-verify=false
  sleep "$((TOKEN_LIFE + 1))"
  check "open: after the tokens died, another tag" podman_pull "$PUBLIC_REPO:v2" --tls-verify=false
  cache_stop
}

# ── 2: our own clients, over TLS ──

own_certificate() {
  mkdir -p "$CERTS"
  openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=e2e-ca -keyout "$CERTS/ca.key" -out "$CERTS/ca.crt" 2>/dev/null &&
    openssl req -newkey rsa:2048 -nodes -subj /CN=cache -keyout "$E2E_WORK/tls.key" -out "$E2E_WORK/tls.csr" 2>/dev/null &&
    openssl x509 -req -in "$E2E_WORK/tls.csr" -CA "$CERTS/ca.crt" -CAkey "$CERTS/ca.key" -CAcreateserial -days 2 \
      -extfile <(printf 'subjectAltName=IP:127.0.0.1') -out "$E2E_WORK/tls.crt" 2>/dev/null
  rm -f "$CERTS/ca.key"
}

closed_cache() {
  own_certificate || die "openssl made no certificate"
  { htpasswd -Bbn -C 5 alice wonderland; htpasswd -Bbn -C 5 bob builder; htpasswd -Bbn -C 5 carol sesame-street; } | grep . >"$E2E_WORK/clients"
  cache_with 0.0.0.0 https <<TOML
[tls]
cert_file = "$E2E_WORK/tls.crt"
key_file = "$E2E_WORK/tls.key"
[clients]
htpasswd = "$E2E_WORK/clients"
rules = ["alice pull+purge token.test/**", "bob pull token.test/$PUBLIC_REPO", "carol pull-cached token.test/$PUBLIC_REPO"]
$(upstream_section "$(by_file)")
TOML
  check "clients: podman, alice, the private image" podman_pull "$PRIVATE_REPO:v1" --cert-dir "$CERTS" --creds alice:wonderland
  refuses "clients: podman, bob, the same image, cached" podman_pull "$PRIVATE_REPO:v1" --cert-dir "$CERTS" --creds bob:builder
  check "clients: podman, bob, the public image" podman_pull "$PUBLIC_REPO:v1" --cert-dir "$CERTS" --creds bob:builder
  refuses "clients: podman, nobody" podman_pull "$PUBLIC_REPO:v1" --cert-dir "$CERTS"
  refuses "clients: podman, a wrong password" podman_pull "$PUBLIC_REPO:v1" --cert-dir "$CERTS" --creds bob:wonderland
  refuses "clients: podman without the authority's certificate" podman_pull "$PUBLIC_REPO:v1" --creds bob:builder
  same "clients: HTTP/2" "$(curl -s -o /dev/null --cacert "$CERTS/ca.crt" -u bob:builder -w '%{http_version}' "https://$CACHE/v2/")" 2
  taken_back
  closed_docker
  closed_containerd
  rotate
  cache_stop
}

taken_back() {
  refuses "clients: skopeo delete, bob" delete bob:builder "$PUBLIC_REPO:v1"
  check "clients: skopeo delete, alice" delete alice:wonderland "$PUBLIC_REPO:v1"
  same "clients: the upstream heard nothing of it" "$(grep -c DELETE "$E2E_WORK/token.log")" 0
  check "clients: podman, bob, the public image again" podman_pull "$PUBLIC_REPO:v1" --cert-dir "$CERTS" --creds bob:builder
  if command -v crane >/dev/null; then taken_back_by crane crane_delete; else skip "clients: crane is not installed"; fi
  if command -v regctl >/dev/null; then
    taken_back_by "regctl tag" regctl_untag
    taken_back_by "regctl manifest" regctl_delete
  else
    skip "clients: regctl is not installed"
  fi
  same "clients: the upstream heard nothing of all that" "$(grep -c DELETE "$E2E_WORK/token.log")" 0
}
taken_back_by() { # WHAT COMMAND: called with user, password and image, of which all is held
  local image="$PUBLIC_REPO:v1" one
  one="$PUBLIC_REPO@$(index_digest v1)"
  case $1 in *manifest) image=$one ;; esac
  refuses "clients: $1 delete, bob" "$2" bob builder "$image"
  check "clients: $1 delete, bob: it is still held" curl_held "$image"
  check "clients: $1 delete, alice" "$2" alice wonderland "$image"
  refuses "clients: $1 delete, alice: it is held no longer" curl_held "$image"
  check "clients: podman, bob, the public image after $1" podman_pull "$PUBLIC_REPO:v1" --cert-dir "$CERTS" --creds bob:builder
}
# Carol gets only what is held, and asks for nothing.
curl_held() { # IMAGE
  local name=${1%%[:@]*}
  curl -sf -o /dev/null --cacert "$CERTS/ca.crt" -u carol:sesame-street -H 'Accept: */*' \
    "https://$CACHE/v2/token.test/$name/manifests/${1#"$name"[:@]}"
}
crane_delete() { # USER PASSWORD IMAGE
  export DOCKER_CONFIG=$E2E_WORK/crane-$1 SSL_CERT_FILE=$CERTS/ca.crt
  crane auth login -u "$1" -p "$2" "$CACHE" && crane delete "$CACHE/token.test/$3"
  local status=$?
  unset DOCKER_CONFIG SSL_CERT_FILE
  return "$status"
}
regctl_as() { # USER PASSWORD ARGS...
  local REGCTL_CONFIG=$E2E_WORK/regctl-$1.json
  export REGCTL_CONFIG
  regctl registry set "$CACHE" --tls enabled --cacert "$(cat "$CERTS/ca.crt")" --skip-check &&
    regctl registry login "$CACHE" -u "$1" -p "$2" --skip-check && regctl "${@:3}"
}
regctl_untag() { regctl_as "$1" "$2" tag rm "$CACHE/token.test/$3"; }
regctl_delete() { regctl_as "$1" "$2" manifest delete "$CACHE/token.test/$3"; }
delete() { skopeo delete --cert-dir "$CERTS" --creds "$1" "docker://$CACHE/token.test/$2"; } # USER:PASSWORD IMAGE

closed_docker() {
  check "clients: dockerd starts, empty" dockerd_start || return
  refuses "clients: docker, nobody" docker_cli pull -q "$CACHE/token.test/$PRIVATE_REPO:v1"
  check "clients: docker login, alice" docker_login alice wonderland
  check "clients: docker, alice, the private image" docker_cli pull -q "$CACHE/token.test/$PRIVATE_REPO:v1"
  dockerd_stop
}
# With one login in its file docker keeps the next there too, and looks for no helper.
docker_login() {
  mkdir -p "$HOME/.docker"
  echo '{"auths": {"other.test": {"auth": "eDp5"}}}' >"$HOME/.docker/config.json"
  docker_cli login -u "$1" --password-stdin "$CACHE" <<<"$2"
}

closed_containerd() {
  containerd_hosts "$CACHE" "https://$CACHE" "ca = \"$CERTS/ca.crt\""
  check "clients: containerd starts, empty" containerd_start || return
  refuses "clients: containerd, bob, the private image" closed_ctr bob:builder "$PRIVATE_REPO"
  check "clients: containerd, alice, the private image" closed_ctr alice:wonderland "$PRIVATE_REPO"
  containerd_stop
}
closed_ctr() { # USER:PASSWORD REPO
  ctr_cli images pull --hosts-dir "$E2E_WORK/hosts" --snapshotter native --user "$1" "$CACHE/token.test/$2:v1"
}

rotate() {
  echo "rotated-$UPSTREAM_PASSWORD" >"$PASSWORD_FILE"
  sleep "$((TOKEN_LIFE + 2))"
  check "upstream: after its password was rotated, another tag" \
    podman_pull "$PRIVATE_REPO:v2" --cert-dir "$CERTS" --creds alice:wonderland
}

# ── 3: credentials from a helper ──

helper() {
  local line="docker_config = \"$HOME/logins.json\""
  jq -n --arg host "127.0.0.1:$PORT_token" '{credHelpers: {($host): "pass"}}' >"$HOME/logins.json"
  if ! pass_store >"$E2E_WORK/pass.log" 2>&1; then
    skip "helper: docker-credential-pass is not to be had here: $(tail -n 1 "$E2E_WORK/pass.log")"
    return
  fi
  cache_with 127.0.0.1 http < <(echo "$line"; upstream_section "")
  check "helper: docker-credential-pass opens the private image" podman_pull "$PRIVATE_REPO:v1" --tls-verify=false
  cache_stop
}
pass_store() {
  command -v docker-credential-pass pass gpg || return
  export GNUPGHOME=$HOME/gnupg PASSWORD_STORE_DIR=$HOME/pass
  mkdir -m 700 -p "$GNUPGHOME"
  gpg --batch --quiet --pinentry-mode loopback --passphrase '' --quick-generate-key e2e default default 1d &&
    pass init e2e &&
    jq -n --arg host "127.0.0.1:$PORT_token" --arg user "$UPSTREAM_USER" --arg secret "$(cat "$PASSWORD_FILE")" \
      '{ServerURL: $host, Username: $user, Secret: $secret}' | docker-credential-pass store
}

# ── 4: each client's own login at the upstream ──

PROOF=4 # seconds

own_logins() {
  local own=$UPSTREAM_USER:$(cat "$PASSWORD_FILE")
  cache_with 0.0.0.0 http < <(upstream_section "$(printf 'credentials = "client"\nclient_proof_ttl = "%ss"' "$PROOF")")
  check "own: podman, nobody, the public image" podman_pull "$PUBLIC_REPO:v1" --tls-verify=false
  refuses "own: podman, nobody, the private image" podman_pull "$PRIVATE_REPO:v1" --tls-verify=false
  check "own: podman, its own login, the private image" podman_pull "$PRIVATE_REPO:v1" --tls-verify=false --creds "$own"
  refuses "own: podman, another's login, the same image, cached" podman_pull "$PRIVATE_REPO:v1" --tls-verify=false --creds "$OTHER"
  refuses "own: podman, a wrong password" podman_pull "$PRIVATE_REPO:v1" --tls-verify=false --creds "$UPSTREAM_USER:wrong"
  check "own: podman, another's login, the public image" podman_pull "$PUBLIC_REPO:v1" --tls-verify=false --creds "$OTHER"
  same "own: skopeo, its own login, the same digest" "$(own_skopeo "$own")" "$(index_digest v1)"
  refuses "own: skopeo, another's login" own_skopeo "$OTHER"
  own_docker
  own_containerd "$own"
  own_revoked "$own"
  cache_stop
}
own_skopeo() { # USER:PASSWORD
  skopeo inspect --tls-verify=false --creds "$1" --format '{{.Digest}}' "docker://$CACHE/token.test/$PRIVATE_REPO:v1"
}
own_docker() {
  rm -f "$HOME/.docker/config.json"
  check "own: dockerd starts, empty" dockerd_start || return
  check "own: docker, nobody, the public image" docker_cli pull -q "$CACHE/token.test/$PUBLIC_REPO:v1"
  refuses "own: docker, nobody, the private image" docker_cli pull -q "$CACHE/token.test/$PRIVATE_REPO:v1"
  dockerd_stop
}
own_containerd() { # USER:PASSWORD
  containerd_hosts "$CACHE" "http://$CACHE"
  check "own: containerd starts, empty" containerd_start || return
  refuses "own: containerd, another's login, the private image" closed_ctr "$OTHER" "$PRIVATE_REPO"
  check "own: containerd, its own login, the private image" closed_ctr "$1" "$PRIVATE_REPO"
  check "own: containerd, nobody, the public image" ctr_cli images pull --hosts-dir "$E2E_WORK/hosts" --snapshotter native \
    "$CACHE/token.test/$PUBLIC_REPO:v1"
  containerd_stop
}
own_revoked() { # USER:PASSWORD
  check "own: before its password was changed" podman_pull "$PRIVATE_REPO:v1" --tls-verify=false --creds "$1"
  echo "changed-$UPSTREAM_PASSWORD" >"$PASSWORD_FILE"
  sleep "$((PROOF + TOKEN_LIFE + 1))"
  refuses "own: after its password was changed, the old one, cached" podman_pull "$PRIVATE_REPO:v1" --tls-verify=false --creds "$1"
  check "own: the new one" podman_pull "$PRIVATE_REPO:v1" --tls-verify=false --creds "$UPSTREAM_USER:changed-$UPSTREAM_PASSWORD"
}

# ── 5: what leads inward sees no connection ──

inward() {
  local own
  own=$(ip -4 -o addr show scope global | awk 'NR == 1 { sub("/.*", "", $4); print $4 }')
  if [ -z "$own" ]; then
    skip "inward: this machine has no address but loopback"
    return
  fi
  nginx_inward "$own"
  cache_with 127.0.0.1 http <<TOML
[upstreams."realm.test"]
url = "http://$own:$PORT_redirect"
[upstreams."hop.test"]
url = "http://$own:$PORT_backing"
TOML
  : >"$E2E_WORK/auth.log"
  refuses "inward: a realm on loopback, named by a registry that is not" \
    curl -sf "http://$CACHE/v2/realm.test/$PRIVATE_REPO/manifests/v1"
  refuses "inward: a redirect to loopback" curl -sf "http://$CACHE/v2/hop.test/$PRIVATE_REPO/manifests/v1"
  same "inward: the token server saw nothing" "$(grep -c token "$E2E_WORK/auth.log")" 0
  same "inward: nothing on loopback was connected to" "$(grep -c . "$E2E_WORK/inward.log")" 0
  cache_stop
  stop inward
}
nginx_inward() { # OWN ADDRESS: two registries there, one that names a realm and one that redirects, both to loopback
  mkdir -p "$E2E_WORK/inward"
  : >"$E2E_WORK/inward.log"
  cat >"$E2E_WORK/inward.conf" <<NGINX
daemon off; master_process off; worker_processes 1; pid $E2E_WORK/inward/pid; error_log stderr crit;
events { worker_connections 64; }
http {
  access_log off;
  client_body_temp_path $E2E_WORK/inward/body; proxy_temp_path $E2E_WORK/inward/proxy; fastcgi_temp_path $E2E_WORK/inward/fcgi;
  uwsgi_temp_path $E2E_WORK/inward/uwsgi; scgi_temp_path $E2E_WORK/inward/scgi;
  server {
    listen $1:$PORT_redirect;
    location / {
      add_header WWW-Authenticate 'Bearer realm="http://127.0.0.1:$PORT_auth/token",service="e2e"' always;
      return 401;
    }
  }
  server { listen $1:$PORT_backing; location / { return 307 http://127.0.0.1:$PORT_cdn\$request_uri; } }
  server { listen 127.0.0.1:$PORT_cdn; access_log $E2E_WORK/inward.log; location / { return 200 'inner'; } }
}
NGINX
  start_server inward "http://$1:$PORT_backing/" nginx -p "$E2E_WORK/inward" -c "$E2E_WORK/inward.conf"
  : >"$E2E_WORK/inward.log"
}

echo "$UPSTREAM_PASSWORD" >"$PASSWORD_FILE"
chmod 600 "$PASSWORD_FILE"
upstream_start anon
for tag in v1 v2; do push "oci:$E2E_WORK/image:$tag" "$PUBLIC_REPO:$tag"; done
upstream_stop anon
auth_start
token_registry token "$PORT_token"
open_cache
closed_cache
helper
own_logins
inward
exit 0
