//! Every configuration key, said once: path, kind, default, what it is for.
//!
//! The file reader, the environment, `config show|init|schema` and the reference page all walk this one list, so that none of them can
//! know a key the others do not. What a value must look like is `value.rs`; what must fit together is `check.rs`.

use std::fmt;

/// One key as it may be written.
#[derive(Debug)]
pub(super) struct Key {
    /// The steps from the top; `*` stands for an upstream's own key.
    pub(super) path: &'static [&'static str],
    /// What its value must look like.
    pub(super) kind: Kind,
    /// What holds when nobody says anything.
    pub(super) default: Default,
    /// A value as it could stand in a file.
    pub(super) example: &'static str,
    /// What it does, as the template, the schema and the reference page print it.
    pub(super) doc: &'static str,
}

/// The shapes a value can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// `address:port` to listen on.
    Address,
    /// A file or folder.
    Path,
    /// The key or alias of an upstream, or nothing.
    UpstreamName,
    /// Directives for the log.
    LogFilter,
    /// Bytes, with or without a unit.
    Size,
    /// The same, and 0 for nothing at all.
    SizeOrNothing,
    /// A span of time with units.
    Duration,
    /// `true` or `false`.
    Flag,
    /// A whole number of at least one.
    Count,
    /// Where a registry answers.
    Url,
    /// Several of those.
    Urls,
    /// Names that stand for an upstream, as its key does.
    Names,
    /// `host` or `host:port`.
    Hosts,
    /// `host`, `host:port` or `address/prefix`.
    HostsOrNetworks,
    /// `address/prefix`.
    Networks,
    /// `who what where`.
    Rules,
    /// The user name of a credential.
    Username,
    /// Text that is never shown.
    Secret,
    /// A proxy's URL, where a secret's text may come from too, or `none`.
    Proxy,
    /// How long tags of some patterns last.
    TagRules,
    /// Logins for some repositories.
    Logins,
    /// One of a few words.
    Choice(&'static [&'static str]),
}

