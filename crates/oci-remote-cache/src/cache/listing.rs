//! Lists of tags and of referrers: kept in memory for as long as a tag is fresh, and given past that when the upstream does not answer.
//!
//! A list is passed on as it came, once it is known to be one. Where the next page lies is ours to say: the same path here.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use oci::{AnyDigest, Page, Reference, Warning};
use quick_cache::Weighter;
use quick_cache::sync::Cache as Memory;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, IgnoredAny, Visitor};

use super::error::{CacheError, Thing};
use super::negative::Question;
use super::right::refused;
use super::single_flight::Role;
use super::visit::Visit;
use super::{Cache, Shown, ask};
use crate::clock::Timestamp;
use crate::deadline::Deadline;
use crate::names::Source;
use crate::policy::{Client, Grant, May, Rules};
use crate::store::error::StoreError;
use crate::upstream::{Answer, Fault, Method, Resource};
use crate::verdict::Verdict;

/// The longest page read from an upstream: 4 MiB.
pub(super) const PAGE_LIMIT: usize = 4 << 20;

/// Pages kept in memory: 16 MiB.
const MEMORY: u64 = 16 << 20;

/// Which list.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum List {
    /// A repository's tags.
    Tags(Page),
    /// What refers to a manifest.
    Referrers {
        /// The manifest.
        digest: AnyDigest,
        /// Only this kind.
        artifact_type: Option<String>,
        /// Where to go on.
        page: Page,
    },
}

/// Which list of which repository.
pub(super) type ListingKey = (Source, List);

/// One page of a list.
#[derive(Clone, Debug)]
pub struct Listing {
    /// What is on it.
    pub content: Content,
    /// The parameters of the next page, if there is one.
    pub next: Option<Page>,
    /// What the upstream wants people to read.
    pub warnings: Vec<Warning>,
    checked: Timestamp,
}

/// What is on a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A list of tags, exactly as it came: GCR says more than the specification, and Nexus says `null` for none.
    Tags(Bytes),
    /// An OCI index, exactly as it came.
    Referrers {
        /// The index.
        index: Bytes,
        /// The upstream's `OCI-Filters-Applied`.
        filtered: bool,
    },
}

/// What makes a list of tags. Read for its form alone: a hostile list of a million tags takes no room.
#[derive(Deserialize)]
struct TagList {
    #[serde(default)]
    name: Option<String>,
    // Nexus answers `"tags": null` for a repository without any.
    #[serde(default)]
    tags: Option<Vec<Text>>,
}

/// What makes a list of referrers.
#[derive(Deserialize)]
struct Index {
    /// Written as `null` by Go where there are none.
    #[serde(rename = "manifests", deserialize_with = "Option::deserialize")]
    _manifests: Option<Vec<IgnoredAny>>,
}

/// Some text that is not kept.
struct Text;

#[derive(Clone, Debug)]
struct ByLength;

/// Pages in memory.
#[derive(Debug)]
pub(super) struct Listings {
    pages: Memory<ListingKey, Arc<Listing>, ByLength>,
}

impl Weighter<ListingKey, Arc<Listing>> for ByLength {
    fn weight(&self, (source, list): &ListingKey, listing: &Arc<Listing>) -> u64 {
        let bytes = match &listing.content {
            Content::Tags(body) | Content::Referrers { index: body, .. } => body.len(),
        };
        let next = listing.next.as_ref().map_or(0, length);
        let warnings: usize = listing.warnings.iter().map(|one| one.text().len()).sum();
        (bytes + next + warnings + source.repository.as_str().len() + list.length()) as u64 + 512
    }
}

/// Clients say where a page begins, and upstreams where the next one does, in as many bytes as a request line takes.
fn length(page: &Page) -> usize {
    let texts = [page.last.as_ref(), page.next.as_ref()];
    let known: usize = texts.into_iter().flatten().map(String::len).sum();
    known + page.others.len()
}

impl Listings {
    pub(super) fn new() -> Self {
        Self {
            pages: Memory::with_weighter(1024, MEMORY, ByLength),
        }
    }
}

impl List {
    fn length(&self) -> usize {
        match self {
            Self::Tags(page) => length(page),
            Self::Referrers {
                digest,
                artifact_type,
                page,
            } => {
                let text = match digest {
                    AnyDigest::Known(_) => 0,
                    AnyDigest::Foreign(digest) => digest.as_str().len(),
                };
                text + artifact_type.as_ref().map_or(0, String::len) + length(page)
            }
        }
    }

