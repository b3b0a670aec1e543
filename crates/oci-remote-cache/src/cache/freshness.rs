//! Whether a tag may be served without asking the upstream: a pure function of rule, record, circumstances and now.
//!
//! A digest is for ever; a tag has an age. While it is fresh it is served as it is; after that the upstream is asked by HEAD, or, within
//! a window that the operator may open, behind the client's back. What the upstream deleted or refuses is never served just because it
//! was held. Everything that bears on the answer is decided here, and each answer tells why; what is done about it is `manifest.rs`.

use std::time::Duration;

use super::pattern::Pattern;
use crate::clock::Timestamp;
use crate::upstream::Strain;
use crate::verdict::Why;

/// However scarce requests are, no lifetime is stretched beyond this (or what the operator set, where that is longer).
const LONGEST_STRETCH: Duration = Duration::from_hours(1);

/// The rules of one upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// For tags that none of `patterns` is for.
    pub tag_ttl: Duration,
    /// For some tags; the first that fits decides.
    pub patterns: Vec<(Pattern, Lasting)>,
    /// How long past its lifetime a tag is served while the upstream is asked.
    pub window: Duration,
    /// What becomes of a tag that the upstream deleted.
    pub on_deleted: OnDeleted,
    /// How long a 404 is remembered.
    pub negative_ttl: Duration,
}

/// How long what a tag means is taken for true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasting {
    /// So long.
    For(Duration),
    /// For ever: this tag never moves.
    Ever,
}

/// What becomes of a tag that the upstream deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnDeleted {
    /// It is gone here too; its digest stays.
    #[default]
    Remove,
    /// It is served on, and says so.
    Serve,
}

/// The rules as they are for one tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// How long it is fresh.
    pub lasting: Lasting,
    /// See [`Rules::window`].
    pub window: Duration,
    /// See [`Rules::on_deleted`].
    pub on_deleted: OnDeleted,
}

/// What is known of a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// When the upstream was last asked.
    pub checked: Timestamp,
    /// What it said then.
    pub word: Word,
    /// Whether what it means can be given without the upstream.
    pub held: Held,
}

/// What is held of a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// The manifest that it means.
    Meant,
    /// Only one that it meant before: the upstream said by HEAD that it moved, and nobody has fetched the new one.
    Earlier,
    /// Neither.
    Nothing,
}

/// One of a tag's meanings, as something to fall back on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
    /// Its manifest is held.
    Held,
    /// It is not.
    NotHeld,
    /// The upstream deleted the tag when it meant this.
    Deleted,
}

/// The upstream's last word on a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// It means this.
    Holds,
    /// It is gone.
    Deleted,
    /// Its whole repository is refused to us.
    Refused,
}

/// What there is to consider besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Circumstances {
    /// Whether the upstream may be asked at all.
    pub reach: Reach,
    /// How far its rate limit is used up.
    pub strain: Strain,
}

/// Whether an upstream may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It may.
    Online,
    /// The operator has switched asking off.
    Offline,
}

/// What to do about a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Serve it; it was checked this long ago.
    Fresh(Duration, Because),
    /// Serve it past its lifetime.
    Stale(Duration, Instead, Meanwhile),
    /// Ask first. What may be done without an answer is said beside.
    Ask(Fallback),
}

/// Why a tag is fresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Because {
    /// It was checked within its lifetime.
    Checked,
    /// It never moves.
    Immutable,
    /// Its lifetime is over, but stretched since the upstream's rate limit runs low.
    Stretched,
}

/// Why a tag that is past its lifetime is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instead {
    /// It has not been for long, and the operator allows for that.
    Window,
    /// The operator has switched asking off.
    Offline,
    /// What is left of the rate limit is for what is not held at all.
    Reserved,
    /// The upstream deleted it, and the operator wants it served on.
    Deleted,
}

/// What goes on while a stale answer is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meanwhile {
    /// Nothing.
    Rest,
    /// The upstream is asked, so that the next answer is fresh.
    Ask,
}

/// What to do when the upstream, asked, gives no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// Nothing is held.
    Nothing,
    /// What is held may be served.
    Held,
    /// What is held may be served, also when the upstream says that the tag is gone.
    HeldThoughDeleted,
    /// What is held is not served: the upstream took the tag away.
    Gone,
    /// What is held is not served: the upstream refused us the repository.
    Refused,
}

