//! Which client may do what with which repositories: the operator's rules, read from above, the first that fits decides.
//!
//! A rule is three words: `ci pull ghcr.io/acme/**`. Who: a client's name, `*` for every client with a name, `anonymous` for those
//! without. What: `pull`, `pull-cached` (only what is held already, without asking the upstream), `warm` (have something fetched), `purge`
//! (have something taken back), several joined by `+`, or `deny`. Where: an upstream's key and a
//! repository, in which `*` stands for any text without a slash and `**` for any number of segments. Pure.

use std::fmt;
use std::str::FromStr;

use super::client::ClientName;
use crate::names::Source;

/// What a client may do with a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum May {
    /// Have anything of it, fetched for it where need be.
    Pull,
    /// Have what is held of it.
    PullCached,
}

/// What else a client may have done to a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Deed {
    /// Something fetched that nobody waits for.
    Warm,
    /// Something taken back that is held.
    Purge,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    who: Who,
    what: What,
    place: Pattern,
}

/// All rules, and what holds without any.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    rules: Vec<Rule>,
    door: Door,
}

/// Whether clients have names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Door {
    /// Nobody is asked who they are.
    #[default]
    Open,
    /// Clients must say who they are, unless a rule is for `anonymous`.
    Kept,
}

/// Why a client may not ask for a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It may, perhaps, once it has said who it is.
    #[error("log in to pull this")]
    LogIn,
    /// No rule allows it.
    #[error("no rule of this cache lets you pull this")]
    Denied,
    /// No rule allows to have this done.
    #[error("no rule of this cache lets you {} this", .0.as_str())]
    NotLicensed(Deed),
}

/// All that one rule lets a client do; nothing is `deny`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct What {
    may: Option<May>,
    deeds: Vec<Deed>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Who {
    Named(String),
    AnyoneNamed,
    Anonymous,
}

/// `upstream/repository` with stars.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pattern(Vec<String>);

/// Text that is no rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bad rule {text:?}: {why}; write it like \"ci pull ghcr.io/acme/**\"")]
pub struct RuleError {
    text: String,
    why: &'static str,
}

impl Rules {
    /// These rules, at such a door.
    pub fn new(rules: Vec<Rule>, door: Door) -> Self {
        Self { rules, door }
    }

    /// What `client` may do with `source`.
    pub fn decide(&self, client: Option<&ClientName>, source: &Source) -> Result<May, Refusal> {
        let fits = |rule: &&Rule| rule.who.is(client) && rule.place.fits(source);
        let refusal = match client {
            None if self.door == Door::Kept => Refusal::LogIn,
            _ => Refusal::Denied,
        };
        match self.rules.iter().find(fits) {
            Some(rule) => rule.what.may.ok_or(refusal),
            None if self.rules.is_empty() && refusal == Refusal::Denied => Ok(May::Pull),
            None => Err(refusal),
        }
    }

    /// Whether `client` may have this done to `source`. Without rules nobody may.
    pub fn permit(
        &self,
        client: Option<&ClientName>,
        source: &Source,
        deed: Deed,
    ) -> Result<(), Refusal> {
        let fits = |rule: &&Rule| rule.who.is(client) && rule.place.fits(source);
        match self.rules.iter().find(fits) {
            Some(rule) if rule.what.deeds.contains(&deed) => Ok(()),
            _ if client.is_none() && self.door == Door::Kept => Err(Refusal::LogIn),
            _ => Err(Refusal::NotLicensed(deed)),
        }
    }

    /// Whether clients are asked who they are.
    pub fn door(&self) -> Door {
        self.door
    }

    /// Whether someone who shows no name may be let in at all.
    pub fn admits_anonymous(&self) -> bool {
        self.door == Door::Open || self.rules.iter().any(|rule| rule.who == Who::Anonymous)
    }
}

impl Rule {
    /// The one client it is for, where it is for one.
    pub fn client(&self) -> Option<&str> {
        match &self.who {
            Who::Named(name) => Some(name),
            Who::AnyoneNamed | Who::Anonymous => None,
        }
    }

    /// The upstreams it is for, as written: a key, perhaps with stars.
    pub fn upstreams(&self) -> &str {
        self.place.0.first().map_or("", String::as_str)
    }

    /// Whether it is for something of the upstream with this key.
    pub fn is_for(&self, key: &str) -> bool {
        let first = self.upstreams();
        first == "**" || text_fits(first, key)
    }
}

impl Deed {
    /// Its word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Purge => "purge",
        }
    }
}