    pub(super) fn thing(&self) -> Thing {
        match self {
            Self::Tags(_) => Thing::Tags,
            Self::Referrers { .. } => Thing::Referrers,
        }
    }

    fn resource(&self) -> Resource {
        match self.clone() {
            // Registries differ about n=0, so it is asked as the smallest page and emptied here.
            Self::Tags(page) => Resource::Tags(Page {
                n: page.n.map(|n| n.max(1)),
                ..page
            }),
            Self::Referrers {
                digest,
                artifact_type,
                page,
            } => Resource::Referrers {
                digest,
                artifact_type,
                page,
            },
        }
    }

    /// What shows that the list may be seen: referrers, which few registries can be asked about, by what they refer to.
    fn shown_by(&self) -> Resource {
        match self {
            Self::Tags(_) => Resource::Tags(Page {
                n: Some(1),
                ..Page::default()
            }),
            Self::Referrers { digest, .. } => Resource::Manifest(Reference::Digest(digest.clone())),
        }
    }

    /// Whether nothing of it is asked for.
    fn is_empty(&self) -> bool {
        matches!(self, Self::Tags(Page { n: Some(0), .. }))
    }

    fn name(&self) -> String {
        format!("{self:?}")
    }
}

impl Cache {
    /// One page of a list.
    pub async fn listing(
        &self,
        grant: &Grant,
        list: List,
        deadline: Deadline,
    ) -> Result<(Arc<Listing>, Verdict), CacheError> {
        let what = list.shown_by();
        let visit = self.enter(grant, what.clone(), deadline).await?;
        let answered = self.listing_for(&visit, list.clone(), deadline).await;
        let Err(error) = answered else {
            return answered;
        };
        let again = self.enter_again(grant, (&visit, what), error, deadline);
        let own = Box::pin(again).await?;
        Box::pin(self.listing_for(&own, list, deadline)).await
    }

    async fn listing_for(
        &self,
        visit: &Visit,
        list: List,
        deadline: Deadline,
    ) -> Result<(Arc<Listing>, Verdict), CacheError> {
        if visit.may == May::PullCached {
            return self.held_listing(visit, list);
        }
        let key: ListingKey = (visit.source.clone(), list);
        let held = self.inner.listings.pages.get(&key);
        let held = held.filter(|_| !self.is_hidden(visit, &key.1));
        let suspended = self.is_suspended(visit)?;
        let origin = self.origin(&key.0)?;
        let ttl = origin
            .rules
            .listing_ttl(origin.upstream.strain(&key.0.repository));
        if let Some(listing) = held
            .as_ref()
            .filter(|listing| !suspended && self.age(listing) < ttl)
        {
            return Ok((Arc::clone(listing), Verdict::Hit));
        }
        match self.ask_listing(visit, key.1, deadline).await {
            Ok((listing, Role::Lead)) => Ok((listing, Verdict::Miss)),
            Ok((listing, Role::Joined)) => Ok((listing, Verdict::Collapsed)),
            Err(error) => match held.filter(|_| !suspended && error.is_outage()) {
                Some(listing) => Ok((listing, Verdict::Stale(error.why()))),
                None => Err(error),
            },
        }
    }

    /// A page as it came last, however long ago.
    pub(super) fn known_page(&self, visit: &Visit, list: List) -> Option<Arc<Listing>> {
        if self.is_hidden(visit, &list) {
            return None;
        }
        self.inner.listings.pages.get(&(visit.source.clone(), list))
    }

    fn is_hidden(&self, visit: &Visit, list: &List) -> bool {
        visit.is_personal() && self.inner.negatives.hides(&of_list(visit, list))
    }