impl Rules {
    /// The rule for `tag`.
    pub fn of(&self, tag: &str) -> Rule {
        let named = self.patterns.iter().find(|(pattern, _)| pattern.fits(tag));
        Rule {
            lasting: named.map_or(Lasting::For(self.tag_ttl), |(_, lasting)| *lasting),
            window: self.window,
            on_deleted: self.on_deleted,
        }
    }

    /// How long a list is given again without asking.
    pub fn listing_ttl(&self, strain: Strain) -> Duration {
        stretched(self.tag_ttl, strain)
    }
}

impl From<Instead> for Why {
    fn from(instead: Instead) -> Self {
        match instead {
            Instead::Window => Self::Revalidating,
            Instead::Offline => Self::Offline,
            Instead::Reserved => Self::Reserved,
            Instead::Deleted => Self::Deleted,
        }
    }
}

/// How long ago a tag was checked: as it is told, and as it counts.
#[derive(Clone, Copy)]
struct Age {
    told: Duration,
    counted: Duration,
}

/// Judges a tag.
pub fn judge(
    rule: Rule,
    known: Option<Known>,
    circumstances: Circumstances,
    now: Timestamp,
) -> Freshness {
    let Some(known) = known else {
        return Freshness::Ask(Fallback::Nothing);
    };
    let age = Age {
        told: known.checked.age(now),
        counted: known.checked.counted_age(now),
    };
    match (known.word, rule.on_deleted) {
        (Word::Holds, on_deleted) if known.held == Held::Earlier => {
            moved(age.told, on_deleted, circumstances)
        }
        (Word::Refused, _) => Freshness::Ask(Fallback::Refused),
        (Word::Deleted, OnDeleted::Remove) => Freshness::Ask(Fallback::Gone),
        (Word::Deleted, OnDeleted::Serve) => deleted(rule, age, circumstances),
        (Word::Holds, _) => holds(rule, age, circumstances),
    }
}

/// Which of a tag's meanings, the latest first, is served when the upstream gives no answer: the latest that is held. Nothing from before
/// the tag was deleted comes back.
pub fn stand_in<T>(meanings: impl IntoIterator<Item = T>, past: impl Fn(&T) -> Past) -> Option<T> {
    for meaning in meanings {
        match past(&meaning) {
            Past::Held => return Some(meaning),
            Past::NotHeld => {}
            Past::Deleted => return None,
        }
    }
    None
}

/// A tag that has moved to a manifest nobody has fetched. A client that were told the new digest could get it only from the upstream: so
/// the upstream is asked each time, by HEAD, and while it is silent the tag goes on meaning what is held.
fn moved(age: Duration, on_deleted: OnDeleted, circumstances: Circumstances) -> Freshness {
    match (circumstances.reach, on_deleted) {
        (Reach::Offline, _) => Freshness::Stale(age, Instead::Offline, Meanwhile::Rest),
        (Reach::Online, OnDeleted::Remove) => Freshness::Ask(Fallback::Held),
        (Reach::Online, OnDeleted::Serve) => Freshness::Ask(Fallback::HeldThoughDeleted),
    }
}

fn holds(rule: Rule, age: Age, circumstances: Circumstances) -> Freshness {
    let ttl = match rule.lasting {
        Lasting::Ever => return Freshness::Fresh(age.told, Because::Immutable),
        Lasting::For(ttl) => ttl,
    };
    if age.counted < ttl {
        return Freshness::Fresh(age.told, Because::Checked);
    }
    if circumstances.reach == Reach::Offline {
        return Freshness::Stale(age.told, Instead::Offline, Meanwhile::Rest);
    }
    if age.counted < stretched(ttl, circumstances.strain) {
        return Freshness::Fresh(age.told, Because::Stretched);
    }
    if circumstances.strain == Strain::Spent {
        return Freshness::Stale(age.told, Instead::Reserved, Meanwhile::Rest);
    }
    if age.counted < ttl.saturating_add(rule.window) {
        return Freshness::Stale(age.told, Instead::Window, Meanwhile::Ask);
    }
    match rule.on_deleted {
        OnDeleted::Remove => Freshness::Ask(Fallback::Held),
        OnDeleted::Serve => Freshness::Ask(Fallback::HeldThoughDeleted),
    }
}

