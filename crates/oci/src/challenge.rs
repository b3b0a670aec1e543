//! `WWW-Authenticate`: reading what registries write there.
//!
//! RFC 9110, section 11.6.1, and the forms that occur beside it: unquoted addresses, several challenges in one line,
//! empty and trailing parameters, any letter case. Reading never fails; what cannot be read is skipped. Where a realm
//! may be asked, and with which credentials, is decided elsewhere.

use crate::field::{quoted, take_until};
use crate::name::RepositoryName;

/// Longest header looked at.
const HEADER_LIMIT: usize = 8 << 10;
/// Parameters looked at in one header.
const PARAMETER_LIMIT: usize = 32;

/// One way in which a server asks for authorisation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Challenge {
    /// A token from a token server.
    Bearer(Bearer),
    /// A user name and password.
    Basic {
        /// What the credentials are for; free text.
        realm: String,
    },
    /// A scheme that this crate does not know.
    Other {
        /// Its name, as written.
        scheme: String,
    },
}

/// What a token server is to be asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Bearer {
    /// The token server's address; may be relative, and empty when it was missing.
    pub realm: String,
    /// Whom the token is for; nvcr.io leaves it out.
    pub service: Option<String>,
    /// What the token must allow; left out by Artifactory on HEAD.
    pub scope: Option<String>,
    /// Why the token that was sent did not do: `invalid_token`, `insufficient_scope`.
    pub error: Option<String>,
}

/// One resource scope, `type:name:actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scope<'a> {
    /// The resource type, such as `repository`.
    pub resource: &'a str,
    /// The resource name, which may hold the colon of a host and port.
    pub name: &'a str,
    /// The actions, separated by commas.
    pub actions: &'a str,
}

impl Challenge {
    /// All challenges of all `WWW-Authenticate` lines, in order.
    #[expect(
        single_use_lifetimes,
        reason = "an elided lifetime is not allowed in a bound"
    )]
    pub fn parse_all<'a>(headers: impl IntoIterator<Item = &'a str>) -> Vec<Self> {
        headers
            .into_iter()
            .filter(|header| header.len() <= HEADER_LIMIT)
            .flat_map(parse_line)
            .collect()
    }

    /// The challenge to answer: Bearer with a realm before Basic; none of the others.
    pub fn choose(all: &[Self]) -> Option<&Self> {
        let bearer = |challenge: &&Self| matches!(challenge, Self::Bearer(bearer) if !bearer.realm.is_empty());
        let basic = |challenge: &&Self| matches!(challenge, Self::Basic { .. });
        all.iter().find(bearer).or_else(|| all.iter().find(basic))
    }
}

impl<'a> Scope<'a> {
    /// Splits one scope, the type from the left and the actions from the right.
    pub fn parse(text: &'a str) -> Option<Self> {
        let (resource, rest) = text.split_once(':')?;
        let (name, actions) = rest.rsplit_once(':')?;
        Some(Self {
            resource,
            name,
            actions,
        })
    }
}

/// The scope to read from a repository.
pub fn pull_scope(name: &RepositoryName) -> String {
    format!("repository:{name}:pull")
}

/// A challenge while it is being read.
struct Draft<'a> {
    scheme: &'a str,
    parameters: Vec<Parameter<'a>>,
}

struct Parameter<'a> {
    name: &'a str,
    value: String,
    form: Form,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Quoted,
    Bare,
}

enum Item<'a> {
    Scheme(&'a str),
    Parameter(Parameter<'a>),
}

fn parse_line(line: &str) -> Vec<Challenge> {
    let mut drafts: Vec<Draft<'_>> = Vec::new();
    let mut seen = 0;
    let mut rest = line;
    while let Some(item) = next_item(&mut rest) {
        match item {
            Item::Scheme(word) if continues_scope(drafts.last_mut(), word) => {}
            Item::Scheme(scheme) => drafts.push(Draft {
                scheme,
                parameters: Vec::new(),
            }),
            Item::Parameter(parameter) => {
                if let Some(draft) = drafts.last_mut() {
                    draft.parameters.push(parameter);
                }
            }
        }
        seen += 1;
        if seen > PARAMETER_LIMIT {
            break;
        }
    }
    drafts.into_iter().map(Draft::finish).collect()
}

/// `scope=repository:a:pull,push` without quotes: the action after the comma looks like a scheme and is none.
fn continues_scope(draft: Option<&mut Draft<'_>>, word: &str) -> bool {
    let last = draft.and_then(|draft| draft.parameters.last_mut());
    match last {
        Some(parameter)
            if parameter.form == Form::Bare
                && parameter.name.eq_ignore_ascii_case("scope")
                && matches!(word, "pull" | "push" | "delete" | "*") =>
        {
            parameter.value.push(',');
            parameter.value.push_str(word);
            true
        }
        _ => false,
    }
}

impl Draft<'_> {
    fn finish(self) -> Challenge {
        if self.scheme.eq_ignore_ascii_case("bearer") {
            return Challenge::Bearer(Bearer {
                realm: self.value("realm").unwrap_or_default(),
                service: self.value("service"),
                scope: self.value("scope"),
                error: self.value("error"),
            });
        }
        if self.scheme.eq_ignore_ascii_case("basic") {
            return Challenge::Basic {
                realm: self.value("realm").unwrap_or_default(),
            };
        }
        Challenge::Other {
            scheme: self.scheme.to_owned(),
        }
    }

    /// The first parameter of this name; an empty one counts as missing, as `scope=""` means no scope.
    fn value(&self, name: &str) -> Option<String> {
        self.parameters
            .iter()
            .find(|parameter| parameter.name.eq_ignore_ascii_case(name))
            .map(|parameter| parameter.value.clone())
            .filter(|value| !value.is_empty())
    }
}