    /// Names of repositories of which something is stored, upstream's key first, in order, from after `after`; at most `most`. Left out are
    /// those that are suspended, that the client may not pull, that only our credentials open where only what is public is served, and that the
    /// client's own login was not shown to open lately, where that decides.
    pub async fn repositories(
        &self,
        (rules, client): (&Rules, &Client),
        after: &str,
        most: u32,
    ) -> Result<Vec<String>, CacheError> {
        let catalog = self.inner.store.catalog().clone();
        let read = self
            .inner
            .tasks
            .spawn_blocking(move || catalog.stored_sources());
        let read = read.await.map_err(|_lost| CacheError::Stopping)?;
        let stored = read.map_err(|error: StoreError| {
            self.store_fault(&error);
            CacheError::Disk
        })?;
        let names: BTreeSet<String> = stored
            .into_iter()
            .filter(|(source, credential)| {
                self.is_shown(source, client) && self.counts(source, credential)
            })
            .filter(|(source, _)| rules.decide(client.name.as_ref(), source).is_ok())
            .map(|(source, _)| source.to_string())
            .filter(|name| name.as_str() > after)
            .collect();
        Ok(names.into_iter().take(most as usize).collect())
    }

    /// Whether a repository may be named to this client: only if today it would be served to it without asking anyone first.
    fn is_shown(&self, source: &Source, client: &Client) -> bool {
        match self.origin(source).map(|origin| origin.shown) {
            Ok(Shown::Proven(_)) => self.is_proven(source, client),
            Ok(Shown::All | Shown::Public) => {
                matches!(self.is_closed(source), Ok(false)) && self.is_let_in(source)
            }
            Err(_not_configured) => false,
        }
    }

    pub(super) fn age(&self, listing: &Listing) -> Duration {
        listing.checked.counted_age(self.inner.clock.now())
    }

    async fn ask_listing(
        &self,
        visit: &Visit,
        list: List,
        deadline: Deadline,
    ) -> Result<(Arc<Listing>, Role), CacheError> {
        let thing = list.thing();
        let negative = of_list(visit, &list);
        if let Some(refusal) = self.inner.negatives.find(&negative) {
            return Err(refused(visit, thing, refusal));
        }
        let (cache, asked, from) = (self.clone(), list.clone(), visit.clone());
        let errand = self
            .inner
            .listing_flights
            .run((visit.visitor(), list), move || async move {
                cache.fetch_listing(&from, asked).await
            });
        let landed = deadline
            .run(errand)
            .await
            .map_err(|_late| CacheError::Late)?;
        let (listing, role) = landed.map_err(|_lost| CacheError::Stopping)?;
        listing.map(|listing| (listing, role))
    }

    async fn fetch_listing(&self, visit: &Visit, list: List) -> Result<Arc<Listing>, CacheError> {
        let ask = ask(visit, list.resource(), Method::Get);
        let key = (visit.source.clone(), list);
        let list = &key.1;
        let deadline = Deadline::for_answer();
        let upstream = &self.origin(visit)?.upstream;
        let (answer, body) = match upstream.whole(&ask, PAGE_LIMIT, deadline).await {
            Ok(whole) => whole,
            Err(error) => {
                if let Some(refusal) = self.forget_listing(&key, visit, error.fault()).await {
                    return Err(refusal);
                }
                return Err(self
                    .judge_refusal(visit, list.thing(), list.name(), &Arc::new(error))
                    .await);
            }
        };
        self.lift(visit, answer.allowed()).await;
        let listing = self.read_listing(&key, &answer, body);
        let mut listing = listing.ok_or_else(|| bad_list(&key))?;
        listing.next = upstream
            .next_page(&ask, &answer)
            .filter(|_| !list.is_empty());
        // The page is kept for all, what one client was told is not.
        if !visit.is_personal() {
            listing.warnings = answer.warnings();
        }
        let listing = Arc::new(listing);
        self.inner.negatives.forget(&of_list(visit, list));
        self.inner.listings.pages.insert(key, Arc::clone(&listing));
        Ok(listing)
    }

    /// A list that the upstream says is gone is not served when it goes down later. That one client may not see it takes it from nobody
    /// else. Returns the refusal, where a closer look finds one.
    async fn forget_listing(
        &self,
        key: &ListingKey,
        visit: &Visit,
        fault: &Fault,
    ) -> Option<CacheError> {
        let gone = matches!(fault, Fault::NotFound { .. });
        if !gone && !matches!(fault, Fault::Denied { .. }) {
            return None;
        }
        if !visit.is_personal() {
            self.inner.listings.pages.remove(key);
            return None;
        }
        if !gone || self.inner.listings.pages.get(key).is_none() {
            return None;
        }
        self.inner.negatives.hide(of_list(visit, &key.1));
        self.doubt_proof(visit).await
    }

