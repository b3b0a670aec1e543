//! From text to configuration and back: what is accepted, and the exact words about what is not.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use super::Serve;
use super::keys::{NOT_YET, all_keys, keys};
use super::{
    Config, Contents, Overrides, Settings, Sources, notes, reference, schema, short_lived, show,
    template,
};

/// A folder with a configuration file, and what else a case needs.
struct Case {
    folder: TempDir,
    sources: Sources,
}

impl Case {
    fn file(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        fs::write(&path, text).unwrap();
        let sources = Sources {
            file: Some(path),
            ..Sources::default()
        };
        Self { folder, sources }
    }

    fn variables(text: &str, variables: &[(&str, &str)]) -> Self {
        let mut case = Self::file(text);
        case.sources.environment = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        case
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn load(&self) -> Config {
        Config::load(&self.sources).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The error, with the folder's name left out.
    fn error(&self) -> String {
        let error = Config::load(&self.sources).unwrap_err().to_string();
        error.replace(&format!("{}/", self.folder.path().display()), "")
    }

    fn shown(&self) -> String {
        show(&Settings::read(&self.sources).unwrap())
    }

    fn notes(&self) -> Vec<String> {
        let settings = Settings::read(&self.sources).unwrap();
        let config = self.load();
        let contents = Contents::read(&config, &settings).unwrap();
        notes(&config, &settings, &contents)
    }
}

fn upstream<'a>(config: &'a Config, key: &str) -> &'a super::UpstreamConfig {
    config.upstreams.iter().find(|one| one.key == key).unwrap()
}

#[test]
fn nothing_configured_is_a_configuration() {
    let config = Config::load(&Sources::default()).unwrap();
    assert_eq!(config.listen.to_string(), "[::]:8080");
    assert_eq!(config.admin_listen.to_string(), "127.0.0.1:8081");
    assert_eq!(config.cache_dir, Path::new("/tmp/cache/oci"));
    assert_eq!(config.default_upstream.as_deref(), Some("docker.io"));
    assert_eq!(config.log, None);
    assert_eq!(config.cache, super::CacheConfig::default());
    let keys: Vec<&str> = config
        .upstreams
        .iter()
        .map(|one| one.key.as_str())
        .collect();
    assert_eq!(
        keys,
        [
            "docker.io",
            "gcr.io",
            "ghcr.io",
            "jfrog-docker-reg2.bintray.io",
            "lscr.io",
            "mcr.microsoft.com",
            "nvcr.io",
            "public.ecr.aws",
            "quay.io",
            "registry.access.redhat.com",
            "registry.k8s.io",
        ]
    );
    assert!(short_lived(&config).is_some_and(|note| note.starts_with("cache_dir:")));
}

#[test]
fn built_in_upstreams_know_their_ways() {
    let config = Config::load(&Sources::default()).unwrap();
    let hub = upstream(&config, "docker.io");
    assert_eq!(hub.url.as_str(), "https://registry-1.docker.io/");
    assert_eq!(
        hub.aliases,
        [
            "index.docker.io",
            "registry-1.docker.io",
            "registry.hub.docker.com"
        ]
    );
    assert!(hub.library && !upstream(&config, "quay.io").library);
    assert_eq!(hub.token_realms, ["auth.docker.io"]);
    assert_eq!(hub.rules.tag_ttl, Duration::from_mins(1));
    assert_eq!(hub.rules.negative_ttl, Duration::from_secs(10));
    assert!(hub.credentials.is_none() && hub.mirrors.is_empty());
    assert_eq!((hub.connections_per_blob, hub.max_connections), (8, 64));
    assert_eq!(hub.read_ahead, 16 << 20);
    let bintray = upstream(&config, "jfrog-docker-reg2.bintray.io");
    assert_eq!(bintray.url.as_str(), "https://releases-docker.jfrog.io/");
}

#[test]
fn what_is_served_follows_from_who_can_ask() {
    let credentials = "credentials = { username = \"u\", password = \"p\" }";
    for (listen, lines, served) in [
        ("[::]:1", credentials.to_owned(), Serve::Public),
        ("192.0.2.1:1", credentials.to_owned(), Serve::Public),
        ("127.0.0.1:1", credentials.to_owned(), Serve::All),
        ("[::1]:1", credentials.to_owned(), Serve::All),
        ("[::ffff:127.0.0.1]:1", credentials.to_owned(), Serve::All),
        (
            "[::]:1",
            format!("{credentials}\nserve = \"all\""),
            Serve::All,
        ),
        (
            "127.0.0.1:1",
            format!("{credentials}\nserve = \"public\""),
            Serve::Public,
        ),
    ] {
        let text = format!("listen = \"{listen}\"\n[upstreams.\"quay.io\"]\n{lines}");
        let config = Config::load(&Case::file(&text).sources).unwrap();
        assert_eq!(upstream(&config, "quay.io").serve, served, "{text}");
    }
    let error = Case::file("[upstreams.\"quay.io\"]\nserve = \"some\"").error();
    assert!(error.contains("must be \"public\" or \"all\""), "{error}");
}

#[test]
fn clients_own_logins_take_the_place_of_ours() {
    let with = |lines: &str| Case::file(&format!("[upstreams.\"quay.io\"]\n{lines}"));
    let client = "credentials = \"client\"";
    assert_eq!(upstream(&with("").load(), "quay.io").by_login, None);
    let config = with(client).load();
    let usual = upstream(&config, "quay.io").by_login;
    assert_eq!(usual, Some(Duration::from_mins(10)));
    let config = with(&format!("{client}\nclient_proof_ttl = \"30s\"")).load();
    let said = upstream(&config, "quay.io").by_login;
    assert_eq!(said, Some(Duration::from_secs(30)));
    let name = "OCI_REMOTE_CACHE_UPSTREAMS__QUAY_IO__CREDENTIALS";
    let config = Case::variables("", &[(name, "client")]).load();
    assert!(upstream(&config, "quay.io").by_login.is_some());
    let certificates = with(&format!(
        "{client}\n[tls]\ncert_file = \"{0}\"\nkey_file = \"{0}\"\nclient_ca_file = \"{0}\"",
        "/dev/null"
    ));
    assert!(upstream(&certificates.load(), "quay.io").by_login.is_some());
}