impl What {
    fn parse(text: &str) -> Result<Self, &'static str> {
        if text == "deny" {
            return Ok(Self::default());
        }
        let mut what = Self::default();
        for word in text.split('+') {
            let (may, deed) = match word {
                "pull" => (Some(May::Pull), None),
                "pull-cached" => (Some(May::PullCached), None),
                "warm" => (None, Some(Deed::Warm)),
                "purge" => (None, Some(Deed::Purge)),
                _ => {
                    return Err(
                        "the second word must be deny, or pull, pull-cached, warm, purge joined by +",
                    );
                }
            };
            let twice = (may.is_some() && what.may.is_some())
                || deed.is_some_and(|deed| what.deeds.contains(&deed));
            if twice {
                return Err("the second word says the same thing twice");
            }
            what.may = what.may.or(may);
            what.deeds.extend(deed);
        }
        Ok(what)
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let may = self.may.map(|may| match may {
            May::Pull => "pull",
            May::PullCached => "pull-cached",
        });
        let deeds = self.deeds.iter().map(|deed| deed.as_str());
        let words: Vec<&str> = may.into_iter().chain(deeds).collect();
        if words.is_empty() {
            return f.write_str("deny");
        }
        f.write_str(&words.join("+"))
    }
}

impl Who {
    fn is(&self, client: Option<&ClientName>) -> bool {
        match (self, client) {
            (Self::Named(name), Some(client)) => name == client.as_str(),
            (Self::AnyoneNamed, client) => client.is_some(),
            (Self::Anonymous, client) => client.is_none(),
            (Self::Named(_), None) => false,
        }
    }
}

impl Pattern {
    fn fits(&self, source: &Source) -> bool {
        let repository = source.repository.as_str().split('/');
        let path: Vec<&str> = std::iter::once(source.upstream.as_str())
            .chain(repository)
            .collect();
        segments_fit(&self.0, &path)
    }
}

fn segments_fit(pattern: &[String], path: &[&str]) -> bool {
    match (pattern.split_first(), path.split_first()) {
        (None, None) => true,
        (Some((star, rest)), _) if star == "**" => {
            segments_fit(rest, path)
                || path
                    .split_first()
                    .is_some_and(|(_, below)| segments_fit(pattern, below))
        }
        (Some((glob, rest)), Some((segment, below))) => {
            text_fits(glob, segment) && segments_fit(rest, below)
        }
        (Some(_), None) | (None, Some(_)) => false,
    }
}

