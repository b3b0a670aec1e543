//! Which range of a blob to fetch next: a pure decision.
//!
//! The plan sees what has not arrived, what is being fetched, and what readers wait for. It knows nothing of sockets or files, so every
//! rule about order, lazy clients, far ranges and stragglers can be read and tested here.

use oci::Slice;

/// Blobs up to this size are one plain GET from byte 0, whatever ranges clients ask, unless they were made to be read in pieces: 32 MiB.
pub const SMALL: u64 = 32 << 20;

/// A range further than this beyond the front is fetched next instead of waited for: 16 MiB.
pub const FAR: u64 = 16 << 20;

/// What one connection takes at a time when several share a blob: 8 MiB.
pub const SEGMENT: u64 = 8 << 20;

/// The least that is worth taking over from a slower connection: 4 MiB.
const SPLIT: u64 = 4 << 20;

/// A connection that needs longer than this for the rest of its range is taken for one that crawls: 5 seconds.
const LONG: u64 = 5;

/// The least that is taken from a connection that crawls: 256 KiB.
const CRUMB: u64 = 256 << 10;

/// The most that may lie in sockets between an upstream and us: 4 MiB.
const ON_THE_WAY: u64 = 4 << 20;

/// One range being fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Active {
    /// Next byte to arrive.
    pub position: u64,
    /// Where it stops, exclusive.
    pub end: u64,
    /// Bytes a second, as last measured: zero when it pauses, `None` when it is too new to tell.
    pub rate: Option<u64>,
}

/// What one reader still needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// First byte it has not got.
    pub position: u64,
    /// Where its range ends, exclusive.
    pub end: u64,
}

/// Whether all of the blob is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appetite {
    /// Everything: somebody asked for all of it, or the rule of a quarter or a second client says so.
    Whole,
    /// Only what readers ask for: a lazy client costs no more than it would without a cache.
    Asked,
}

/// Whether the upstream gives ranges of the blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ranges {
    /// As far as is known.
    Given,
    /// It gives all of the blob or nothing.
    NotGiven,
}

/// What the plan looks at.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The blob's size in bytes.
    pub size: u64,
    /// What has not arrived, in order.
    pub gaps: &'a [Slice],
    /// What is being fetched.
    pub active: &'a [Active],
    /// What readers wait for: only those whose next byte has not arrived.
    pub wants: &'a [Want],
    /// Whether all is wanted.
    pub appetite: Appetite,
    /// Whether parts can be had.
    pub ranges: Ranges,
    /// Connections that sharing the work may use now.
    pub share: usize,
    /// Connections this blob may ever use.
    pub most: usize,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Fetch this range.
    Fetch(Slice),
    /// Fetch this range, which begins inside what number `from` was to fetch: that one stops where this one starts.
    TakeOver {
        /// Index into [`View::active`].
        from: usize,
        /// The range to fetch.
        slice: Slice,
    },
}

/// The next thing to do; `None` when there is nothing to do until something changes.
pub fn next(view: &View<'_>) -> Option<Step> {
    if view.ranges == Ranges::NotGiven {
        return from_the_beginning(view);
    }
    urgent(view)
        .or_else(|| in_order(view))
        .or_else(|| straggler(view))
}

/// One connection brings whatever is missing, from the first gap to the last, and with it what is here already.
fn from_the_beginning(view: &View<'_>) -> Option<Step> {
    let wanted = view.active.is_empty() && !unassigned(view).is_empty();
    let (first, last) = (view.gaps.first()?, view.gaps.last()?);
    wanted.then_some(Step::Fetch(Slice {
        start: first.start,
        end: last.end,
    }))
}

/// A reader waits for bytes that nobody will bring soon.
fn urgent(view: &View<'_>) -> Option<Step> {
    let one_get = view.size <= SMALL && view.appetite == Appetite::Whole;
    if one_get || view.active.is_empty() || view.active.len() >= view.most {
        return None;
    }
    view.wants.iter().find_map(|want| {
        let gap = *view
            .gaps
            .iter()
            .find(|gap| gap.start <= want.position && want.position < gap.end)?;
        let until = gap.end.min(want.end).max(want.position + 1);
        let slice = Slice {
            start: want.position,
            end: until,
        };
        match covering(view, want.position) {
            Some((from, active)) => {
                let end = slice.end.min(active.end);
                let taken = Slice { end, ..slice };
                is_far(active, want.position).then_some(Step::TakeOver { from, slice: taken })
            }
            None if behind_front(view, want.position) => None,
            None => Some(Step::Fetch(Slice {
                end: until.min(next_start(view, want.position)),
                ..slice
            })),
        }
    })
}