/// A key's value when no source gives one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Default {
    /// This, written as in an environment variable.
    Text(&'static str),
    /// None; these words say what happens then.
    Words(&'static str),
}

/// A key's path with the upstream filled in, for messages and for finding values.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct KeyPath(pub(super) Vec<String>);

/// Keys whose features have not landed. They are unknown to every reader and on no page until they are taken out of this list.
pub(super) const NOT_YET: &[&[&str]] = &[];

/// The tables, in the order they are printed, and what they hold.
pub(super) const TABLES: &[(&[&str], &str)] = &[
    (
        &[],
        "What the process listens on and where it keeps its files.",
    ),
    (&["cache"], "How much is kept."),
    (
        &["tls"],
        "TLS for clients, with HTTP/2. Without `cert_file` clients speak plain HTTP.",
    ),
    (
        &["clients"],
        "Who may pull, and how much of the cache one of them may take. Without `htpasswd`, `tokens` and `tls.client_ca_file` nobody is asked who they are.",
    ),
    (
        &["upstreams", "*"],
        "One registry. The section's key is the first path segment (`/v2/<key>/<name>/…`) and the `ns` value that lead to it. \
         A section named like a built-in upstream overrides that one key by key.",
    ),
];

/// All keys, those of features to come included. Readers use [`keys`].
const ALL: &[Key] = &[
    Key {
        path: &["listen"],
        kind: Kind::Address,
        default: Default::Text("[::]:8080"),
        example: "\"[::]:8080\"",
        doc: "Address and port for clients. `[::]` takes IPv4 and IPv6, and falls back to `0.0.0.0` on a machine without IPv6.",
    },
    Key {
        path: &["admin_listen"],
        kind: Kind::Address,
        default: Default::Text("127.0.0.1:8081"),
        example: "\"127.0.0.1:8081\"",
        doc: "Address and port for `/metrics` and the health checks of operators.",
    },
    Key {
        path: &["cache_dir"],
        kind: Kind::Path,
        default: Default::Text("/tmp/cache/oci"),
        example: "\"/var/cache/oci-remote-cache\"",
        doc: "Folder for everything that is kept. Without it systemd's `CACHE_DIRECTORY` is taken where set.",
    },
    Key {
        path: &["default_upstream"],
        kind: Kind::UpstreamName,
        default: Default::Text("docker.io"),
        example: "\"docker.io\"",
        doc: "The upstream for names that begin with no upstream's key, as Docker's `registry-mirrors` sends them. `\"\"` means none.",
    },
    Key {
        path: &["log"],
        kind: Kind::LogFilter,
        default: Default::Words("`info`"),
        example: "\"info,upstream=debug\"",
        doc: "What is logged: a level, or `target=level` directives separated by commas. `RUST_LOG`, when set, is used instead.",
    },
    Key {
        path: &["docker_config"],
        kind: Kind::Path,
        default: Default::Words("none"),
        example: "\"/root/.docker/config.json\"",
        doc: "Login file of Docker (`config.json`) or podman (`auth.json`) for upstreams without `credentials` of their own, and the \
              `docker-credential-*` programs that it names. An entry for `host/prefix` is for those repositories only; the longest \
              wins. Read again when it changes. The variable `DOCKER_AUTH_CONFIG` may hold such a file's text, and goes first.",
    },
    Key {
        path: &["offline"],
        kind: Kind::Flag,
        default: Default::Text("false"),
        example: "true",
        doc: "Whether no upstream is asked for anything: what is held is served, however old, and the rest is refused.",
    },
    Key {
        path: &["catalog"],
        kind: Kind::Flag,
        default: Default::Text("false"),
        example: "true",
        doc: "Whether `/v2/_catalog` lists the repositories of which something is cached: to each client those that it may pull.",
    },
    Key {
        path: &["trusted_networks"],
        kind: Kind::Networks,
        default: Default::Text(""),
        example: "[\"198.18.0.0/15\"]",
        doc: "Networks that count as public when an upstream's realm or redirect leads there: NAT64, fake-IP and overlay networks.",
    },
    Key {
        path: &["proxy"],
        kind: Kind::Proxy,
        default: Default::Words("none; `HTTP_PROXY` and its like are not read"),
        example: "\"http://user:password@proxy.example:3128\"",
        doc: "Proxy through which upstreams are asked: `http://`, `https://`, `socks5://` (we resolve names) or `socks5h://` (the proxy does), \
              with the user and password in front of the host where it wants them. The whole URL may also be in `{ file = \"…\" }` or \
              `{ env = \"…\" }`; it is read at the start.",
    },
    Key {
        path: &["cache", "max_size"],
        kind: Kind::Size,
        default: Default::Words(
            "the smaller of 80 % of (free + ours) and free + ours - 2 GiB; on tmpfs at most a quarter of memory",
        ),
        example: "\"50GiB\"",
        doc: "How much disk the cache may use. Beyond it, what was used longest ago goes first.",
    },
    Key {
        path: &["cache", "max_blob"],
        kind: Kind::Size,
        default: Default::Words("half of `max_size`"),
        example: "\"25GiB\"",
        doc: "The largest blob that is kept; larger ones pass through uncached.",
    },
    Key {
        path: &["tls", "cert_file"],
        kind: Kind::Path,
        default: Default::Words("none, which means plain HTTP"),
        example: "\"/etc/oci-remote-cache/tls.crt\"",
        doc: "PEM file with our certificate and those between it and its authority. Read again when it changes.",
    },
    Key {
        path: &["tls", "key_file"],
        kind: Kind::Path,
        default: Default::Words("none, which means plain HTTP"),
        example: "\"/etc/oci-remote-cache/tls.key\"",
        doc: "PEM file with the certificate's key. Read again when it changes.",
    },
    Key {
        path: &["tls", "client_ca_file"],
        kind: Kind::Path,
        default: Default::Words("none, which means that clients' certificates are not asked for"),
        example: "\"/etc/oci-remote-cache/clients-ca.crt\"",
        doc: "PEM file with authorities for clients' certificates. A client is then `cert:` and its certificate's first DNS name (or the \
              SHA-256 of a certificate without one); a client without a certificate may still show a password or token.",
    },
    Key {
        path: &["clients", "htpasswd"],
        kind: Kind::Path,
        default: Default::Words("none"),
        example: "\"/etc/oci-remote-cache/htpasswd\"",
        doc: "File of `name:hash` lines as `htpasswd -B` writes them (bcrypt only). Read again when it changes.",
    },
    Key {
        path: &["clients", "tokens"],
        kind: Kind::Path,
        default: Default::Words("none"),
        example: "\"/etc/oci-remote-cache/tokens\"",
        doc: "File of `name token` lines. A client shows its token as `Authorization: Bearer`, or as the password of its name. \
              Read again when it changes.",
    },
    Key {
        path: &["clients", "rules"],
        kind: Kind::Rules,
        default: Default::Text(""),
        example: "[\"ci pull ghcr.io/acme/**\", \"* pull-cached **\", \"anonymous pull docker.io/**\"]",
        doc: "Who may pull what: `who what where`, read from the front, the first that fits decides, and what fits none is refused. \
              Who: a client's name, `*` for every client with a name, `anonymous` for those without. What: `pull`, `pull-cached` \
              (only what is held, without asking the upstream), `warm` (have an image fetched ahead) and `purge` (have what is held \
              taken back), joined by `+`, or `deny`. Where: an upstream's key and a repository; `*` stands for \
              text without a slash, `**` for any segments. Without rules every client with a name may pull everything.",
    },
    Key {
        path: &["clients", "max_connections"],
        kind: Kind::Count,
        default: Default::Words("no limit"),
        example: "256",
        doc: "How many connections one address may have open; further ones are closed at once. An IPv6 /64 is one address.",
    },
    Key {
        path: &["clients", "max_requests"],
        kind: Kind::Count,
        default: Default::Words("no limit"),
        example: "100",
        doc: "How many requests in a second one address may make in the long run; those beyond are answered 429.",
    },
    Key {
        path: &["clients", "burst"],
        kind: Kind::Count,
        default: Default::Words("ten times `max_requests`"),
        example: "1000",
        doc: "How many requests one address may make at once, after a while without any.",
    },
    Key {
        path: &["clients", "unlimited"],
        kind: Kind::Networks,
        default: Default::Text(""),
        example: "[\"10.0.0.0/24\"]",
        doc: "Networks for which these limits do not hold: those of a load balancer or of NAT, behind which many clients stand.",
    },
    Key {
        path: &["upstreams", "*", "url"],
        kind: Kind::Url,
        default: Default::Words("that of the built-in upstream of this name; any other needs one"),
        example: "\"https://registry.example.com\"",
        doc: "Where the registry answers, without `/v2`. It may carry a path prefix. `http://` means no TLS.",
    },
    Key {
        path: &["upstreams", "*", "aliases"],
        kind: Kind::Names,
        default: Default::Text(""),
        example: "[\"index.docker.io\", \"registry-1.docker.io\"]",
        doc: "Further names that lead here, as the key does.",
    },
    Key {
        path: &["upstreams", "*", "library"],
        kind: Kind::Flag,
        default: Default::Text("false"),
        example: "true",
        doc: "Whether names of one segment get `library/` in front, as Docker Hub wants them.",
    },
    Key {
        path: &["upstreams", "*", "tag_ttl"],
        kind: Kind::Duration,
        default: Default::Text("1m"),
        example: "\"1m\"",
        doc: "How long a tag is served without asking the upstream whether it moved.",
    },
    Key {
        path: &["upstreams", "*", "tags"],
        kind: Kind::TagRules,
        default: Default::Text(""),
        example: "[{ pattern = \"latest\", ttl = \"30s\" }, { pattern = '*-\\d{8}', immutable = true }]",
        doc: "Other lifetimes for some tags, the first pattern that fits decides. In patterns `*` is any text, `?` any character, `\\d` a digit, \
              `+` repeats what stands before it, `{8}` does so eight times. In a variable: `latest=30s,*-\\d{8}=immutable`.",
    },
    Key {
        path: &["upstreams", "*", "stale_while_revalidate"],
        kind: Kind::Duration,
        default: Default::Text("0s"),
        example: "\"30s\"",
        doc: "How long past its lifetime a tag is still served at once, while the upstream is asked behind the client's back.",
    },
    Key {
        path: &["upstreams", "*", "on_deleted"],
        kind: Kind::Choice(&["remove", "serve"]),
        default: Default::Text("remove"),
        example: "\"serve\"",
        doc: "What becomes of a tag that the upstream deleted: it is gone here too, or, with `\"serve\"`, served on with a warning. By digest \
              what was pulled stays pullable either way.",
    },
    Key {
        path: &["upstreams", "*", "offline"],
        kind: Kind::Flag,
        default: Default::Text("false"),
        example: "true",
        doc: "The same as the switch for all upstreams, for this one.",
    },
    Key {
        path: &["upstreams", "*", "negative_ttl"],
        kind: Kind::Duration,
        default: Default::Text("10s"),
        example: "\"10s\"",
        doc: "How long an upstream's \"not found\" is believed.",
    },
    Key {
        path: &["upstreams", "*", "credentials"],
        kind: Kind::Choice(&["client"]),
        default: Default::Words("none, which means anonymous"),
        example: "\"client\"",
        doc: "`\"client\"` in place of a user name and password: each client shows its own login at this upstream, as `Authorization: \
              Basic`, and is served what that was shown to open, from the cache too. What anyone may pull needs no login. Goes with \
              neither `clients.htpasswd` nor `clients.tokens`, which are shown in the same header, nor with `serve`.",
    },
    Key {
        path: &["upstreams", "*", "client_proof_ttl"],
        kind: Kind::Duration,
        default: Default::Text("10m"),
        example: "\"10m\"",
        doc: "With `credentials = \"client\"`: for how long it is believed that a client's login opens a repository before the upstream \
              is asked again. At most a day.",
    },
    Key {
        path: &["upstreams", "*", "credentials", "username"],
        kind: Kind::Username,
        default: Default::Words("none, which means anonymous"),
        example: "\"robot\"",
        doc: "User name for this upstream.",
    },
    Key {
        path: &["upstreams", "*", "credentials", "password"],
        kind: Kind::Secret,
        default: Default::Words("none, which means anonymous"),
        example: "{ file = \"/run/secrets/registry-password\" }",
        doc: "Password or token: text, `{ file = \"…\" }` (line ends at its end are dropped) or `{ env = \"…\" }`.",
    },
    Key {
        path: &["upstreams", "*", "credentials_for"],
        kind: Kind::Logins,
        default: Default::Words("none"),
        example: "[{ repositories = \"acme\", username = \"robot\", password = { file = \"/run/secrets/acme\" } }]",
        doc: "Other logins for some of the upstream's repositories: those whose names begin with `repositories`, whole segments; the \
              longest wins, `credentials` (or the login file) is for all others. A password is written as above. In a file only: a \
              variable can hold a password that `{ env = \"…\" }` names.",
    },
    Key {
        path: &["upstreams", "*", "serve"],
        kind: Kind::Choice(&["public", "all"]),
        default: Default::Words(
            "`all` on a loopback `listen` or where clients say who they are, else `public`",
        ),
        example: "\"public\"",
        doc: "With credentials: whether clients get only what anyone may pull (`public`) or all that the credentials open (`all`). \
              With `public` the credentials buy rate limit and speed only: a repository is served once an anonymous request has shown, \
              within a day, that anyone may pull it; any other is refused with 403.",
    },
    Key {
        path: &["upstreams", "*", "token_realms"],
        kind: Kind::Hosts,
        default: Default::Text(""),
        example: "[\"auth.docker.io\"]",
        doc: "Further hosts that may receive the credentials: `host` (any port) or `host:port`.",
    },
    Key {
        path: &["upstreams", "*", "redirect_hosts"],
        kind: Kind::HostsOrNetworks,
        default: Default::Text(""),
        example: "[\"storage.example.internal\"]",
        doc: "Further hosts or networks that this upstream may redirect to.",
    },
    Key {
        path: &["upstreams", "*", "mirrors"],
        kind: Kind::Urls,
        default: Default::Text(""),
        example: "[\"https://mirror.example.com\"]",
        doc: "Tried in order when `url` fails.",
    },
    Key {
        path: &["upstreams", "*", "ca_file"],
        kind: Kind::Path,
        default: Default::Words("none, only the system's trust roots"),
        example: "\"/etc/ssl/registry-ca.pem\"",
        doc: "PEM file with a further trust root for this upstream.",
    },
    Key {
        path: &["upstreams", "*", "proxy"],
        kind: Kind::Proxy,
        default: Default::Words("the `proxy` for all upstreams"),
        example: "\"none\"",
        doc: "The same for this upstream and whatever it leads to; `\"none\"` asks it directly. `ca_file` holds for an `https://` proxy too.",
    },
    Key {
        path: &["upstreams", "*", "connections_per_blob"],
        kind: Kind::Count,
        default: Default::Text("8"),
        example: "8",
        doc: "How many connections may fetch one large blob at once.",
    },
    Key {
        path: &["upstreams", "*", "max_connections"],
        kind: Kind::Count,
        default: Default::Text("64"),
        example: "64",
        doc: "How many connections may fetch blobs from this upstream at once.",
    },
    Key {
        path: &["upstreams", "*", "read_ahead"],
        kind: Kind::SizeOrNothing,
        default: Default::Text("16MiB"),
        example: "\"64MiB\"",
        doc: "How much of an image is fetched before its client has asked for it, once it has asked for some of its layers; `0` for nothing.",
    },
];

impl Key {
    /// This key's path; `upstream` takes the place of `*`.
    pub(super) fn path_in(&self, upstream: &str) -> KeyPath {
        let step = |step: &&str| if *step == "*" { upstream } else { step }.to_owned();
        KeyPath(self.path.iter().map(step).collect())
    }

    /// Whether the key belongs to an upstream.
    pub(super) fn is_upstream(&self) -> bool {
        self.path.get(1) == Some(&"*")
    }

    /// Whether a table may stand in place of its value.
    pub(super) fn is_table_too(&self) -> bool {
        keys().any(|key| key.path.len() > self.path.len() && key.path.starts_with(self.path))
    }

    /// The table it is printed in.
    pub(super) fn table(&self) -> &'static [&'static str] {
        let (length, _) = self.placed();
        self.path.get(..length).unwrap_or_default()
    }

    /// Its steps below that table.
    pub(super) fn name(&self) -> &'static [&'static str] {
        let (_, name) = self.placed();
        name
    }

    fn placed(&self) -> (usize, &'static [&'static str]) {
        let length = if self.is_upstream() {
            2
        } else {
            self.path.len().saturating_sub(1)
        };
        (length, self.path.get(length..).unwrap_or_default())
    }
}

