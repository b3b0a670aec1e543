//! `OCI_REMOTE_CACHE_*` variables: which key each one means.
//!
//! The process's environment is read here and nowhere else. A variable can set keys of upstreams that exist; it cannot make one, since
//! its name does not tell `my.registry` from `my-registry`.

use super::error::{Origin, Problem};
use super::file::Entry;
use super::keys::{Key, KeyPath, Kind, keys};
use super::nearest::{hint, nearest};
use super::value::Written;

const PREFIX: &str = "OCI_REMOTE_CACHE_";

/// What a variable of one name would set.
struct Candidate {
    variable: String,
    key: &'static Key,
    path: KeyPath,
    /// `file` or `env`, where the variable tells only where a secret is.
    part: Option<&'static str>,
}

impl Candidate {
    /// Its variable's name without what all begin with.
    fn own(&self) -> &str {
        self.variable.strip_prefix(PREFIX).unwrap_or_default()
    }
}

/// The process's environment. Values that are not UTF-8 are kept with replacement characters, and refused where they matter.
pub fn environment() -> Vec<(String, String)> {
    std::env::vars_os()
        .map(|(name, value)| {
            let text = |part: std::ffi::OsString| part.to_string_lossy().into_owned();
            (text(name), text(value))
        })
        .collect()
}

/// systemd's `CacheDirectory=`: the first folder of `CACHE_DIRECTORY`.
pub(super) fn cache_directory(environment: &[(String, String)]) -> Option<Entry> {
    const NAME: &str = "CACHE_DIRECTORY";
    let (_, value) = environment.iter().find(|(name, _)| name == NAME)?;
    let first = value.split(':').find(|folder| !folder.is_empty())?;
    let key = keys().find(|key| key.path == ["cache_dir"])?;
    let origin = Origin::Variable(NAME.to_owned());
    Some(Entry::text(key, key.path_in(""), first, origin))
}

/// The entries that `environment` makes. `secrets` are variables that secrets name: they are no keys whatever they are called.
pub(super) fn read(
    environment: &[(String, String)],
    upstreams: &[&str],
    secrets: &[String],
    problems: &mut Vec<Problem>,
) -> Vec<Entry> {
    let candidates = candidates(upstreams);
    let is_secret = |name: &String| {
        secrets.contains(name) || named_by_a_variable(name, environment, &candidates)
    };
    let mut entries: Vec<Entry> = Vec::new();
    for (name, value) in environment {
        if !name.starts_with(PREFIX) {
            continue;
        }
        match entry(name, value, &candidates) {
            Ok(Some(entry)) if entries.iter().any(|other| other.path == entry.path) => {
                let what = "is set by a second variable too; keep one";
                problems.push(Problem::at(&entry.origin, &entry.path, what));
            }
            Ok(Some(entry)) => entries.push(entry),
            Ok(None) if is_secret(name) || is_service_link(name, value) => {}
            Ok(None) => problems.push(unknown(name, &candidates)),
            Err(problem) => problems.push(problem),
        }
    }
    entries
}

/// The name of the variable for the key at `path`.
pub(super) fn variable(path: &[&str]) -> String {
    let steps: Vec<String> = path
        .iter()
        .map(|step| {
            step.chars()
                .map(|character| match character {
                    _ if character.is_ascii_alphanumeric() => character.to_ascii_uppercase(),
                    _ => '_',
                })
                .collect()
        })
        .collect();
    format!("{PREFIX}{}", steps.join("__"))
}

fn candidates(upstreams: &[&str]) -> Vec<Candidate> {
    let mut candidates = Vec::new();
    for key in keys() {
        let single = [""];
        let upstreams = if key.is_upstream() {
            upstreams
        } else {
            &single
        };
        let parts: &[Option<&'static str>] = if matches!(key.kind, Kind::Secret | Kind::Proxy) {
            &[None, Some("file"), Some("env")]
        } else {
            &[None]
        };
        for upstream in upstreams {
            let path = key.path_in(upstream);
            candidates.extend(parts.iter().map(|part| Candidate {
                variable: variable(&steps(&path, *part)),
                key,
                path: path.clone(),
                part: *part,
            }));
        }
    }
    candidates
}

fn steps<'a>(path: &'a KeyPath, part: Option<&'a str>) -> Vec<&'a str> {
    path.0.iter().map(String::as_str).chain(part).collect()
}