fn covering(view: &View<'_>, at: u64) -> Option<(usize, Active)> {
    view.active
        .iter()
        .copied()
        .enumerate()
        .find(|(_, active)| active.position <= at && at < active.end)
}

/// More than [`FAR`] away, and more than a second at the present rate.
fn is_far(active: Active, at: u64) -> bool {
    let distance = at.saturating_sub(active.position);
    distance > FAR && active.rate.is_some_and(|rate| distance > rate)
}

/// Whether work in order comes to `at` before a reader would notice: some connection ends just before it.
fn behind_front(view: &View<'_>, at: u64) -> bool {
    view.appetite == Appetite::Whole
        && view.active.iter().any(|active| {
            active.position <= at && !is_far(*active, at) && at - active.position <= FAR
        })
}

/// Where the next range being fetched after `at` starts.
fn next_start(view: &View<'_>, at: u64) -> u64 {
    view.active
        .iter()
        .map(|active| active.position)
        .filter(|&start| start > at)
        .min()
        .unwrap_or(view.size)
}

/// The first wanted bytes that neither arrived nor are being fetched.
fn in_order(view: &View<'_>) -> Option<Step> {
    if view.active.len() >= view.share.min(view.most).max(1) {
        return None;
    }
    let free = unassigned(view);
    let first = free.first()?;
    let shared = view.share > 1 && view.size > SMALL;
    let end = if shared {
        first.end.min(first.start + SEGMENT)
    } else {
        first.end
    };
    Some(Step::Fetch(Slice {
        start: first.start,
        end,
    }))
}

fn unassigned(view: &View<'_>) -> Vec<Slice> {
    let wanted: Vec<Slice> = match view.appetite {
        Appetite::Whole => view.gaps.to_vec(),
        Appetite::Asked => view
            .gaps
            .iter()
            .flat_map(|gap| asked_within(view.wants, *gap))
            .collect(),
    };
    let mut free = wanted;
    for active in view.active {
        let taken = Slice {
            start: active.position,
            end: active.end,
        };
        free = free
            .into_iter()
            .flat_map(|slice| without(slice, taken))
            .collect();
    }
    free.sort_by_key(|slice| slice.start);
    free
}

fn asked_within(wants: &[Want], gap: Slice) -> Vec<Slice> {
    let clip = |want: &Want| Slice {
        start: want.position.max(gap.start),
        end: want.end.min(gap.end),
    };
    wants
        .iter()
        .map(clip)
        .filter(|slice| slice.start < slice.end)
        .collect()
}

fn without(slice: Slice, taken: Slice) -> impl Iterator<Item = Slice> {
    let before = Slice {
        start: slice.start,
        end: slice.end.min(taken.start),
    };
    let after = Slice {
        start: slice.start.max(taken.end),
        end: slice.end,
    };
    [before, after]
        .into_iter()
        .filter(|part| part.start < part.end)
}

/// Nothing is left to hand out, but a connection is free: it takes a part of the rest that would come last.
fn straggler(view: &View<'_>) -> Option<Step> {
    let busy = view.active.len();
    if view.size <= SMALL
        || busy == 0
        || busy >= view.share.min(view.most)
        || view.appetite == Appetite::Asked
    {
        return None;
    }
    let slowest = |(_, active): &(usize, Active)| active.seconds_left();
    let (from, active) = view
        .active
        .iter()
        .copied()
        .enumerate()
        .max_by_key(slowest)?;
    let rate = active.rate?;
    // What is in the socket already comes anyway, and would come twice.
    let on_the_way = rate.min(ON_THE_WAY);
    let rest = active.end.saturating_sub(active.position + on_the_way);
    let crawls = view.share > 1 && active.seconds_left() > Some(LONG);
    // A rest that its own connection brings soon is not worth another request.
    if rest < (if crawls { CRUMB } else { 2 * SPLIT }) || active.seconds_left() <= Some(1) {
        return None;
    }
    let kept = match rest {
        _ if crawls && rest <= SEGMENT => 0,
        _ if from_front(view, active) => SEGMENT.min(rest / 2),
        _ => rest / 2,
    };
    let start = active.position + on_the_way + kept;
    let end = if view.share > 1 {
        active.end.min(start + SEGMENT)
    } else {
        active.end
    };
    Some(Step::TakeOver {
        from,
        slice: Slice { start, end },
    })
}

