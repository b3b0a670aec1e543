//! How many connections one blob should use, found by measuring.
//!
//! One connection is the rule. When it is clearly the limit (the rest would take seconds) another is tried, and more while each step
//! brings clearly more bytes a second. A transfer that pauses is left alone: a pause says nothing about what more connections would bring.
//! So is one that this machine cannot keep up with: where bytes lie waiting in the socket, another socket brings none. It shows in that
//! connections do not wait, and in that timers ring late.

use std::time::Duration;

use tokio::time::Instant;

/// How long one measurement lasts.
const WINDOW: Duration = Duration::from_millis(300);

/// How often the rate is looked at.
const TICK: Duration = Duration::from_millis(100);

/// A rest that comes within this time is not worth another connection.
const SOON: u64 = 2;

/// Timers that ring this much later than they should, each time, tell of a machine that has no time left.
const LATE: Duration = Duration::from_millis(50);

/// The measure of one transfer.
#[derive(Debug)]
pub(super) struct Pace {
    share: usize,
    /// The most that have worked at once.
    most: usize,
    growing: bool,
    /// Not all of the connections that were added last work yet.
    settling: bool,
    window: Instant,
    bytes: u64,
    before: u64,
    tick: Instant,
    waited: Duration,
    /// How late the timer rang at least, in this window.
    late: Option<Duration>,
    /// How late it rang last.
    last_late: Duration,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            share: 1,
            most: 1,
            growing: true,
            settling: false,
            window: now,
            bytes: 0,
            before: 0,
            tick: now + TICK,
            waited: Duration::ZERO,
            late: None,
            last_late: Duration::ZERO,
        }
    }

    /// Connections to use.
    pub(super) fn share(&self) -> usize {
        self.share
    }

    /// Whether this machine was busy just now: what did not come in may lie in the socket, and another connection would bring it twice.
    pub(super) fn is_late(&self) -> bool {
        self.last_late > LATE
    }

    /// When to look again. A look that is overdue is not put off.
    pub(super) fn next_look(&self) -> Instant {
        self.tick
    }

    /// An upstream refused a connection: no more than `working` from now on.
    pub(super) fn shrink(&mut self, working: usize) {
        self.share = working.max(1);
        self.growing = false;
        self.settling = false;
    }

    /// So many work now, after `arrived` bytes in all. What more connections bring is measured from when they all do.
    pub(super) fn note_working(&mut self, working: usize, now: Instant, arrived: u64) {
        self.most = self.most.max(working);
        if self.settling && working >= self.share {
            self.settling = false;
            self.begin_window(now, arrived);
        }
    }

    fn begin_window(&mut self, now: Instant, arrived: u64) {
        (self.window, self.bytes) = (now, arrived);
        (self.waited, self.late) = (Duration::ZERO, None);
    }

    /// One more may be tried, up to as many as have worked before.
    pub(super) fn regrow(&mut self) {
        if self.share < self.most {
            self.share += 1;
        }
    }

    /// Looks at how many bytes have arrived in all, how many are missing, and how long each connection waited for the upstream since the
    /// last look.
    pub(super) fn measure(
        &mut self,
        now: Instant,
        (arrived, missing): (u64, u64),
        waited: Duration,
    ) {
        self.waited += waited;
        let late = now.saturating_duration_since(self.tick);
        self.last_late = late;
        self.tick = now + TICK;
        self.late = Some(self.late.map_or(late, |least| least.min(late)));
        let elapsed = now.saturating_duration_since(self.window);
        if elapsed < WINDOW || self.settling {
            return;
        }
        let came = arrived.saturating_sub(self.bytes);
        let rate = came * 1000
            / u64::try_from(elapsed.as_millis())
                .unwrap_or(u64::MAX)
                .max(1);
        let busy = self.late.is_some_and(|late| late > LATE);
        let narrow = self.waited > elapsed / 2 && !busy;
        self.begin_window(now, arrived);
        if rate == 0 || !self.growing || !narrow || missing / rate < SOON {
            self.before = rate;
            return;
        }
        let first = self.share == 1;
        if first && self.before == 0 {
            // The first window holds connection set-up and slow start; the second one tells.
            self.before = rate;
        } else if first || rate > self.before + self.before / 4 {
            self.before = rate;
            self.share *= 2;
            self.settling = true;
        } else {
            self.growing = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Runs windows with a rate that depends on the connections used; returns the connections after each.
    fn shares(windows: usize, size: u64, rate: impl Fn(usize) -> u64) -> Vec<usize> {
        shares_waiting(windows, size, (rate, WINDOW))
    }

    /// The same, where each connection waits for the upstream so long in each window.
    fn shares_waiting(
        windows: usize,
        size: u64,
        (rate, waited): (impl Fn(usize) -> u64, Duration),
    ) -> Vec<usize> {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        let mut arrived = 0;
        (0..windows)
            .map(|_| {
                now += WINDOW;
                pace.tick = now;
                arrived += rate(pace.share()) / 2;
                pace.note_working(pace.share(), now - WINDOW, arrived - rate(pace.share()) / 2);
                pace.measure(now, (arrived, size - arrived), waited);
                pace.share()
            })
            .collect()
    }

    #[test]
    fn grows_while_it_helps() {
        assert_eq!(
            shares(5, 1000 * MIB, |n| 20 * MIB * n as u64),
            [1, 2, 4, 8, 16]
        );
    }

    #[test]
    fn stops_when_it_does_not() {
        assert_eq!(shares(5, 1000 * MIB, |_| 20 * MIB), [1, 2, 2, 2, 2]);
    }

    #[test]
    fn a_fast_transfer_is_left_alone() {
        assert_eq!(shares(1, 600 * MIB, |_| 1000 * MIB), [1]);
    }

    #[test]
    fn more_connections_are_no_help_to_a_busy_machine() {
        assert_eq!(
            shares_waiting(5, 1000 * MIB, (|_| 20 * MIB, WINDOW / 10)),
            [1, 1, 1, 1, 1]
        );
    }

    #[test]
    fn timers_that_always_ring_late_tell_of_a_busy_machine() {
        let share_when_late = |late: [u64; 4]| {
            let mut now = Instant::now();
            let mut pace = Pace::new(now);
            for (tick, late) in (1..).zip(late.iter().cycle().take(12)) {
                pace.tick = now + WINDOW / 3;
                now = pace.tick + Duration::from_millis(*late);
                pace.measure(now, (tick * MIB, 1000 * MIB), WINDOW / 3);
                pace.note_working(pace.share(), now, tick * MIB);
            }
            pace.share()
        };
        assert_eq!(share_when_late([80, 70, 60, 90]), 1);
        assert!(share_when_late([80, 0, 60, 90]) > 1);
    }

    #[test]
    fn a_step_is_judged_once_all_of_it_works() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        let mut arrived = 0;
        let mut window = |pace: &mut Pace, working: u64, answered: usize| {
            now += WINDOW;
            pace.tick = now;
            arrived += working * 6 * MIB;
            pace.measure(now, (arrived, 1000 * MIB), WINDOW);
            pace.note_working(answered, now, arrived);
            pace.share()
        };
        assert_eq!(window(&mut pace, 1, 1), 1);
        assert_eq!(window(&mut pace, 1, 1), 2);
        for _ in 0..5 {
            assert_eq!(window(&mut pace, 1, 1), 2, "the second is not answered");
        }
        assert_eq!(window(&mut pace, 1, 2), 2, "now it is");
        assert_eq!(window(&mut pace, 2, 2), 4);
    }

    #[test]
    fn a_pause_is_left_alone() {
        assert_eq!(shares(4, 1000 * MIB, |_| 0), [1, 1, 1, 1]);
    }

    #[test]
    fn what_worked_before_may_be_tried_again() {
        let mut pace = Pace::new(Instant::now());
        pace.note_working(4, Instant::now(), 0);
        pace.shrink(2);
        assert_eq!(pace.share(), 2);
        for share in [3, 4, 4] {
            pace.regrow();
            assert_eq!(pace.share(), share);
        }
    }
}