impl KeyPath {
    /// The path with these steps.
    pub(super) fn new(steps: &[&str]) -> Self {
        Self(steps.iter().map(|step| (*step).to_owned()).collect())
    }

    /// One step further.
    pub(super) fn child(&self, step: &str) -> Self {
        let mut steps = self.0.clone();
        steps.push(step.to_owned());
        Self(steps)
    }

    /// The last step.
    pub(super) fn last(&self) -> &str {
        self.0.last().map_or("", String::as_str)
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, step) in self.0.iter().enumerate() {
            let dot = if number == 0 { "" } else { "." };
            write!(f, "{dot}{}", step.escape_debug())?;
        }
        Ok(())
    }
}

/// Every key that may be written today.
pub(super) fn keys() -> impl Iterator<Item = &'static Key> {
    ALL.iter().filter(|key| !NOT_YET.contains(&key.path))
}

/// Every key, whether its feature has landed or not: for defaults, which the checked configuration always holds.
pub(super) fn all_keys() -> impl Iterator<Item = &'static Key> {
    ALL.iter()
}

/// What the steps `path` lead to.
pub(super) fn find(path: &KeyPath) -> Found {
    let fits = |pattern: &[&str]| {
        pattern.len() >= path.0.len()
            && pattern
                .iter()
                .zip(&path.0)
                .all(|(step, written)| *step == "*" || step == written)
    };
    let mut found = Found::Nothing;
    for key in keys().filter(|key| fits(key.path)) {
        found = match found {
            _ if key.path.len() == path.0.len() => Found::Key(key),
            Found::Key(key) | Found::Either(key) => Found::Either(key),
            Found::Table | Found::Nothing => Found::Table,
        };
    }
    found
}

/// See [`find`].
#[derive(Debug, Clone, Copy)]
pub(super) enum Found {
    /// A key with a value.
    Key(&'static Key),
    /// A key with a value, or a table in its place.
    Either(&'static Key),
    /// A table that holds keys.
    Table,
    /// No such key.
    Nothing,
}