/// Whether `text` is `glob` with something, or nothing, in place of each star. Each piece is looked for as early as it can be, which
/// leaves the most for those after it.
fn text_fits(glob: &str, text: &str) -> bool {
    let mut pieces = glob.split('*');
    let first = pieces.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let mut pieces = pieces.peekable();
    if pieces.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(piece) = pieces.next() {
        if pieces.peek().is_none() {
            return rest.ends_with(piece);
        }
        match rest.split_once(piece) {
            Some((_, after)) => rest = after,
            None => return false,
        }
    }
    true
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let bad = |why| RuleError {
            text: text.chars().take(200).collect(),
            why,
        };
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let &[who, what, place] = words.as_slice() else {
            return Err(bad("it must be three words: who, what, where"));
        };
        let what = What::parse(what).map_err(bad)?;
        if who == "anonymous" && !what.deeds.is_empty() {
            return Err(bad("warm and purge are for clients with a name"));
        }
        let segments: Vec<String> = place.split('/').map(str::to_owned).collect();
        if segments.iter().any(String::is_empty) {
            return Err(bad("the place must be an upstream and a repository"));
        }
        if segments
            .iter()
            .any(|segment| segment.contains("**") && segment != "**")
        {
            return Err(bad("** must be a segment of its own"));
        }
        if place.bytes().filter(|byte| *byte == b'*').count() > 8 {
            return Err(bad("it has more than eight stars"));
        }
        Ok(Self {
            who: match who {
                "*" => Who::AnyoneNamed,
                "anonymous" => Who::Anonymous,
                name => Who::Named(name.to_owned()),
            },
            what,
            place: Pattern(segments),
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who = match &self.who {
            Who::Named(name) => name,
            Who::AnyoneNamed => "*",
            Who::Anonymous => "anonymous",
        };
        write!(f, "{who} {} {}", self.what, self.place.0.join("/"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::UpstreamId;

    fn source(text: &str) -> Source {
        let (upstream, repository) = text.split_once('/').unwrap();
        Source::new(UpstreamId::new(upstream), repository.parse().unwrap())
    }

    fn rules(texts: &[&str], door: Door) -> Rules {
        Rules::new(
            texts.iter().map(|text| text.parse().unwrap()).collect(),
            door,
        )
    }

    #[test]
    fn patterns() {
        for (pattern, place, fits) in [
            ("docker.io/library/alpine", "docker.io/library/alpine", true),
            (
                "docker.io/library/alpine",
                "docker.io/library/alpine2",
                false,
            ),
            ("docker.io/**", "docker.io/library/alpine", true),
            ("docker.io/**", "quay.io/library/alpine", false),
            ("docker.io/*", "docker.io/library/alpine", false),
            ("docker.io/*/alpine", "docker.io/library/alpine", true),
            ("**", "quay.io/a/b/c", true),
            ("**/alpine", "docker.io/library/alpine", true),
            ("quay.io/**/c", "quay.io/a/b/c", true),
            ("quay.io/**/b", "quay.io/a/b/c", false),
            ("quay.io/a-*-z", "quay.io/a-m-z", true),
            ("quay.io/a-*-z", "quay.io/a-z", false),
            ("quay.io/*a*a", "quay.io/aa", true),
            ("quay.io/*a*a", "quay.io/a", false),
            ("*.io/x", "quay.io/x", true),
            ("quay.io/acme", "quay.io/acme/x", false),
            ("quay.io/acme/**", "quay.io/acmeevil/x", false),
        ] {
            let rule: Rule = format!("ci pull {pattern}").parse().unwrap();
            assert_eq!(rule.place.fits(&source(place)), fits, "{pattern} {place}");
        }
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rules = rules(
            &[
                "ci deny ghcr.io/acme/secret",
                "ci pull ghcr.io/acme/**",
                "* pull-cached ghcr.io/**",
                "anonymous pull docker.io/**",
            ],
            Door::Kept,
        );
        let (ci, other) = (ClientName::new("ci"), ClientName::new("other"));
        for (client, place, outcome) in [
            (Some(&ci), "ghcr.io/acme/app", Ok(May::Pull)),
            (Some(&ci), "ghcr.io/acme/secret", Err(Refusal::Denied)),
            (Some(&ci), "ghcr.io/x", Ok(May::PullCached)),
            (Some(&other), "ghcr.io/acme/secret", Ok(May::PullCached)),
            (Some(&other), "docker.io/x", Err(Refusal::Denied)),
            (None, "docker.io/x", Ok(May::Pull)),
            (None, "ghcr.io/x", Err(Refusal::LogIn)),
        ] {
            assert_eq!(
                rules.decide(client, &source(place)),
                outcome,
                "{client:?} {place}"
            );
        }
    }

    #[test]
    fn without_rules_the_door_decides() {
        let ci = ClientName::new("ci");
        let place = source("quay.io/x");
        assert_eq!(rules(&[], Door::Open).decide(None, &place), Ok(May::Pull));
        assert_eq!(
            rules(&[], Door::Kept).decide(Some(&ci), &place),
            Ok(May::Pull)
        );
        assert_eq!(
            rules(&[], Door::Kept).decide(None, &place),
            Err(Refusal::LogIn)
        );
        let open = rules(&["anonymous pull quay.io/x"], Door::Open);
        assert_eq!(open.decide(None, &place), Ok(May::Pull));
        assert_eq!(
            open.decide(None, &source("quay.io/y")),
            Err(Refusal::Denied)
        );
    }

    #[test]
    fn what_is_no_rule_says_why() {
        for (text, why) in [
            ("", "three words"),
            ("ci pull", "three words"),
            ("ci push quay.io/**", "second word"),
            ("ci pull+deny quay.io/**", "second word"),
            ("ci pull+pull-cached quay.io/**", "twice"),
            ("ci warm+warm quay.io/**", "twice"),
            ("anonymous purge quay.io/**", "with a name"),
            ("ci pull quay.io//x", "an upstream and a repository"),
            ("ci pull quay.io/a**", "segment of its own"),
            ("ci pull */*/*/*/*/*/*/*/*/*", "eight stars"),
        ] {
            let error = text.parse::<Rule>().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let rule: Rule = " ci\tpull  quay.io/** ".parse().unwrap();
        assert_eq!(rule.to_string(), "ci pull quay.io/**");
        let rule: Rule = "ci warm+pull+purge quay.io/**".parse().unwrap();
        assert_eq!(rule.to_string(), "ci pull+warm+purge quay.io/**");
    }

    #[test]
    fn the_first_rule_that_fits_decides_about_deeds_too() {
        let rules = rules(
            &[
                "ci pull+warm quay.io/acme/**",
                "ci purge quay.io/**",
                "* pull **",
            ],
            Door::Kept,
        );
        let (ci, other) = (ClientName::new("ci"), ClientName::new("other"));
        let none = |deed| Err(Refusal::NotLicensed(deed));
        for (client, place, deed, outcome) in [
            (Some(&ci), "quay.io/acme/x", Deed::Warm, Ok(())),
            (Some(&ci), "quay.io/acme/x", Deed::Purge, none(Deed::Purge)),
            (Some(&ci), "quay.io/x", Deed::Purge, Ok(())),
            (Some(&ci), "quay.io/x", Deed::Warm, none(Deed::Warm)),
            (Some(&other), "quay.io/x", Deed::Purge, none(Deed::Purge)),
            (None, "quay.io/x", Deed::Purge, Err(Refusal::LogIn)),
        ] {
            let permitted = rules.permit(client, &source(place), deed);
            assert_eq!(permitted, outcome, "{client:?} {place} {deed:?}");
        }
        assert_eq!(
            rules.decide(Some(&ci), &source("quay.io/x")),
            Err(Refusal::Denied)
        );
        let open = Rules::new(Vec::new(), Door::Open);
        assert!(
            open.permit(None, &source("quay.io/x"), Deed::Purge)
                .is_err()
        );
    }
}