/// A tag that is served although it is gone: asked for again as often as one that is there.
fn deleted(rule: Rule, age: Age, circumstances: Circumstances) -> Freshness {
    let rests = match rule.lasting {
        Lasting::Ever => true,
        Lasting::For(ttl) => age.counted < stretched(ttl, circumstances.strain),
    };
    if rests || circumstances.reach == Reach::Offline || circumstances.strain == Strain::Spent {
        return Freshness::Stale(age.told, Instead::Deleted, Meanwhile::Rest);
    }
    Freshness::Ask(Fallback::HeldThoughDeleted)
}

/// A lifetime as it is while requests are scarce. One of zero stays so: its tag is asked for each time.
fn stretched(ttl: Duration, strain: Strain) -> Duration {
    let longer = ttl.saturating_mul(strain.stretch());
    longer.min(LONGEST_STRETCH).max(ttl)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AT_EASE: Circumstances = Circumstances {
        reach: Reach::Online,
        strain: Strain::Easy,
    };
    const OFFLINE: Circumstances = Circumstances {
        reach: Reach::Offline,
        ..AT_EASE
    };

    const fn strained(strain: Strain) -> Circumstances {
        Circumstances { strain, ..AT_EASE }
    }

    const fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// A minute's lifetime, half a minute's window.
    fn rule(on_deleted: OnDeleted) -> Rule {
        Rule {
            lasting: Lasting::For(seconds(60)),
            window: seconds(30),
            on_deleted,
        }
    }

    fn known(age: u64, word: Word) -> (Option<Known>, Timestamp) {
        let checked = Timestamp(1_000_000);
        let age = i64::try_from(age).unwrap();
        (
            Some(Known {
                checked,
                word,
                held: Held::Meant,
            }),
            Timestamp(1_000_000 + age * 1000),
        )
    }

    type Case = (u64, Word, OnDeleted, Circumstances, Freshness);

    const LOW: Circumstances = strained(Strain::Low);
    const SCARCE: Circumstances = strained(Strain::Scarce);
    const SPENT: Circumstances = strained(Strain::Spent);

    const fn fresh(age: u64, because: Because) -> Freshness {
        Freshness::Fresh(seconds(age), because)
    }

    const fn rest(age: u64, instead: Instead) -> Freshness {
        Freshness::Stale(seconds(age), instead, Meanwhile::Rest)
    }

    const fn ask(fallback: Fallback) -> Freshness {
        Freshness::Ask(fallback)
    }

    const IN_THE_WINDOW: Freshness = Freshness::Stale(seconds(60), Instead::Window, Meanwhile::Ask);

    #[rustfmt::skip]
    const TABLE: &[Case] = &[
        (0, Word::Holds, OnDeleted::Remove, AT_EASE, fresh(0, Because::Checked)),
        (59, Word::Holds, OnDeleted::Remove, AT_EASE, fresh(59, Because::Checked)),
        (60, Word::Holds, OnDeleted::Remove, AT_EASE, IN_THE_WINDOW),
        (90, Word::Holds, OnDeleted::Remove, AT_EASE, ask(Fallback::Held)),
        (90, Word::Holds, OnDeleted::Serve, AT_EASE, ask(Fallback::HeldThoughDeleted)),
        (59, Word::Holds, OnDeleted::Remove, OFFLINE, fresh(59, Because::Checked)),
        (60, Word::Holds, OnDeleted::Remove, OFFLINE, rest(60, Instead::Offline)),
        (119, Word::Holds, OnDeleted::Remove, LOW, fresh(119, Because::Stretched)),
        (120, Word::Holds, OnDeleted::Remove, LOW, ask(Fallback::Held)),
        (239, Word::Holds, OnDeleted::Remove, SCARCE, fresh(239, Because::Stretched)),
        (59, Word::Holds, OnDeleted::Remove, SPENT, fresh(59, Because::Checked)),
        (9999, Word::Holds, OnDeleted::Remove, SPENT, rest(9999, Instead::Reserved)),
        (1, Word::Deleted, OnDeleted::Remove, AT_EASE, ask(Fallback::Gone)),
        (1, Word::Deleted, OnDeleted::Remove, OFFLINE, ask(Fallback::Gone)),
        (1, Word::Deleted, OnDeleted::Serve, AT_EASE, rest(1, Instead::Deleted)),
        (60, Word::Deleted, OnDeleted::Serve, AT_EASE, ask(Fallback::HeldThoughDeleted)),
        (60, Word::Deleted, OnDeleted::Serve, OFFLINE, rest(60, Instead::Deleted)),
        (9999, Word::Deleted, OnDeleted::Serve, SPENT, rest(9999, Instead::Deleted)),
        (1, Word::Refused, OnDeleted::Remove, AT_EASE, ask(Fallback::Refused)),
        (1, Word::Refused, OnDeleted::Serve, OFFLINE, ask(Fallback::Refused)),
    ];

    #[test]
    fn the_table() {
        for &(age, word, on_deleted, circumstances, wanted) in TABLE {
            let (record, now) = known(age, word);
            let judged = judge(rule(on_deleted), record, circumstances, now);
            assert_eq!(
                judged, wanted,
                "{age} s, {word:?}, {on_deleted:?}, {circumstances:?}"
            );
        }
        let nothing = judge(rule(OnDeleted::Remove), None, OFFLINE, Timestamp(0));
        assert_eq!(nothing, ask(Fallback::Nothing));
    }

    #[test]
    fn the_first_pattern_decides() {
        let rules = Rules {
            tag_ttl: seconds(60),
            patterns: vec![
                ("latest".parse().unwrap(), Lasting::For(seconds(30))),
                (r"*-\d{8}".parse().unwrap(), Lasting::Ever),
                ("*".parse().unwrap(), Lasting::For(seconds(5))),
            ],
            window: Duration::ZERO,
            on_deleted: OnDeleted::Remove,
            negative_ttl: Duration::ZERO,
        };
        assert_eq!(rules.of("latest").lasting, Lasting::For(seconds(30)));
        assert_eq!(rules.of("app-20260821").lasting, Lasting::Ever);
        assert_eq!(rules.of("v1").lasting, Lasting::For(seconds(5)));
        let (record, now) = known(1 << 30, Word::Holds);
        for circumstances in [AT_EASE, OFFLINE, strained(Strain::Spent)] {
            let judged = judge(rules.of("app-20260821"), record, circumstances, now);
            assert_eq!(
                judged,
                Freshness::Fresh(seconds(1 << 30), Because::Immutable)
            );
        }
    }

    /// Set back, the clock does not make a tag young again.
    #[test]
    fn what_was_checked_in_the_future_is_asked_about() {
        let (record, now) = known(0, Word::Holds);
        let before = Timestamp(now.0 - 3_600_000);
        let judged = |circumstances| judge(rule(OnDeleted::Remove), record, circumstances, before);
        assert_eq!(judged(AT_EASE), ask(Fallback::Held));
        assert_eq!(judged(SPENT), rest(0, Instead::Reserved));
        assert_eq!(judged(OFFLINE), rest(0, Instead::Offline));
    }

    #[test]
    fn ttl_zero_is_never_fresh() {
        let rule = Rule {
            lasting: Lasting::For(Duration::ZERO),
            window: Duration::ZERO,
            on_deleted: OnDeleted::Remove,
        };
        let (record, now) = known(0, Word::Holds);
        let judged = judge(rule, record, strained(Strain::Scarce), now);
        assert_eq!(judged, Freshness::Ask(Fallback::Held));
    }

    /// How far a judgement is from serving at once: it only ever grows.
    fn distance(freshness: Freshness) -> u8 {
        match freshness {
            Freshness::Fresh(..) => 0,
            Freshness::Stale(..) => 1,
            Freshness::Ask(_) => 2,
        }
    }

    fn any_strain() -> impl Strategy<Value = Strain> {
        prop::sample::select(vec![
            Strain::Easy,
            Strain::Low,
            Strain::Scarce,
            Strain::Spent,
        ])
    }

    fn any_circumstances() -> impl Strategy<Value = Circumstances> {
        let reach = prop::sample::select(vec![Reach::Online, Reach::Offline]);
        (reach, any_strain()).prop_map(|(reach, strain)| Circumstances { reach, strain })
    }

    fn any_word() -> impl Strategy<Value = Word> {
        prop::sample::select(vec![Word::Holds, Word::Deleted, Word::Refused])
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let on_deleted = prop::sample::select(vec![OnDeleted::Remove, OnDeleted::Serve]);
        (0u64..200, 0u64..200, on_deleted).prop_map(|(ttl, window, on_deleted)| Rule {
            lasting: Lasting::For(seconds(ttl)),
            window: seconds(window),
            on_deleted,
        })
    }

    proptest! {
        /// As time goes on, a tag only ever gets further from being served without a question.
        #[test]
        fn monotonic_in_time(rule in any_rule(), word in any_word(), circumstances in any_circumstances(), age in 0u64..5000, later in 0u64..5000) {
            let at = |age| { let (known, now) = known(age, word); distance(judge(rule, known, circumstances, now)) };
            prop_assert!(at(age) <= at(age + later));
        }

        /// A shorter lifetime, and a shorter window, never serve what longer ones would not.
        #[test]
        fn shorter_never_serves_older(rule in any_rule(), ttl in 0u64..200, window in 0u64..200, word in any_word(), circumstances in any_circumstances(), age in 0u64..5000) {
            let Lasting::For(longer) = rule.lasting else { return Ok(()) };
            let shorter = Rule { lasting: Lasting::For(longer.min(seconds(ttl))), window: rule.window.min(seconds(window)), ..rule };
            let (known, now) = known(age, word);
            prop_assert!(distance(judge(shorter, known, circumstances, now)) >= distance(judge(rule, known, circumstances, now)));
        }

        /// Scarcer requests never mean more of them.
        #[test]
        fn strain_never_asks_more(rule in any_rule(), word in any_word(), circumstances in any_circumstances(), more in any_strain(), age in 0u64..5000) {
            let (known, now) = known(age, word);
            let worse = Circumstances { strain: circumstances.strain.max(more), ..circumstances };
            prop_assert!(distance(judge(rule, known, worse, now)) <= distance(judge(rule, known, circumstances, now)));
        }

        /// A tag whose new meaning is not held is never called fresh, whatever its age: the upstream is asked, or its silence is told. What
        /// was refused or deleted is judged as ever.
        #[test]
        fn what_is_not_held_is_not_promised(rule in any_rule(), word in any_word(), circumstances in any_circumstances(), age in 0u64..5000) {
            let (meant, now) = known(age, word);
            let earlier = meant.map(|known| Known { held: Held::Earlier, ..known });
            let nothing = meant.map(|known| Known { held: Held::Nothing, ..known });
            let as_meant = judge(rule, meant, circumstances, now);
            prop_assert_eq!(judge(rule, nothing, circumstances, now), as_meant);
            let judged = judge(rule, earlier, circumstances, now);
            if word != Word::Holds {
                prop_assert_eq!(judged, as_meant);
            } else if circumstances.reach == Reach::Offline {
                prop_assert_eq!(judged, rest(age, Instead::Offline));
            } else {
                prop_assert!(matches!(judged, Freshness::Ask(Fallback::Held | Fallback::HeldThoughDeleted)));
            }
        }

        /// What stands in is held, nothing held is later than it, and no deletion lies between it and now.
        #[test]
        fn the_latest_that_is_held_stands_in(meanings in prop::collection::vec(prop::sample::select(vec![Past::Held, Past::NotHeld, Past::Deleted]), 0..12)) {
            let found = stand_in(meanings.iter().enumerate(), |(_, past)| **past).map(|(at, _)| at);
            let end = meanings.iter().position(|past| *past == Past::Deleted).unwrap_or(meanings.len());
            let wanted = meanings[..end].iter().position(|past| *past == Past::Held);
            prop_assert_eq!(found, wanted);
        }

        /// What the upstream refuses is never served, and what it deleted only where the operator says so.
        #[test]
        fn refusals_hold(rule in any_rule(), circumstances in any_circumstances(), age in 0u64..5000) {
            let (refused, now) = known(age, Word::Refused);
            prop_assert_eq!(judge(rule, refused, circumstances, now), Freshness::Ask(Fallback::Refused));
            let (deleted, now) = known(age, Word::Deleted);
            let gone = judge(Rule { on_deleted: OnDeleted::Remove, ..rule }, deleted, circumstances, now);
            prop_assert_eq!(gone, Freshness::Ask(Fallback::Gone));
        }
    }
}