/// Takes the next scheme or parameter off the line.
fn next_item<'a>(rest: &mut &'a str) -> Option<Item<'a>> {
    loop {
        *rest = rest.trim_start_matches([' ', '\t', ',', '=']);
        if rest.is_empty() {
            return None;
        }
        if rest.starts_with('"') {
            quoted(rest);
            continue;
        }
        let name = take_until(rest, ['=', ',', '"', ' ', '\t']);
        let after = rest.trim_start_matches([' ', '\t']);
        let Some(value) = after.strip_prefix('=') else {
            return Some(Item::Scheme(name));
        };
        *rest = value.trim_start_matches([' ', '\t']);
        return Some(Item::Parameter(parameter(name, rest)));
    }
}

fn parameter<'a>(name: &'a str, rest: &mut &'a str) -> Parameter<'a> {
    if rest.starts_with('"') {
        return Parameter {
            name,
            value: quoted(rest),
            form: Form::Quoted,
        };
    }
    Parameter {
        name,
        value: take_until(rest, [',', ' ', '\t']).to_owned(),
        form: Form::Bare,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REALM: &str = "https://auth.example/token";

    fn bearer(service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer(Bearer {
            realm: REALM.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
            error: None,
        })
    }

    fn basic(realm: &str) -> Challenge {
        Challenge::Basic {
            realm: realm.to_owned(),
        }
    }

    fn other(scheme: &str) -> Challenge {
        Challenge::Other {
            scheme: scheme.to_owned(),
        }
    }

    fn check(header: &str, expected: &[Challenge]) {
        assert_eq!(Challenge::parse_all([header]), expected, "{header}");
    }

    #[test]
    fn every_way_to_write_one_bearer() {
        let full = [bearer(Some("s"), Some("repository:a:pull,push"))];
        for header in [
            r#"Bearer realm="REALM",service="s",scope="SCOPE""#,
            r#"bearer Realm="REALM" , Service = "s" ,scope="SCOPE","#,
            "BEARER realm=REALM,service=s,scope=SCOPE",
            "Bearer realm=REALM,scope=SCOPE,service=s",
            r#",, Bearer realm="REALM",, ,service="s",scope="SCOPE",,"#,
            r#"Bearer realm="REALM" service="s" scope="SCOPE""#,
            r#"Bearer realm="REALM",realm="https://evil.example",service="s",scope="SCOPE""#,
        ] {
            check(
                &header
                    .replace("REALM", REALM)
                    .replace("SCOPE", "repository:a:pull,push"),
                &full,
            );
        }
    }

    #[test]
    fn missing_and_empty_parameters() {
        for (rest, expected) in [
            ("", vec![bearer(None, None)]),
            (r#",service="",scope="""#, vec![bearer(None, None)]),
            (",service=,scope=", vec![bearer(None, None)]),
            (r#",scope="x""#, vec![bearer(None, Some("x"))]),
            (
                ",service=s,scope",
                vec![bearer(Some("s"), None), other("scope")],
            ),
            (
                ",service=s,pull",
                vec![bearer(Some("s"), None), other("pull")],
            ),
            (
                ",scope=\"x\",pull",
                vec![bearer(None, Some("x")), other("pull")],
            ),
            (
                ",scope=x:pull,other",
                vec![bearer(None, Some("x:pull")), other("other")],
            ),
        ] {
            check(&format!(r#"Bearer realm="{REALM}"{rest}"#), &expected);
        }
    }

    #[test]
    fn several_in_one_line() {
        for (line, others) in [
            (r#"Basic realm="bb""#, vec![basic("bb")]),
            ("basic", vec![basic("")]),
            ("Negotiate abc==", vec![other("Negotiate")]),
            ("Negotiate", vec![other("Negotiate")]),
            (r#"Digest realm="x, y", nonce="\"""#, vec![other("Digest")]),
        ] {
            let ours = format!(r#"Bearer realm="{REALM}""#);
            check(
                &format!("{line}, {ours}"),
                &[others.clone(), vec![bearer(None, None)]].concat(),
            );
            check(
                &format!("{ours}, {line}"),
                &[vec![bearer(None, None)], others].concat(),
            );
        }
    }

    #[test]
    fn quotes() {
        check(
            r#"Basic realm="say \"hi\", you\\""#,
            &[basic(r#"say "hi", you\"#)],
        );
        check(r#"Basic realm="no end, x=y"#, &[basic("no end, x=y")]);
        check(r#"Basic realm="no end\"#, &[basic("no end")]);
        check(r#"realm="orphan", =, "stray", ="#, &[]);
        check("", &[]);
    }

    #[test]
    fn errors_and_relative_realms() {
        let header = r#"Bearer realm="/token",service="s",error="insufficient_scope""#;
        let read = Challenge::parse_all([header]);
        let [Challenge::Bearer(bearer)] = read.as_slice() else {
            panic!("{read:?}")
        };
        assert_eq!(
            (bearer.realm.as_str(), bearer.error.as_deref()),
            ("/token", Some("insufficient_scope"))
        );
    }

    #[test]
    fn limits() {
        let padded = |length: usize| format!("{:length$}", "Basic realm=x");
        assert_eq!(
            Challenge::parse_all([padded(HEADER_LIMIT).as_str()]),
            [basic("x")]
        );
        assert_eq!(
            Challenge::parse_all([padded(HEADER_LIMIT + 1).as_str(), "Basic realm=y"]),
            [basic("y")]
        );
        let late = |before: usize| format!("Basic {} realm=x", "a=b,".repeat(before));
        assert_eq!(
            Challenge::parse_all([late(PARAMETER_LIMIT - 1).as_str()]),
            [basic("x")]
        );
        assert_eq!(
            Challenge::parse_all([late(PARAMETER_LIMIT).as_str()]),
            [basic("")]
        );
    }

    #[test]
    fn choice() {
        let bearer = bearer(None, None);
        let empty = Challenge::parse_all(["Bearer service=s"]).remove(0);
        for (all, chosen) in [
            (vec![basic("x"), bearer.clone()], Some(bearer.clone())),
            (vec![bearer.clone(), basic("x")], Some(bearer.clone())),
            (vec![empty.clone(), basic("x")], Some(basic("x"))),
            (vec![empty, other("Negotiate")], None),
            (vec![], None),
        ] {
            assert_eq!(Challenge::choose(&all), chosen.as_ref(), "{all:?}");
        }
        let lines = ["Basic realm=x", "Bearer realm=/token"];
        assert!(matches!(
            Challenge::choose(&Challenge::parse_all(lines)),
            Some(Challenge::Bearer(_))
        ));
    }

    #[test]
    fn scopes() {
        let name: RepositoryName = "library/alpine".parse().unwrap();
        assert_eq!(pull_scope(&name), "repository:library/alpine:pull");
        let scope = Scope::parse("repository:host.example:5000/a:pull,push").unwrap();
        assert_eq!(
            (scope.resource, scope.name, scope.actions),
            ("repository", "host.example:5000/a", "pull,push")
        );
        assert_eq!(Scope::parse("repository:a"), None);
        assert_eq!(Scope::parse("repository"), None);
    }

    proptest! {
        #[test]
        fn any_quoted_value_reads_back(value in "[^\0]{1,40}", scope in "repository:[a-z/:0-9]{1,10}:[a-z,*]{1,9}") {
            let escaped = value.replace('\\', r"\\").replace('"', "\\\"");
            let header = format!("Other x=\"{escaped}\", bearer scope=\"{scope}\", realm=\"{escaped}\", Basic realm=b");
            let read = Challenge::parse_all([header.as_str()]);
            let expected = Bearer { realm: value, service: None, scope: Some(scope), error: None };
            prop_assert_eq!(read, vec![other("Other"), Challenge::Bearer(expected), basic("b")]);
        }

        #[test]
        fn any_text_is_survived(text in any::<String>(), close in "[a-zB \t,=\"\\\\]{0,60}") {
            for header in [text, close] {
                let read = Challenge::parse_all([header.as_str()]);
                prop_assert!(read.len() <= PARAMETER_LIMIT + 1);
                prop_assert!(!read.contains(&other("")));
            }
        }
    }
}