    /// Reads a page; `None` when it is not one.
    fn read_listing(
        &self,
        (source, list): &ListingKey,
        answer: &Answer,
        body: Bytes,
    ) -> Option<Listing> {
        let content = match list {
            List::Tags(page) => Content::Tags(tags(source, page, body)?),
            List::Referrers { .. } => {
                let _form: Index = object(&body)?;
                Content::Referrers {
                    index: body,
                    filtered: is_filtered(list, answer),
                }
            }
        };
        Some(Listing {
            content,
            next: None,
            warnings: Vec::new(),
            checked: self.inner.clock.now(),
        })
    }
}

/// Whether the upstream says that it did what was asked: a filter that nobody asked for, or another one, is none of the client's.
fn is_filtered(list: &List, answer: &Answer) -> bool {
    let List::Referrers {
        artifact_type: Some(_),
        ..
    } = list
    else {
        return false;
    };
    let applied = answer.header("oci-filters-applied").unwrap_or_default();
    applied
        .split(',')
        .any(|filter| filter.trim() == "artifactType")
}

/// A list of tags as it is served: as it came, or emptied where none were asked for.
fn tags(source: &Source, page: &Page, body: Bytes) -> Option<Bytes> {
    let list: TagList = object(&body)?;
    if list.tags.is_none() && list.name.is_none() {
        return None;
    }
    if page.n != Some(0) {
        return Some(body);
    }
    let name = list.name.as_deref();
    let name = name.unwrap_or_else(|| source.repository.as_str());
    let none = serde_json::json!({ "name": name, "tags": [] });
    Some(none.to_string().into())
}

/// Reads a JSON object; structures alone would be read from arrays too.
fn object<T: DeserializeOwned>(body: &[u8]) -> Option<T> {
    let opens = body.trim_ascii_start().starts_with(b"{");
    serde_json::from_slice(body).ok().filter(|_| opens)
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Self)
    }
}

impl Visitor<'_> for Text {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text")
    }

    fn visit_str<E: serde::de::Error>(self, _text: &str) -> Result<Self, E> {
        Ok(Self)
    }
}

fn bad_list((source, list): &ListingKey) -> CacheError {
    let thing = list.thing();
    let why = match list {
        List::Tags(_) => "it is no JSON object with a list of tags",
        List::Referrers { .. } => "it is no JSON object with a list of manifests",
    };
    CacheError::BadList {
        thing,
        source_: source.clone(),
        why,
    }
}

/// A visitor's question for a list.
fn of_list(visit: &Visit, list: &List) -> Question {
    (visit.visitor(), list.thing(), list.name())
}

/// Whether this is a list of tags that names any.
pub(super) fn names_a_tag(body: &[u8]) -> bool {
    let list = object::<TagList>(body);
    list.is_some_and(|list| list.tags.is_some_and(|tags| !tags.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::UpstreamId;

    #[test]
    fn a_page_weighs_what_it_takes_with_its_name() {
        let text = "x".repeat(10_000);
        let page = || Page {
            last: Some(text.clone()),
            ..Page::default()
        };
        let opaque = Page {
            others: text.clone(),
            ..Page::default()
        };
        let source = Source::new(UpstreamId::new("up"), "a".parse().unwrap());
        let listing = |next| {
            let content = Content::Tags(Bytes::new());
            let checked = Timestamp(0);
            Arc::new(Listing {
                content,
                next,
                warnings: Vec::new(),
                checked,
            })
        };
        let weigh = |list, next| ByLength.weight(&(source.clone(), list), &listing(next));
        let light = weigh(List::Tags(Page::default()), None);
        let digest = AnyDigest::Known(oci::Digest::of(oci::Algorithm::Sha256, b""));
        let referrers = List::Referrers {
            digest,
            artifact_type: Some(text.clone()),
            page: page(),
        };
        for (heavy, by) in [
            (weigh(List::Tags(page()), None), 10_000),
            (weigh(List::Tags(Page::default()), Some(page())), 10_000),
            (weigh(List::Tags(opaque), None), 10_000),
            (weigh(referrers, None), 20_000),
        ] {
            assert_eq!(heavy, light + by);
        }
    }
}