impl Active {
    /// How long its rest takes at its rate: `None`, the least, when it is too new to tell; the most when it pauses.
    fn seconds_left(self) -> Option<u64> {
        let rest = self.end.saturating_sub(self.position);
        self.rate
            .map(|rate| rest.checked_div(rate).unwrap_or(u64::MAX))
    }
}

/// Whether this connection still has nearly the whole blob before it: the first plain GET, of which others take segments in order.
fn from_front(view: &View<'_>, active: Active) -> bool {
    active.end == view.size && active.end - active.position > 4 * SEGMENT
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn slice(start: u64, end: u64) -> Slice {
        Slice { start, end }
    }

    fn view<'a>(size: u64, gaps: &'a [Slice], active: &'a [Active], wants: &'a [Want]) -> View<'a> {
        View {
            size,
            gaps,
            active,
            wants,
            appetite: Appetite::Whole,
            ranges: Ranges::Given,
            share: 1,
            most: 8,
        }
    }

    #[test]
    fn small_blobs_are_one_fetch() {
        let gaps = [slice(0, 8 * MIB)];
        let wants = [Want {
            position: 7 * MIB,
            end: 8 * MIB,
        }];
        assert_eq!(
            next(&view(8 * MIB, &gaps, &[], &wants)),
            Some(Step::Fetch(gaps[0]))
        );
        let active = [Active {
            position: 0,
            end: 8 * MIB,
            rate: Some(0),
        }];
        assert_eq!(next(&view(8 * MIB, &gaps, &active, &wants)), None);
    }

    #[test]
    fn resume_fetches_the_first_gap() {
        let gaps = [slice(3 * MIB, 8 * MIB)];
        assert_eq!(
            next(&view(8 * MIB, &gaps, &[], &[])),
            Some(Step::Fetch(gaps[0]))
        );
    }

    #[test]
    fn a_lazy_client_gets_what_it_asks_and_no_more() {
        let gaps = [slice(0, 100 * MIB)];
        let wants = [Want {
            position: 50 * MIB,
            end: 51 * MIB,
        }];
        let lazy = View {
            appetite: Appetite::Asked,
            ..view(100 * MIB, &gaps, &[], &wants)
        };
        assert_eq!(next(&lazy), Some(Step::Fetch(slice(50 * MIB, 51 * MIB))));
        assert_eq!(next(&View { wants: &[], ..lazy }), None);
    }

    #[test]
    fn a_range_far_ahead_is_fetched_next() {
        let size = 48 * MIB;
        let gaps = [slice(4 * MIB, size)];
        let active = [Active {
            position: 4 * MIB,
            end: size,
            rate: Some(0),
        }];
        let wants = [Want {
            position: size - 1024,
            end: size,
        }];
        let step = next(&view(size, &gaps, &active, &wants));
        assert_eq!(
            step,
            Some(Step::TakeOver {
                from: 0,
                slice: slice(size - 1024, size)
            })
        );
    }

    #[test]
    fn a_range_that_comes_within_a_second_is_waited_for() {
        let size = 100 * MIB;
        let gaps = [slice(0, size)];
        let active = [Active {
            position: 0,
            end: size,
            rate: Some(200 * MIB),
        }];
        let wants = [Want {
            position: 50 * MIB,
            end: 51 * MIB,
        }];
        assert_eq!(next(&view(size, &gaps, &active, &wants)), None);
    }

    #[test]
    fn more_connections_take_segments_after_the_front() {
        let size = 100 * MIB;
        let gaps = [slice(0, size)];
        let active = [Active {
            position: 0,
            end: size,
            rate: Some(MIB),
        }];
        let two = View {
            share: 2,
            ..view(size, &gaps, &active, &[])
        };
        let taken = slice(SEGMENT + MIB, 2 * SEGMENT + MIB);
        assert_eq!(
            next(&two),
            Some(Step::TakeOver {
                from: 0,
                slice: taken
            })
        );
    }

    #[test]
    fn a_straggler_is_halved() {
        let size = 100 * MIB;
        let gaps = [slice(60 * MIB, 76 * MIB)];
        let active = [Active {
            position: 60 * MIB,
            end: 76 * MIB,
            rate: Some(MIB),
        }];
        let two = View {
            share: 2,
            ..view(size, &gaps, &active, &[])
        };
        assert_eq!(
            next(&two),
            Some(Step::TakeOver {
                from: 0,
                slice: slice(68 * MIB + MIB / 2, 76 * MIB)
            })
        );
    }

    #[test]
    fn without_ranges_one_connection_brings_all_that_is_missing() {
        let size = 100 * MIB;
        let gaps = [slice(10 * MIB, 20 * MIB), slice(60 * MIB, 90 * MIB)];
        let wants = [Want {
            position: 70 * MIB,
            end: 71 * MIB,
        }];
        for appetite in [Appetite::Whole, Appetite::Asked] {
            let one = View {
                ranges: Ranges::NotGiven,
                appetite,
                share: 4,
                ..view(size, &gaps, &[], &wants)
            };
            let all = slice(10 * MIB, 90 * MIB);
            assert_eq!(next(&one), Some(Step::Fetch(all)));
            let active = [Active {
                position: all.start,
                end: all.end,
                rate: Some(1),
            }];
            assert_eq!(
                next(&View {
                    active: &active,
                    ..one
                }),
                None
            );
        }
        let idle = View {
            ranges: Ranges::NotGiven,
            appetite: Appetite::Asked,
            ..view(size, &gaps, &[], &[])
        };
        assert_eq!(next(&idle), None, "nobody waits for anything");
    }

    proptest! {
        /// Following the plan step by step brings every byte, and no range is ever handed out twice.
        #[test]
        fn everything_arrives_once(size in 1..200 * MIB, share in 1usize..8, wants in prop::collection::vec((0..200 * MIB, 1..40 * MIB), 0..4), order in prop::collection::vec(0usize..8, 1..400)) {
            let mut left = vec![slice(0, size)];
            let mut active: Vec<Active> = Vec::new();
            let mut order = order.into_iter().cycle();
            for _ in 0..2000 {
                if left.is_empty() { break; }
                let wants: Vec<Want> = wants.iter().map(|&(at, length)| Want { position: at % size, end: (at % size + length).min(size) })
                    .filter(|want| left.iter().any(|gap| gap.start <= want.position && want.position < gap.end)).collect();
                while let Some(step) = next(&View { share, ..view(size, &left, &active, &wants) }) {
                    let (Step::Fetch(part) | Step::TakeOver { slice: part, .. }) = step;
                    if let Step::TakeOver { from, .. } = step { active[from].end = part.start; }
                    prop_assert!(part.start < part.end && part.end <= size);
                    prop_assert!(left.iter().any(|gap| gap.start <= part.start && part.end <= gap.end), "{part:?} is not missing");
                    prop_assert!(active.iter().all(|a| a.end <= part.start || part.end <= a.position), "{part:?} is fetched already");
                    active.push(Active { position: part.start, end: part.end, rate: Some(MIB) });
                    active.retain(|a| a.position < a.end);
                    prop_assert!(active.len() <= 8);
                }
                prop_assert!(!active.is_empty(), "stuck with {left:?}");
                let index = order.next().unwrap() % active.len();
                let step = (active[index].end - active[index].position).min(3 * MIB);
                let came = slice(active[index].position, active[index].position + step);
                active[index].position += step;
                active.retain(|a| a.position < a.end);
                left = left.into_iter().flat_map(|gap| without(gap, came)).collect();
            }
            prop_assert!(left.is_empty());
        }
    }
}