#[test]
fn clients_own_logins_go_with_little_else() {
    let with = |lines: &str| Case::file(&format!("[upstreams.\"quay.io\"]\n{lines}"));
    let client = "credentials = \"client\"";
    let login = "OCI_REMOTE_CACHE_UPSTREAMS__QUAY_IO__CREDENTIALS__USERNAME";
    let both = format!("[upstreams.\"quay.io\"]\n{client}");
    let both = Case::variables(&both, &[(login, "u")]);
    let and = |lines: &str| with(&format!("{client}\n{lines}"));
    for (case, key, why) in [
        (
            with("client_proof_ttl = \"5m\""),
            "client_proof_ttl",
            "means nothing without",
        ),
        (and("serve = \"all\""), "serve", "means nothing with"),
        (
            and("client_proof_ttl = \"0s\""),
            "client_proof_ttl",
            "at most a day",
        ),
        (
            and("client_proof_ttl = \"25h\""),
            "client_proof_ttl",
            "at most a day",
        ),
        (
            and("[clients]\nhtpasswd = \"/dev/null\""),
            "credentials",
            "does not go with clients.htpasswd",
        ),
        (
            and("[clients]\ntokens = \"/dev/null\""),
            "credentials",
            "does not go with clients.tokens",
        ),
        (
            with("credentials = \"clients\""),
            "credentials",
            "must be \"client\"",
        ),
        (both, "credentials.username", "has no place beside"),
    ] {
        let error = case.error();
        assert!(
            error.contains(&format!("upstreams.quay.io.{key}\": ")),
            "{error}"
        );
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn what_clients_must_show_arrives_and_must_fit() {
    let case = Case::file(
        "clients = { htpasswd = \"c.toml\", rules = [\" ci  pull quay.io/** \", \"anonymous deny **\"] }\n\
         tls = { cert_file = \"c.toml\", key_file = \"c.toml\" }",
    );
    let text = fs::read_to_string(case.path("c.toml")).unwrap();
    let file = format!("{:?}", case.path("c.toml"));
    fs::write(case.path("c.toml"), text.replace("\"c.toml\"", &file)).unwrap();
    let config = Config::load(&case.sources).unwrap();
    assert!(config.knows_clients() && config.tls.is_some());
    assert_eq!(
        config.clients.rules,
        ["ci pull quay.io/**", "anonymous deny **"]
    );
    for (text, why) in [
        (
            "clients.rules = [\"ci pull quay.io/**\"]",
            "no client has one",
        ),
        (
            "clients.rules = [\"ci push quay.io/**\"]",
            "second word must be",
        ),
        (
            "clients.htpasswd = \"/nonexistent\"",
            "cannot read the file",
        ),
        ("tls.cert_file = \"/dev/null\"", "needs a key_file"),
        ("tls.key_file = \"/dev/null\"", "needs a cert_file"),
        ("tls.client_ca_file = \"/dev/null\"", "needs a cert_file"),
    ] {
        let error = Case::file(text).error();
        assert!(error.contains(why), "{text}: {error}");
    }
}

#[test]
fn every_key_of_the_file_arrives() {
    let case = Case::file(
        r#"
        listen = "127.0.0.1:0"
        admin_listen = "127.0.0.1:0"
        cache_dir = "/var/cache/x"
        default_upstream = "alias.example"
        log = "warn,upstream=debug"
        trusted_networks = ["198.18.0.0/15"]
        [cache]
        max_size = "50GiB"
        max_blob = 1000
        [upstreams."corp.example"]
        url = "http://corp.example:5000/prefix/"
        aliases = ["alias.example"]
        library = true
        tag_ttl = "1.5s"
        negative_ttl = "0s"
        read_ahead = 0
        credentials = { username = "$oauthtoken", password = "p" }
        token_realms = ["Auth.Example:8443"]
        redirect_hosts = ["CDN.example", "10.0.0.0/8", "s3.example:9000"]
        [upstreams."docker.io"]
        tag_ttl = "3600s"
        "#,
    );
    let config = case.load();
    assert_eq!(config.default_upstream.as_deref(), Some("corp.example"));
    assert_eq!(config.log.as_deref(), Some("warn,upstream=debug"));
    assert_eq!(config.cache.max_size, Some(50 << 30));
    assert_eq!(config.cache.max_blob, Some(1000));
    let corp = upstream(&config, "corp.example");
    assert_eq!(corp.url.as_str(), "http://corp.example:5000/prefix");
    assert_eq!(corp.rules.tag_ttl, Duration::from_millis(1500));
    assert_eq!(
        (corp.rules.negative_ttl, corp.read_ahead),
        (Duration::ZERO, 0)
    );
    assert_eq!(corp.token_realms, ["auth.example:8443"]);
    let places = ["cdn.example", "10.0.0.0/8", "s3.example:9000"];
    let networks = config.trusted_networks == ["198.18.0.0/15"];
    assert!(corp.redirect_hosts == places && networks && corp.library);
    let credentials = corp.credentials.as_ref().unwrap();
    assert_eq!(credentials.username, "$oauthtoken");
    assert_eq!(credentials.password.expose(), "p");
    // A section of a built-in upstream overrides it key by key.
    let hub = upstream(&config, "docker.io");
    assert_eq!(hub.rules.tag_ttl, Duration::from_hours(1));
    assert!(hub.library && hub.url.as_str() == "https://registry-1.docker.io/");
    assert!(!format!("{config:?}").contains("\"p\""));
}

#[test]
fn an_empty_default_upstream_is_none() {
    let case = Case::file("default_upstream = \"\"");
    assert_eq!(case.load().default_upstream, None);
    assert!(case.notes().concat().contains("default_upstream"));
}

/// Files with one slip, and the line that tells it.
const BAD_FILES: &[(&str, &str)] = &[
    (
        "listn = \"x\"",
        r#"c.toml:1: key "listn": unknown key; did you mean "listen"?"#,
    ),
    (
        "\n[upstreams.\"docker.io\"]\n\ntag_tll = \"1m\"",
        r#"c.toml:4: key "upstreams.docker.io.tag_tll": unknown key; did you mean "tag_ttl"?"#,
    ),
    (
        "[upstream.\"docker.io\"]",
        r#"c.toml:1: key "upstream": unknown key; did you mean "upstreams"?"#,
    ),
    (
        "[upstreams.docker.io]\nlibrary = true",
        r#"c.toml:1: key "upstreams.docker.io": unknown key; a name with dots needs quotes, as in [upstreams."docker.io"]"#,
    ),
    (
        "max_size = \"1GiB\"",
        r#"c.toml:1: key "max_size": unknown key; did you mean "cache.max_size"?"#,
    ),
    (
        "[cache]\nlisten = \"[::]:80\"",
        r#"c.toml:2: key "cache.listen": unknown key; did you mean "listen"?"#,
    ),
    (
        "tag_ttl = \"1m\"",
        r#"c.toml:1: key "tag_ttl": unknown key; did you mean "upstreams.<key>.tag_ttl"?"#,
    ),
    (
        "[upstreams.\"docker.io\"]\nusername = \"u\"",
        r#"c.toml:2: key "upstreams.docker.io.username": unknown key; did you mean "upstreams.docker.io.credentials.username"?"#,
    ),
    ("zzz = 1", r#"c.toml:1: key "zzz": unknown key"#),
    ("\"a\\nb\" = 1", r#"c.toml:1: key "a\nb": unknown key"#),
    (
        "listen = 8080",
        r#"c.toml:1: key "listen": must be a string, found an integer"#,
    ),
    (
        "cache = 1",
        r#"c.toml:1: key "cache": must be a table, found an integer"#,
    ),
    (
        "cache_dir = { a = 1 }",
        r#"c.toml:1: key "cache_dir": must be a string, found a table"#,
    ),
    (
        "cache_dir = \"\"",
        r#"c.toml:1: key "cache_dir": must be a path in UTF-8, not empty"#,
    ),
    (
        "cache_dir = \"~/cache\"",
        r#"c.toml:1: key "cache_dir": ~ is not expanded: write the whole path in place of "~/cache", or "./~/cache" where that is the name"#,
    ),
    (
        "listen = \":8080\"",
        r#"c.toml:1: key "listen": bad address ":8080": the part before the port must be an IP address, as in "[::]:8080" or "127.0.0.1:8080""#,
    ),
    (
        "listen = \"localhost\"",
        r#"c.toml:1: key "listen": bad address "localhost": write it like "[::]:8080" or "127.0.0.1:8080""#,
    ),
    (
        "admin_listen = \"127.0.0.1:8080\"",
        r#"c.toml:1: key "admin_listen": 127.0.0.1:8080 is taken by listen = "[::]:8080"; give it another port"#,
    ),
    (
        "[cache]\nmax_size = \"lots\"",
        r#"c.toml:2: key "cache.max_size": bad size "lots": write it like "50GiB", "500MB" or as plain bytes"#,
    ),
    (
        "cache.max_size = -1",
        r#"c.toml:1: key "cache.max_size": bad size: must be at least 1 byte"#,
    ),
    (
        "cache.max_size = 0",
        r#"c.toml:1: key "cache.max_size": bad size: must be at least 1 byte"#,
    ),
    (
        "cache.max_size = 1.5",
        r#"c.toml:1: key "cache.max_size": must be a size like "50GiB", found a float"#,
    ),
    (
        "upstreams.\"quay.io\".tag_ttl = \"soon\"",
        r#"c.toml:1: key "upstreams.quay.io.tag_ttl": bad duration "soon": write it like "10s", "1m" or "1h30m""#,
    ),
    (
        "upstreams.\"quay.io\".tag_ttl = 60",
        r#"c.toml:1: key "upstreams.quay.io.tag_ttl": must be a string like "1m", found an integer"#,
    ),
    (
        "upstreams.\"quay.io\".tag_ttl = \"60\"",
        r#"c.toml:1: key "upstreams.quay.io.tag_ttl": bad duration "60": a unit is missing (ms, s, m, h or d), as in "60s""#,
    ),
    (
        "upstreams.\"quay.io\".library = \"yes\"",
        r#"c.toml:1: key "upstreams.quay.io.library": must be true or false, found a string"#,
    ),
    (
        "log = \"upstream=loud\"",
        r#"c.toml:1: key "log": bad log filter "upstream=loud": error parsing level filter: expected one of "off", "error", "warn", "info", "debug", "trace", or a number 0-5"#,
    ),
    (
        "log = \"inof\"",
        r#"c.toml:1: key "log": bad log filter "inof": "inof" is no level; did you mean "info"?"#,
    ),
    (
        "default_upstream = \"dockr.io\"",
        r#"c.toml:1: key "default_upstream": no upstream is called "dockr.io"; did you mean "docker.io"?"#,
    ),
    ("a = 1\na = 2", "c.toml:2: not valid TOML: duplicate key"),
];

#[test]
fn bad_files_get_one_exact_line() {
    for (text, error) in BAD_FILES {
        assert_eq!(Case::file(text).error(), *error, "{text}");
    }
}

/// The same for sections of upstreams.
const BAD_UPSTREAMS: &[(&str, &str)] = &[
    (
        "[upstreams.\"qay.io\"]",
        r#"c.toml:1: key "upstreams.qay.io": has no url and is not built in; did you mean "quay.io"?"#,
    ),
    (
        "[upstreams.\"a/b\"]",
        r#"c.toml:1: key "upstreams.a/b": bad name "a/b": must be one path segment, made of letters, digits, '.', '-', '_' and ':'"#,
    ),
    (
        "[upstreams.Corp]",
        r#"c.toml:1: key "upstreams.Corp": bad name "Corp": must be lower case"#,
    ),
    (
        "[upstreams.x]\nurl = \"registry:5000\"",
        r#"c.toml:2: key "upstreams.x.url": bad url "registry:5000": must begin with https:// or http://"#,
    ),
    (
        "[upstreams.x]\nurl = \"https://u:hunter2@h\"",
        r#"c.toml:2: key "upstreams.x.url": bad url: user name and password do not belong in it; use credentials"#,
    ),
    (
        "[upstreams.x]\nurl = \"https://h/v2/\"",
        r#"c.toml:2: key "upstreams.x.url": bad url "https://h/v2/": leave out /v2, it is added to every request"#,
    ),
    (
        "[upstreams.x]\nurl = \"https://h\"\naliases = \"y\"",
        r#"c.toml:3: key "upstreams.x.aliases": must be an array of strings, found a string"#,
    ),
    (
        "[upstreams.x]\nurl = \"https://h\"\naliases = [\"quay.io\"]",
        r#"c.toml:3: key "upstreams.x.aliases": "quay.io" is an upstream of its own"#,
    ),
    (
        "[upstreams.a]\nurl = \"https://h\"\naliases = [\"index.docker.io\"]",
        r#"c.toml:3: key "upstreams.a.aliases": "index.docker.io" is an alias of "docker.io" already"#,
    ),
    (
        "[upstreams.x]\nurl = \"https://h\"\naliases = [\"index.docker.io\"]",
        r#"c.toml:3: key "upstreams.x.aliases": "index.docker.io" is an alias of "docker.io" already"#,
    ),
    (
        "[upstreams.\"index.docker.io\"]\nurl = \"https://h\"",
        r#"c.toml:1: key "upstreams.index.docker.io": is an alias of the upstream "docker.io" already"#,
    ),
    (
        "upstreams.\"ghcr.io\".token_realms = [\"https://auth\"]",
        r#"c.toml:1: key "upstreams.ghcr.io.token_realms": bad host "https://auth": write "host" or "host:port", without scheme, path or wildcard"#,
    ),
    (
        "upstreams.\"ghcr.io\".credentials.username = \"u\"",
        r#"c.toml:1: key "upstreams.ghcr.io.credentials.username": needs a password beside it"#,
    ),
    (
        "upstreams.\"ghcr.io\".credentials.password = \"hunter2\"",
        r#"c.toml:1: key "upstreams.ghcr.io.credentials.password": needs a username beside it"#,
    ),
    (
        "upstreams.\"ghcr.io\".credentials = { username = \"u\", password = \"\" }",
        r#"c.toml:1: key "upstreams.ghcr.io.credentials.password": is empty"#,
    ),
    (
        "upstreams.\"ghcr.io\".credentials = { username = \"u:x\", password = \"p\" }",
        r#"c.toml:1: key "upstreams.ghcr.io.credentials.username": must be a user name: not empty, no colon, no control characters"#,
    ),
    (
        "upstreams.\"ghcr.io\".credentials = { username = \"u\", password = { fil = \"x\" } }",
        r#"c.toml:1: key "upstreams.ghcr.io.credentials.password": must be a string, { file = "…" } or { env = "…" }"#,
    ),
    (
        "upstreams.\"ghcr.io\".credentials = { username = \"u\", password = { file = \"/nowhere/p\" } }",
        r#"c.toml:1: key "upstreams.ghcr.io.credentials.password": cannot read the file /nowhere/p: No such file or directory (os error 2)"#,
    ),
    (
        "upstreams.\"ghcr.io\".credentials = { username = \"u\", password = { env = \"NOT_SET\" } }",
        r#"c.toml:1: key "upstreams.ghcr.io.credentials.password": the environment variable NOT_SET is not set"#,
    ),
    (
        "upstreams.\"ghcr.io\".ca_file = \"/nowhere/ca\"",
        r#"c.toml:1: key "upstreams.ghcr.io.ca_file": cannot read the file /nowhere/ca: No such file or directory (os error 2)"#,
    ),
];

#[test]
fn bad_upstreams_get_one_exact_line() {
    for (text, error) in BAD_UPSTREAMS {
        assert_eq!(Case::file(text).error(), *error, "{text}");
    }
}

#[test]
fn several_slips_are_several_lines_from_the_top() {
    let error = Case::file("zzz = 1\nlisen = 1\n[cache]\nyyy = 1").error();
    let lines: Vec<&str> = error.lines().collect();
    assert_eq!(lines.len(), 3);
    assert!(lines[0].starts_with("c.toml:1: ") && lines[2].starts_with("c.toml:4: "));
}

#[test]
fn one_slip_that_all_upstreams_inherit_is_one_line() {
    let error = Case::file("proxy = { env = \"NOPE\" }").error();
    assert_eq!(
        error,
        "c.toml:1: key \"proxy\": the environment variable NOPE is not set"
    );
    let two = "[upstreams.\"quay.io\"]\nproxy = { env = \"NOPE\" }\n[upstreams.\"ghcr.io\"]\nproxy = { env = \"NOPE\" }";
    assert_eq!(Case::file(two).error().lines().count(), 2);
}

#[test]
fn syntax_errors_have_a_line_and_show_no_secret() {
    let error = Case::file("\nlisten = \"x\"\npassword = \"hunter2\n").error();
    assert!(error.starts_with("c.toml:3: not valid TOML: "), "{error}");
    assert!(!error.contains("hunter2") && !error.contains('\n'));
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let case = Case::file("");
    let mut sources = case.sources.clone();
    sources.file = Some(case.path("none.toml"));
    let error = Config::load(&sources).unwrap_err().to_string();
    assert!(
        error.ends_with("none.toml: cannot read this file: No such file or directory (os error 2)")
    );
    sources.file = Some(case.folder.path().to_owned());
    let error = Config::load(&sources).unwrap_err().to_string();
    assert!(
        error.contains(": cannot read this file: Is a directory"),
        "{error}"
    );
    fs::write(case.path("c.toml"), b"listen = \"\xff\"").unwrap();
    assert!(
        case.error().starts_with("c.toml: cannot read this file: "),
        "{}",
        case.error()
    );
}

#[test]
fn cache_dir_must_not_be_a_file() {
    let case = Case::file("");
    fs::write(case.path("f"), "").unwrap();
    fs::write(
        case.path("c.toml"),
        format!("cache_dir = {:?}", case.path("f")),
    )
    .unwrap();
    assert_eq!(
        case.error(),
        "c.toml:1: key \"cache_dir\": f is there and is no folder"
    );
}

#[test]
fn keys_to_come_are_unknown() {
    for path in NOT_YET {
        assert!(all_keys().any(|key| key.path == *path), "{path:?}");
        let name = path.last().unwrap();
        let text = if path.len() == 1 {
            format!("{name} = []")
        } else {
            format!("[upstreams.\"docker.io\"]\n{name} = 1")
        };
        let error = Case::file(&text).error();
        assert!(error.contains(": unknown key"), "{error}");
        assert!(!template().contains(&format!("\n#{name} =")));
        assert!(!reference().contains(&format!("`{name}`")));
        assert!(!schema().contains(&format!("\"{name}\":")));
    }
}

#[test]
fn secrets_come_from_files_and_variables() {
    let case = Case::variables("", &[("TOKEN", "from-env")]);
    fs::write(case.path("p"), "from file\r\n").unwrap();
    let text = format!(
        "[upstreams.\"ghcr.io\".credentials]\nusername = \"u\"\npassword = {{ file = {:?} }}\n\
         [upstreams.\"quay.io\".credentials]\nusername = \"u\"\npassword = {{ env = \"TOKEN\" }}\n",
        case.path("p")
    );
    fs::write(case.path("c.toml"), text).unwrap();
    let config = case.load();
    let password = |key| {
        let credentials = upstream(&config, key).credentials.clone().unwrap();
        credentials.password.expose().to_owned()
    };
    assert_eq!(password("ghcr.io"), "from file");
    assert_eq!(password("quay.io"), "from-env");
    let shown = case.shown();
    assert!(shown.contains("credentials.password = \"***\""));
    assert!(!shown.contains("from file") && !shown.contains("from-env"));
    assert!(!format!("{:?}", case.sources).contains("from-env"));
    let settings = Settings::read(&case.sources).unwrap();
    assert!(!format!("{config:?}{settings:?}").contains("from"));
}

#[test]
fn some_repositories_have_logins_of_their_own() {
    let case = Case::variables("", &[("OCI_REMOTE_CACHE_ACME", "from-env")]);
    fs::write(case.path("p"), "from file\n").unwrap();
    let text = format!(
        "[upstreams.\"ghcr.io\"]\ncredentials_for = [\n\
         {{ repositories = \"acme\", username = \"robot\", password = {{ file = {:?} }} }},\n\
         {{ repositories = \"acme/apps/**\", username = \"apps\", password = {{ env = \"OCI_REMOTE_CACHE_ACME\" }} }},\n]",
        case.path("p")
    );
    fs::write(case.path("c.toml"), text).unwrap();
    let config = case.load();
    let logins = &upstream(&config, "ghcr.io").credentials_for;
    let seen: Vec<_> = logins
        .iter()
        .map(|(prefix, login)| {
            (
                prefix.as_str(),
                login.username.as_str(),
                login.password.expose(),
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("acme", "robot", "from file"),
            ("acme/apps", "apps", "from-env")
        ]
    );
    assert_eq!(logins[0].1.password_file, Some(case.path("p")));
    let shown = case.shown();
    let line = "credentials_for = [{ repositories = \"acme\", username = \"robot\", password = \"***\" }, {";
    assert!(shown.contains(line), "{shown}");
    let settings = Settings::read(&case.sources).unwrap();
    assert!(!format!("{shown}{config:?}{settings:?}").contains("from-env"));
}

#[test]
fn bad_logins_for_repositories_are_told() {
    let login = "repositories = \"acme\", username = \"u\", password = \"hunter2\"";
    for (written, why) in [
        ("\"acme=u:p\"".to_owned(), "must be an array of"),
        ("[\"acme\"]".to_owned(), "login 1 must be {"),
        (
            format!("[{{ {login} }}, {{ {login} }}]"),
            "login 2 is a second one for \"acme\"",
        ),
        (
            format!("[{{ {login}, user = \"u\" }}]"),
            "did you mean \"username\"?",
        ),
        (
            "[{ username = \"u\", password = \"hunter2\" }]".to_owned(),
            "needs repositories",
        ),
        (
            format!("[{{ {} }}]", login.replace("acme", "Acme/*")),
            "bad repositories \"Acme/*\"",
        ),
        (
            format!("[{{ {} }}]", login.replace("hunter2", "")),
            "is empty",
        ),
        (
            "[{ repositories = \"a\", username = \"u\" }]".to_owned(),
            "needs a password",
        ),
    ] {
        let error = Case::file(&format!(
            "[upstreams.\"ghcr.io\"]\ncredentials_for = {written}"
        ))
        .error();
        assert!(error.contains("credentials_for"), "{error}");
        assert!(error.contains(why) && !error.contains("hunter2"), "{error}");
    }
    let name = "OCI_REMOTE_CACHE_UPSTREAMS__GHCR_IO__CREDENTIALS_FOR";
    let error = Case::variables("", &[(name, "acme=u:p")]).error();
    assert!(error.contains("in a file"), "{error}");
}

#[test]
fn variables_override_the_file_and_flags_both() {
    let mut case = Case::variables(
        "listen = \"127.0.0.1:1\"\nadmin_listen = \"127.0.0.1:2\"\ncache_dir = \"/file\"\n\
         [upstreams.\"my-reg:5000\"]\nurl = \"https://r\"",
        &[
            ("OCI_REMOTE_CACHE_LISTEN", "127.0.0.1:11"),
            ("OCI_REMOTE_CACHE_ADMIN_LISTEN", "127.0.0.1:12"),
            ("OCI_REMOTE_CACHE_CACHE__MAX_SIZE", "1GiB"),
            (
                "OCI_REMOTE_CACHE_UPSTREAMS__DOCKER_IO__ALIASES",
                "a.example, b.example",
            ),
            ("OCI_REMOTE_CACHE_UPSTREAMS__DOCKER_IO__LIBRARY", "false"),
            (
                "OCI_REMOTE_CACHE_UPSTREAMS__DOCKER_IO__CREDENTIALS__USERNAME",
                "u",
            ),
            (
                "OCI_REMOTE_CACHE_UPSTREAMS__DOCKER_IO__CREDENTIALS__PASSWORD__ENV",
                "OCI_REMOTE_CACHE_P",
            ),
            ("OCI_REMOTE_CACHE_P", "p"),
            ("OCI_REMOTE_CACHE_UPSTREAMS__MY_REG_5000__TAG_TTL", "1h"),
            ("CACHE_DIRECTORY", "/systemd"),
            ("PATH", "/bin"),
        ],
    );
    case.sources.overrides = Overrides {
        listen: Some("127.0.0.1:21".to_owned()),
        ..Overrides::default()
    };
    let config = case.load();
    assert_eq!(config.listen.port(), 21);
    assert_eq!(config.admin_listen.port(), 12);
    assert_eq!(config.cache_dir, Path::new("/file"));
    assert_eq!(config.cache.max_size, Some(1 << 30));
    let hub = upstream(&config, "docker.io");
    assert_eq!(hub.aliases, ["a.example", "b.example"]);
    assert!(!hub.library);
    assert_eq!(hub.credentials.as_ref().unwrap().password.expose(), "p");
    assert_eq!(
        upstream(&config, "my-reg:5000").rules.tag_ttl,
        Duration::from_hours(1)
    );
    let shown = case.shown();
    for line in [
        "listen = \"127.0.0.1:21\"  # flag --listen",
        "admin_listen = \"127.0.0.1:12\"  # env OCI_REMOTE_CACHE_ADMIN_LISTEN",
        "tag_ttl = \"1h\"  # env OCI_REMOTE_CACHE_UPSTREAMS__MY_REG_5000__TAG_TTL",
        "[upstreams.\"docker.io\"]  # built in",
        "url = \"https://registry-1.docker.io\"  # built in",
        "negative_ttl = \"10s\"  # default",
        "read from env OCI_REMOTE_CACHE_P\n",
        "c.toml:3\n",
    ] {
        assert!(shown.contains(line), "{line}\n{shown}");
    }
}

#[test]
fn bad_variables_and_flags_get_one_exact_line() {
    let two =
        "[upstreams.\"my.reg\"]\nurl = \"https://a\"\n[upstreams.\"my-reg\"]\nurl = \"https://b\"";
    for (text, name, value, error) in [
        (
            "",
            "OCI_REMOTE_CACHE_LISTN",
            "x",
            "environment variable OCI_REMOTE_CACHE_LISTN: no such key; did you mean OCI_REMOTE_CACHE_LISTEN?",
        ),
        (
            "",
            "OCI_REMOTE_CACHE_CACHE_MAX_SIZE",
            "x",
            "environment variable OCI_REMOTE_CACHE_CACHE_MAX_SIZE: no such key; did you mean OCI_REMOTE_CACHE_CACHE__MAX_SIZE?",
        ),
        (
            "",
            "OCI_REMOTE_CACHE_CACHE__MAX_SIZE",
            "x",
            "environment variable OCI_REMOTE_CACHE_CACHE__MAX_SIZE: key \"cache.max_size\": bad size \"x\": write it like \"50GiB\", \"500MB\" or as plain bytes",
        ),
        (
            "",
            "OCI_REMOTE_CACHE_UPSTREAMS__DOCKER_IO__LIBRARY",
            "yes",
            "environment variable OCI_REMOTE_CACHE_UPSTREAMS__DOCKER_IO__LIBRARY: key \"upstreams.docker.io.library\": must be true or false, found a string",
        ),
        (
            two,
            "OCI_REMOTE_CACHE_UPSTREAMS__MY_REG__TAG_TTL",
            "1m",
            "environment variable OCI_REMOTE_CACHE_UPSTREAMS__MY_REG__TAG_TTL: fits two keys, \"upstreams.my-reg.tag_ttl\" and \"upstreams.my.reg.tag_ttl\"; set it in the file instead",
        ),
        (
            "",
            "OCI_REMOTE_CACHE_LOG",
            "\u{fffd}",
            "environment variable OCI_REMOTE_CACHE_LOG: is not UTF-8",
        ),
    ] {
        assert_eq!(Case::variables(text, &[(name, value)]).error(), error);
    }
    let mut case = Case::variables(two, &[]);
    case.load();
    case.sources.overrides.listen = Some("80".to_owned());
    assert_eq!(
        case.error(),
        "flag --listen: key \"listen\": bad address \"80\": write it like \"[::]:8080\" or \"127.0.0.1:8080\""
    );
    let prefix = "OCI_REMOTE_CACHE_UPSTREAMS__QUAY_IO__CREDENTIALS__PASSWORD";
    let (file, text) = (format!("{prefix}__FILE"), prefix.to_owned());
    let case = Case::variables("", &[(&text, "hunter2"), (&file, "/p")]);
    assert_eq!(
        case.error(),
        format!(
            "environment variable {file}: key \"upstreams.quay.io.credentials.password\": is set by a second variable too; keep one"
        )
    );
}

#[test]
fn variables_never_lead_to_another_upstream() {
    let told = |name: &str| {
        let error = Case::variables("", &[(name, "https://x")]).error();
        error.split_once(": ").unwrap().1.to_owned()
    };
    let none = "no upstream is called so, and a variable can add none: write a section [upstreams.\"…\"] with its url in the file";
    for name in [
        "OCI_REMOTE_CACHE_UPSTREAMS__FOO_EXAMPLE__URL",
        "OCI_REMOTE_CACHE_UPSTREAMS__FOO_EXAMPLE",
        "OCI_REMOTE_CACHE_UPSTREAMS_FOO_EXAMPLE_URL",
    ] {
        assert_eq!(told(name), none, "{name}");
    }
    for name in ["QAY_IO", "QUAY_IO_2", "QUAY_IO2"] {
        let error = told(&format!("OCI_REMOTE_CACHE_UPSTREAMS__{name}__URL"));
        assert_eq!(error, format!("{none}; did you mean \"QUAY_IO\"?"));
    }
    for name in [
        "OCI_REMOTE_CACHE_UPSTREAMS__QUAY_IO__TAG_TLL",
        "OCI_REMOTE_CACHE_UPSTREAMS_QUAY_IO_TAG_TTL",
    ] {
        let meant = "no such key; did you mean OCI_REMOTE_CACHE_UPSTREAMS__QUAY_IO__TAG_TTL?";
        assert_eq!(told(name), meant);
    }
    assert!(told("OCI_REMOTE_CACHE_CONFIG").contains("--config"));
}

#[test]
fn kubernetes_service_links_are_no_keys() {
    Case::variables(
        "",
        &[
            ("OCI_REMOTE_CACHE_SERVICE_HOST", "10.0.0.1"),
            ("OCI_REMOTE_CACHE_SERVICE_PORT", "8080"),
            ("OCI_REMOTE_CACHE_SERVICE_PORT_HTTP", "8080"),
            ("OCI_REMOTE_CACHE_PORT", "tcp://10.0.0.1:8080"),
            ("OCI_REMOTE_CACHE_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
            ("OCI_REMOTE_CACHE_PORT_8080_TCP_ADDR", "10.0.0.1"),
            ("OCI_REMOTE_CACHE_ADMIN_SERVICE_HOST", "10.0.0.2"),
            ("OCI_REMOTE_CACHE_ADMIN_PORT_8081_TCP_PROTO", "tcp"),
        ],
    )
    .load();
    let case = Case::variables("", &[("OCI_REMOTE_CACHE_PORT", "8080")]);
    assert!(case.error().contains("OCI_REMOTE_CACHE_PORT: no such key"));
}

#[test]
fn systemd_gives_the_folder_where_nothing_else_does() {
    let case = Case::variables("", &[("CACHE_DIRECTORY", "/var/cache/a:/var/cache/b")]);
    assert_eq!(case.load().cache_dir, Path::new("/var/cache/a"));
    assert!(
        case.shown()
            .contains("cache_dir = \"/var/cache/a\"  # env CACHE_DIRECTORY")
    );
}

#[test]
fn what_is_shown_reads_back_the_same() {
    let case = Case::file(
        "cache.max_size = \"1.5GiB\"\nlog = \"info\"\n[upstreams.\"c\"]\nurl = \"https://c/a\\u0022b\"\n\
         tag_ttl = \"90m\"\ncredentials = { username = \"a\\\\b\\\"c\", password = \"p\" }\n",
    );
    let shown = case.shown();
    let again = Case::file(&shown);
    let (first, second) = (case.load(), again.load());
    assert_eq!(format!("{first:?}"), format!("{second:?}"));
    let without_comments = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines
            .map(|line| line.split("  # ").next().unwrap().to_owned())
            .collect()
    };
    assert_eq!(without_comments(&shown), without_comments(&again.shown()));
}

#[test]
fn the_template_sets_nothing_and_is_right_when_uncommented() {
    let as_is = Case::file(&template());
    let defaults = Config::load(&Sources::default()).unwrap();
    assert_eq!(format!("{:?}", as_is.load()), format!("{defaults:?}"));
    let uncommented: Vec<&str> = template()
        .leak()
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(setting) if !setting.starts_with(' ') => setting,
            _ => line,
        })
        .collect();
    let case = Case::file(&uncommented.join("\n"));
    let settings = Settings::read(&case.sources).unwrap_or_else(|error| panic!("{error}"));
    for key in keys().filter(|key| !key.is_table_too()) {
        let path = key.path_in("registry.example.com");
        assert!(
            settings.get(&path).is_some_and(|it| it.origin.is_set()),
            "{path}"
        );
    }
}

#[test]
fn examples_and_defaults_suit_their_keys() {
    for key in all_keys() {
        let text = match key.path {
            ["upstreams", "*", rest @ ..] => {
                format!("[upstreams.x]\n{} = {}", rest.join("."), key.example)
            }
            path => format!("{} = {}", path.join("."), key.example),
        };
        if !NOT_YET.contains(&key.path) {
            let case = Case::file(&text);
            Settings::read(&case.sources).unwrap_or_else(|error| panic!("{error}"));
        }
        assert!(key.doc.ends_with('.'), "{}", key.doc);
    }
}

#[test]
fn the_schema_is_json_and_knows_every_key() {
    let schema: serde_json::Value = serde_json::from_str(&schema()).unwrap();
    for key in keys() {
        let mut at = &schema;
        for step in key.path {
            at = match *step {
                "*" => &at["additionalProperties"],
                step if at["anyOf"].is_array() => &at["anyOf"][1]["properties"][step],
                step => &at["properties"][step],
            };
        }
        let doc = at["description"].as_str().unwrap();
        assert!(doc.starts_with(key.doc), "{:?}", key.path);
    }
    assert_eq!(schema["additionalProperties"], false);
    assert_eq!(schema["properties"]["listen"]["default"], "[::]:8080");
    let library =
        &schema["properties"]["upstreams"]["additionalProperties"]["properties"]["library"];
    assert_eq!(library["default"], false);
}

#[test]
fn the_reference_tells_every_key_and_its_variable() {
    let page = reference();
    for key in keys() {
        assert!(page.contains(&format!("\n### `{}`\n", key.name().join("."))));
    }
    for variable in [
        "OCI_REMOTE_CACHE_CACHE__MAX_SIZE",
        "OCI_REMOTE_CACHE_UPSTREAMS__<KEY>__CREDENTIALS__PASSWORD",
    ] {
        assert!(
            page.contains(&format!("- Variable: `{variable}`\n")),
            "{page}"
        );
    }
}

#[test]
fn every_variable_on_the_page_sets_its_key() {
    let page = reference();
    for key in keys() {
        let title = format!("\n### `{}`\n", key.name().join("."));
        let table = page.split("\n## ").find(|table| {
            let title = match key.table() {
                [] => "Top level".to_owned(),
                ["upstreams", ..] => "`[upstreams.".to_owned(),
                table => format!("`[{}]`", table.join(".")),
            };
            table.starts_with(&title)
        });
        let (_, told) = table.unwrap().split_once(&title).unwrap();
        let told = told.split("\n### ").next().unwrap();
        let Some((_, variable)) = told.split_once("- Variable: `") else {
            assert_eq!(key.path, ["upstreams", "*", "credentials_for"]);
            continue;
        };
        let variable = variable.split('`').next().unwrap();
        let variable = variable.replace("<KEY>", "QUAY_IO");
        let example = key.example.trim_matches('"').to_owned();
        let case = Case::variables("", &[(&variable, &example)]);
        // Values in a file's own form are refused, but as values of this very key.
        match Settings::read(&case.sources) {
            Ok(settings) => {
                let path = key.path_in("quay.io");
                assert!(settings.get(&path).unwrap().origin.is_set(), "{variable}");
            }
            Err(error) => {
                let named = format!("{variable}: key \"{}\": ", key.path_in("quay.io"));
                assert!(error.to_string().contains(&named), "{error}");
            }
        }
    }
}

#[test]
fn what_is_noteworthy_is_noted() {
    let case = Case::file(
        "cache.max_size = 10\ncache.max_blob = 20\n[upstreams.corp]\nurl = \"http://corp.example\"\n\
         credentials = { username = \"u\", password = \"hunter2\" }\n",
    );
    fs::set_permissions(case.path("c.toml"), fs::Permissions::from_mode(0o644)).unwrap();
    let notes = case.notes().join("\n");
    for note in [
        "cache.max_blob: is larger",
        "upstreams.corp: sends its credentials in the clear",
        "upstreams.corp: repositories of docker.io whose names begin with corp/",
        "upstreams.corp.credentials.password: is written in",
        "upstreams.corp: serves only repositories that anyone may pull",
    ] {
        assert!(notes.contains(note), "{note}\n{notes}");
    }
    assert!(!notes.contains("hunter2"));
    fs::set_permissions(case.path("c.toml"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(case.notes().len(), 4);
    assert!(Case::file("").notes().is_empty());
}

#[test]
fn settings_without_effect_are_noted() {
    let serve = "upstreams.quay.io: serve has no effect, since it has no credentials";
    let connections =
        "upstreams.quay.io: connections_per_blob is larger than max_connections, which decides";
    let login = "credentials = { username = \"u\", password = { env = \"P\" } }";
    for (lines, noted) in [
        ("serve = \"all\"".to_owned(), vec![serve]),
        (format!("serve = \"public\"\n{login}"), vec![]),
        (
            "connections_per_blob = 9\nmax_connections = 8".to_owned(),
            vec![connections],
        ),
        // Nobody said what is without effect.
        ("max_connections = 4".to_owned(), vec![]),
    ] {
        let text = format!("listen = \"127.0.0.1:1\"\n[upstreams.\"quay.io\"]\n{lines}");
        assert_eq!(Case::variables(&text, &[("P", "p")]).notes(), noted);
    }
    let files = Case::variables(
        "[upstreams.\"quay.io\"]\nserve = \"all\"",
        &[("DOCKER_AUTH_CONFIG", "{}")],
    );
    assert_eq!(files.notes(), [""; 0]);
}

#[test]
fn files_that_name_nobody_are_noted() {
    let case = Case::file("");
    let files = [("htpasswd", "# nobody yet\n"), ("tokens", "")];
    let lines = files.map(|(key, text)| {
        fs::write(case.path(key), text).unwrap();
        format!("{key} = {:?}\n", case.path(key))
    });
    let text = format!("[clients]\n{}", lines.concat());
    fs::write(case.path("c.toml"), text).unwrap();
    assert_eq!(
        case.notes(),
        [
            "clients.htpasswd: the file names no client: nobody can log in with a password",
            "clients.tokens: the file names no client: nobody can log in with a token",
        ]
    );
    fs::write(case.path("tokens"), "ci 0123456789abcdef").unwrap();
    assert_eq!(case.notes().len(), 1);
}

#[test]
fn rules_that_decide_about_nothing_are_noted() {
    let case = Case::file("");
    let hash = "$2y$05$abcdefghijklmnopqrstuu5s0jRuhd0ehz1yUQ9oKr4nWlk4sLoQe";
    fs::write(case.path("h"), format!("alice:{hash}\n")).unwrap();
    fs::write(case.path("t"), "builder 0123456789abcdef\n").unwrap();
    let with = |rules: &str| {
        let files = format!(
            "htpasswd = {:?}\ntokens = {:?}",
            case.path("h"),
            case.path("t")
        );
        let text = format!(
            "[clients]\n{files}\nrules = [{rules}]\n[upstreams.\"reg.local\"]\nurl = \"https://r\""
        );
        fs::write(case.path("c.toml"), text).unwrap();
        case.notes()
    };
    let fine = "\"alice pull **\", \"builder pull reg.local/**\", \"* pull *.io/x\", \"anonymous deny quay.io/**\"";
    assert_eq!(with(fine), [""; 0]);
    for (rule, why) in [
        (
            "* deny reg.locl/lab/**",
            "no upstream is called \"reg.locl\"; did you mean \"reg.local\"?",
        ),
        ("* deny zzz/**", "no upstream is called \"zzz\""),
        (
            "* deny index.docker.io/**",
            "\"index.docker.io\" is an alias, and rules go by keys: write \"docker.io\"",
        ),
        (
            "alcie pull **",
            "no file of passwords or tokens names \"alcie\"; did you mean \"alice\"?",
        ),
        ("cert:ci pull **", "certificates are not asked for"),
    ] {
        let note = format!("clients.rules: {rule:?} decides about nothing: {why}");
        assert_eq!(with(&format!("{rule:?}")), [note]);
    }
}

#[test]
fn names_in_certificates_cannot_be_known_beforehand() {
    let case = Case::file("");
    let made = rcgen::generate_simple_self_signed(["x".to_owned()]).unwrap();
    fs::write(case.path("c"), made.cert.pem()).unwrap();
    fs::write(case.path("k"), made.signing_key.serialize_pem()).unwrap();
    let (certificate, key) = (case.path("c"), case.path("k"));
    let text = format!(
        "[tls]\ncert_file = {certificate:?}\nclient_ca_file = {certificate:?}\nkey_file = {key:?}\n\
         [clients]\nrules = [\"cert:ci pull **\", \"ci pull **\"]"
    );
    fs::write(case.path("c.toml"), text).unwrap();
    assert_eq!(
        case.notes(),
        [
            "clients.rules: \"ci pull **\" decides about nothing: no file of passwords or tokens names \"ci\""
        ]
    );
}

#[test]
fn tags_have_rules_of_their_own() {
    use crate::cache::freshness::{Lasting, OnDeleted};
    let case = Case::file(
        r#"
        [upstreams."docker.io"]
        stale_while_revalidate = "30s"
        on_deleted = "serve"
        [[upstreams."docker.io".tags]]
        pattern = "latest"
        ttl = "5s"
        [[upstreams."docker.io".tags]]
        pattern = '*-\d{8}'
        immutable = true
        "#,
    );
    let config = case.load();
    let rules = &upstream(&config, "docker.io").rules;
    assert_eq!(
        rules.of("latest").lasting,
        Lasting::For(Duration::from_secs(5))
    );
    assert_eq!(rules.of("app-20260821").lasting, Lasting::Ever);
    assert_eq!(rules.of("v1").lasting, Lasting::For(Duration::from_mins(1)));
    assert_eq!(
        (rules.window, rules.on_deleted),
        (Duration::from_secs(30), OnDeleted::Serve)
    );
    let again = Case::file(&case.shown());
    assert_eq!(upstream(&again.load(), "docker.io").rules, *rules);

    let name = "OCI_REMOTE_CACHE_UPSTREAMS__DOCKER_IO__TAGS";
    let variable = Case::variables(
        "offline = true",
        &[(name, "latest=5s, *-\\d{8} = immutable")],
    );
    let config = variable.load();
    assert_eq!(
        upstream(&config, "docker.io").rules.patterns,
        rules.patterns
    );
    assert!(config.offline && !upstream(&config, "docker.io").offline && !config.catalog);
}

#[test]
fn bad_rules_for_tags_say_which_and_why() {
    for (rules, what) in [
        (
            "\"latest\"",
            "must be an array of { pattern = \"…\", ttl = \"…\" } or { pattern = \"…\", immutable = true }, found a string",
        ),
        (
            "[\"latest\"]",
            "rule 1 must be { pattern = \"…\", ttl = \"…\" } or { pattern = \"…\", immutable = true }, found a string",
        ),
        ("[{ ttl = \"1s\" }]", "rule 1 needs a pattern, as a string"),
        (
            "[{ pattern = \"a b\", ttl = \"1s\" }]",
            "rule 1 has the bad pattern \"a b\": ' ' is in no tag: a pattern is made of a tag's own characters, *, ?, \\d, + and {n}",
        ),
        (
            "[{ pattern = \"a\", ttl = \"soon\" }]",
            "rule 1 has a bad duration \"soon\": write it like \"10s\", \"1m\" or \"1h30m\"",
        ),
        (
            "[{ pattern = \"a\" }]",
            "rule 1 must be { pattern = \"…\", ttl = \"…\" } or { pattern = \"…\", immutable = true }",
        ),
        (
            "[{ pattern = \"a\", ttl = \"1s\", immutable = true }]",
            "rule 1 must be { pattern = \"…\", ttl = \"…\" } or { pattern = \"…\", immutable = true }",
        ),
        (
            "[{ pattern = \"a\", immutable = true }, { patern = \"b\" }]",
            "rule 2 has the unknown key \"patern\"; did you mean \"pattern\"?",
        ),
    ] {
        let case = Case::file(&format!("upstreams.\"quay.io\".tags = {rules}"));
        assert_eq!(
            case.error(),
            format!("c.toml:1: key \"upstreams.quay.io.tags\": {what}")
        );
    }
}