fn entry(name: &str, value: &str, candidates: &[Candidate]) -> Result<Option<Entry>, Problem> {
    let mut fitting = candidates.iter().filter(|one| one.variable == name);
    let Some(candidate) = fitting.next() else {
        return Ok(None);
    };
    let place = format!("environment variable {name}");
    if let Some(other) = fitting.next() {
        let what = format!(
            "fits two keys, \"{}\" and \"{}\"; set it in the file instead",
            candidate.path, other.path
        );
        return Err(Problem::of(&place, what));
    }
    if value.contains('\u{fffd}') {
        return Err(Problem::of(&place, "is not UTF-8"));
    }
    let key = candidate.key;
    let written = match candidate.part {
        Some(part) => Written::Table(vec![(part.to_owned(), Written::Text(value.to_owned()))]),
        None => Written::from_variable(key.kind, value),
    };
    Ok(Some(Entry {
        key,
        path: candidate.path.clone(),
        written,
        origin: Origin::Variable(name.to_owned()),
    }))
}

/// Whether another variable says that a secret is in the variable `name`.
fn named_by_a_variable(
    name: &str,
    environment: &[(String, String)],
    candidates: &[Candidate],
) -> bool {
    let mut naming = environment.iter().filter(|(_, value)| value == name);
    naming.any(|(variable, _)| {
        candidates
            .iter()
            .any(|one| one.part == Some("env") && one.variable == *variable)
    })
}

/// Kubernetes gives every container variables for each Service of its namespace, named after the Service. One called
/// `oci-remote-cache` must not keep us from starting.
fn is_service_link(name: &str, value: &str) -> bool {
    // Our prefix without its underscore: the Service itself is called so.
    let rest = name.strip_prefix(PREFIX).unwrap_or_default();
    let rest = format!("_{rest}");
    let address = ["tcp://", "udp://", "sctp://"]
        .iter()
        .any(|scheme| value.starts_with(scheme));
    rest.ends_with("_SERVICE_HOST")
        || rest.contains("_SERVICE_PORT")
        || (rest.ends_with("_PORT") && address)
        || rest.split_once("_PORT_").is_some_and(|(_, tail)| {
            let mut parts = tail.split('_');
            let number = parts.next().is_some_and(|port| port.parse::<u16>().is_ok());
            number && matches!(parts.next(), Some("TCP" | "UDP" | "SCTP"))
        })
}

fn unknown(name: &str, candidates: &[Candidate]) -> Problem {
    // Without the prefix, which would make every name look like every other.
    let own = name.strip_prefix(PREFIX).unwrap_or_default();
    let names = candidates.iter().map(Candidate::own);
    let what = match nearest(own, names) {
        _ if own == "CONFIG" => {
            "no such key; the configuration file is named by the flag --config".to_owned()
        }
        meant
            if own.starts_with("UPSTREAMS_")
                && !meant.is_some_and(|meant| is_same_upstream(own, meant)) =>
        {
            no_upstream(own, candidates)
        }
        Some(meant) => format!("no such key; did you mean {PREFIX}{meant}?"),
        None => "no such key".to_owned(),
    };
    Problem::of(&format!("environment variable {name}"), what)
}

/// Whether both names are of keys of one upstream. The nearest name may well be another upstream's: whoever took that advice would lead
/// its clients astray.
fn is_same_upstream(own: &str, meant: &str) -> bool {
    let Some(upstream) = meant.split("__").nth(1) else {
        return false;
    };
    let mut said = own.split("__").skip(1);
    match (said.next(), said.next()) {
        (Some(said), _) if said == upstream => true,
        (Some(_), Some(_)) => false,
        // Too few underscores: the key may be what follows.
        (_, None) | (None, _) => {
            let single = own.replace("__", "_");
            single.starts_with(&format!("UPSTREAMS_{}_", upstream.replace("__", "_")))
        }
    }
}

fn no_upstream(own: &str, candidates: &[Candidate]) -> String {
    let said = own.split("__").nth(1).unwrap_or_default();
    let known = candidates.iter().filter(|one| one.key.is_upstream());
    let known = known.filter_map(|one| one.own().split("__").nth(1));
    let hint = hint(nearest(said, known));
    format!(
        "no upstream is called so, and a variable can add none: write a section [upstreams.\"…\"] with its url in the file{hint}"
    )
}
