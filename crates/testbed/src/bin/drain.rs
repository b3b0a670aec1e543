//! A load client that costs little beside what it measures: one thread a connection, bodies dropped inside the kernel.
//!
//! It measures wall time, bytes and the time to the first byte of a body, and prints them as JSON. It does not look at the bytes: whether they
//! are right is checked elsewhere, once, with a client that hashes.
//!
//! usage: `drain --url http://127.0.0.1:PORT/PATH [--connections N] [--seconds S] [--header 'Name: value']... [--slow BYTES]`
//!
//! Without `--seconds` each connection asks once, all at the same moment. With it they ask again and again over the same connection until the time is
//! up. `--slow` adds one more connection that takes so many bytes a second for as long as the others run.
#![expect(
    clippy::expect_used,
    reason = "a load client that cannot do its work has nothing else to do"
)]

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use serde_json::json;
use tokio::time::Instant;

/// What one receive may drop. The buffer is never written to, so that it takes no memory.
const GULP: usize = 1 << 20;

/// The largest head of an answer.
const HEAD: usize = 16 << 10;

/// Without a byte for so long a connection counts as dead.
const PATIENCE: Duration = Duration::from_mins(2);

/// What is asked, of whom and how often.
struct Plan {
    authority: String,
    request: String,
    connections: usize,
    seconds: Option<Duration>,
    slow: Option<usize>,
}

/// What one connection saw, times since the common start.
#[derive(Default)]
struct Seen {
    bytes: u64,
    answers: u64,
    first_byte: Option<Duration>,
    done: Duration,
    error: Option<String>,
}

/// One connection and its buffer.
struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// What the head of an answer says, and how much of the body came along with it.
struct Head {
    length: u64,
    along: u64,
}

/// Where all connections start together, and how the slow one learns that the others are done.
struct Start {
    barrier: Barrier,
    over: AtomicBool,
}

impl Plan {
    fn from_args(mut args: impl Iterator<Item = String>) -> Option<Self> {
        let (mut url, mut headers) = (String::new(), String::new());
        let mut plan = Plan {
            authority: String::new(),
            request: String::new(),
            connections: 1,
            seconds: None,
            slow: None,
        };
        while let Some(name) = args.next() {
            let value = args.next()?;
            match name.as_str() {
                "--url" => url = value,
                "--connections" => plan.connections = value.parse().ok()?,
                "--seconds" => plan.seconds = Some(Duration::from_secs_f64(value.parse().ok()?)),
                "--slow" => plan.slow = Some(value.parse().ok()?),
                "--header" => headers.extend([value.as_str(), "\r\n"]),
                _ => return None,
            }
        }
        let (authority, path) = url.strip_prefix("http://")?.split_once('/')?;
        authority.clone_into(&mut plan.authority);
        plan.request = format!("GET /{path} HTTP/1.1\r\nHost: {authority}\r\n{headers}\r\n");
        Some(plan)
    }

    fn is_over(&self, begin: Instant) -> bool {
        self.seconds
            .is_some_and(|seconds| begin.elapsed() >= seconds)
    }
}

impl Connection {
    fn open(plan: &Plan) -> io::Result<Self> {
        let stream = TcpStream::connect(&plan.authority)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Connection {
            stream,
            buffer: vec![0; GULP],
        })
    }

    fn ask(&mut self, plan: &Plan) -> io::Result<Head> {
        self.stream.write_all(plan.request.as_bytes())?;
        let mut head = Vec::with_capacity(HEAD);
        loop {
            let before = head.len();
            head.resize(HEAD, 0);
            let part = head.get_mut(before..).unwrap_or_default();
            let (_, came) = recv(&self.stream, part, RecvFlags::empty())?;
            head.truncate(before + came);
            if let Some(end) = head.windows(4).position(|part| part == b"\r\n\r\n") {
                let body = (head.len() - end - 4) as u64;
                head.truncate(end);
                return Head::parse(&String::from_utf8_lossy(&head), body);
            }
            if came == 0 {
                return Err(io::Error::other("closed before an answer"));
            }
        }
    }

    /// Drops what has come; the number of bytes.
    fn drop_some(&mut self, limit: u64) -> io::Result<u64> {
        let limit = usize::try_from(limit).unwrap_or(GULP).min(GULP);
        let part = self.buffer.get_mut(..limit).unwrap_or_default();
        let (_, came) = recv(&self.stream, part, RecvFlags::TRUNC)?;
        if came == 0 {
            return Err(io::Error::other("closed before the end of the body"));
        }
        Ok(came as u64)
    }
}

impl Head {
    fn parse(head: &str, along: u64) -> io::Result<Self> {
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap_or_default();
        if !status.contains(" 200 ") && !status.contains(" 206 ") {
            return Err(io::Error::other(status.to_owned()));
        }
        let length = lines
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
            .and_then(|(_, value)| value.trim().parse().ok())
            .ok_or_else(|| io::Error::other("an answer without a length"))?;
        Ok(Head { length, along })
    }
}

impl Seen {
    /// One answer, taken to its end or to the deadline.
    fn answer(
        &mut self,
        connection: &mut Connection,
        plan: &Plan,
        begin: Instant,
    ) -> io::Result<()> {
        let head = connection.ask(plan)?;
        let mut left = head.length.saturating_sub(head.along);
        self.bytes += head.along;
        if head.along > 0 {
            self.first_byte.get_or_insert_with(|| begin.elapsed());
        }
        while left > 0 && !plan.is_over(begin) {
            let came = connection.drop_some(left)?;
            self.first_byte.get_or_insert_with(|| begin.elapsed());
            self.bytes += came;
            left -= came;
        }
        self.answers += u64::from(left == 0);
        Ok(())
    }

    fn all(&mut self, plan: &Plan, begin: Instant) -> io::Result<()> {
        let mut connection = Connection::open(plan)?;
        self.answer(&mut connection, plan, begin)?;
        while plan.seconds.is_some() && !plan.is_over(begin) {
            self.answer(&mut connection, plan, begin)?;
        }
        Ok(())
    }

    /// Takes a little each second until the others are done; more than one answer is not asked for.
    fn slowly(
        &mut self,
        plan: &Plan,
        begin: Instant,
        over: &AtomicBool,
        rate: usize,
    ) -> io::Result<()> {
        let mut connection = Connection::open(plan)?;
        let head = connection.ask(plan)?;
        self.first_byte = Some(begin.elapsed());
        self.bytes = head.along;
        while !over.load(Ordering::Relaxed) && self.bytes < head.length {
            self.bytes += connection.drop_some(rate as u64)?;
            thread::sleep(Duration::from_secs(1));
        }
        Ok(())
    }
}

/// Starts one connection's thread; `rate` makes it the slow one.
fn start(plan: &Arc<Plan>, start: &Arc<Start>, rate: Option<usize>) -> JoinHandle<Seen> {
    let (plan, start) = (Arc::clone(plan), Arc::clone(start));
    thread::Builder::new()
        .stack_size(128 << 10)
        .spawn(move || {
            let mut seen = Seen::default();
            start.barrier.wait();
            let begin = Instant::now();
            let result = match rate {
                Some(rate) => seen.slowly(&plan, begin, &start.over, rate),
                None => seen.all(&plan, begin),
            };
            seen.done = begin.elapsed();
            seen.error = result.err().map(|error| error.to_string());
            seen
        })
        .expect("start a thread")
}

fn run(plan: Plan) -> serde_json::Value {
    let plan = Arc::new(plan);
    let threads = plan.connections + usize::from(plan.slow.is_some());
    let common = Arc::new(Start {
        barrier: Barrier::new(threads),
        over: AtomicBool::new(false),
    });
    let usual: Vec<_> = (0..plan.connections)
        .map(|_| start(&plan, &common, None))
        .collect();
    let slow = plan.slow.map(|rate| start(&plan, &common, Some(rate)));
    let seen: Vec<Seen> = usual
        .into_iter()
        .map(|thread| thread.join().expect("a client's thread"))
        .collect();
    common.over.store(true, Ordering::Relaxed);
    let slow = slow.map(|thread| thread.join().expect("the slow client's thread"));
    report(&seen, slow.as_ref())
}

fn report(seen: &[Seen], slow: Option<&Seen>) -> serde_json::Value {
    let mut errors: BTreeMap<&str, usize> = BTreeMap::new();
    for error in seen.iter().filter_map(|one| one.error.as_deref()) {
        *errors.entry(error).or_default() += 1;
    }
    let sorted = |times: Vec<Duration>| {
        let mut times: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
        times.sort_by(f64::total_cmp);
        times
    };
    let done = sorted(seen.iter().map(|one| one.done).collect());
    json!({
        "bytes": seen.iter().map(|one| one.bytes).sum::<u64>(),
        "answers": seen.iter().map(|one| one.answers).sum::<u64>(),
        "seconds": done.last(),
        "first_byte": sorted(seen.iter().filter_map(|one| one.first_byte).collect()),
        "done": done,
        "errors": errors,
        "slow": slow.map(|one| json!({"bytes": one.bytes, "error": one.error})),
    })
}

fn main() -> io::Result<()> {
    let plan = Plan::from_args(std::env::args().skip(1))
        .ok_or_else(|| io::Error::other("usage: see the head of this file"))?;
    writeln!(io::stdout(), "{}", run(plan))
}
