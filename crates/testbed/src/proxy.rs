//! A proxy between the cache and whatever it asks: HTTP (absolute form and CONNECT) and SOCKS5 on one port, with or without a login.
//!
//! It notes what it was asked to connect to, and connects to wherever a test says that leads.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::lock;

const HEAD_LIMIT: usize = 64 * 1024;

/// A proxy on a loopback port; ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    desk: Arc<Desk>,
    _accepting: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Desk {
    login: Mutex<Option<(String, String)>>,
    places: Mutex<HashMap<String, u16>>,
    asked: Mutex<Vec<String>>,
}

impl Proxy {
    /// Starts on 127.0.0.1; it wants no login.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("bind a loopback port");
        let address = listener.local_addr().expect("a listener has an address");
        let desk = Arc::new(Desk::default());
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, Arc::clone(&desk)));
        Proxy {
            address,
            desk,
            _accepting: accepting,
        }
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Wants this login from now on.
    pub fn require(&self, username: &str, password: &str) {
        *lock(&self.desk.login) = Some((username.to_owned(), password.to_owned()));
    }

    /// Where `host:port` leads: a port on 127.0.0.1. What is not said leads to its own port there.
    pub fn lead(&self, place: &str, port: u16) {
        lock(&self.desk.places).insert(place.to_owned(), port);
    }

    /// What it was asked for, in order: `CONNECT host:port`, `GET host:port` or `SOCKS host:port`.
    pub fn asked(&self) -> Vec<String> {
        lock(&self.desk.asked).clone()
    }
}

impl Desk {
    fn note(&self, how: &str, place: &str) {
        lock(&self.asked).push(format!("{how} {place}"));
    }

    async fn connect(&self, place: &str) -> Option<TcpStream> {
        let led = lock(&self.places).get(place).copied();
        let own = || place.rsplit_once(':')?.1.parse().ok();
        TcpStream::connect(("127.0.0.1", led.or_else(own)?))
            .await
            .ok()
    }

    fn knows(&self, head: &str) -> bool {
        let Some((username, password)) = lock(&self.login).clone() else {
            return true;
        };
        let wanted = format!(
            "Basic {}",
            STANDARD.encode(format!("{username}:{password}"))
        );
        let shown = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            let fits = name.eq_ignore_ascii_case("proxy-authorization");
            fits.then(|| value.trim().to_owned())
        });
        shown.is_some_and(|shown| shown == wanted)
    }
}

async fn accept(listener: TcpListener, desk: Arc<Desk>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            Ok((stream, _)) = listener.accept() => {
                let desk = Arc::clone(&desk);
                connections.spawn(async move { serve(stream, &desk).await });
            }
        }
    }
}

async fn serve(mut client: TcpStream, desk: &Desk) -> Option<()> {
    client.set_nodelay(true).ok();
    let mut first = [0];
    client.peek(&mut first).await.ok()?;
    if first[0] == 5 {
        socks(&mut client, desk).await
    } else {
        http(&mut client, desk).await
    }
}

/// What a request in HTTP wants.
struct Wish {
    method: String,
    place: String,
    /// The head as the server is to have it, where the request is not for a tunnel.
    head: String,
}

impl Wish {
    fn of(head: &str) -> Option<Self> {
        let (line, rest) = head.split_once("\r\n")?;
        let mut words = line.split(' ');
        let (method, target) = (words.next()?, words.next()?);
        let Some(target) = target.strip_prefix("http://") else {
            return Some(Wish {
                method: method.to_owned(),
                place: target.to_owned(),
                head: String::new(),
            });
        };
        let (place, path) = target.split_once('/')?;
        let port = if place.contains(':') { "" } else { ":80" };
        let kept = rest
            .split_inclusive("\r\n")
            .filter(|line| !line.to_ascii_lowercase().starts_with("proxy-"));
        let kept: String = kept.collect();
        Some(Wish {
            method: method.to_owned(),
            place: format!("{place}{port}"),
            head: format!("{method} /{path} HTTP/1.1\r\nConnection: close\r\n{kept}"),
        })
    }
}

async fn http(client: &mut TcpStream, desk: &Desk) -> Option<()> {
    let head = read_head(client).await?;
    let wish = Wish::of(&head)?;
    desk.note(&wish.method, &wish.place);
    if !desk.knows(&head) {
        return refuse(client, "407 Proxy Authentication Required").await;
    }
    let Some(mut server) = desk.connect(&wish.place).await else {
        return refuse(client, "502 Bad Gateway").await;
    };
    if wish.method == "CONNECT" {
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.ok()?;
    }
    server.write_all(wish.head.as_bytes()).await.ok()?;
    copy_bidirectional(client, &mut server).await.ok().map(drop)
}

async fn read_head(client: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await.ok()?);
        assert!(head.len() < HEAD_LIMIT, "an endless head");
    }
    String::from_utf8(head).ok()
}

async fn refuse(client: &mut TcpStream, status: &str) -> Option<()> {
    let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    client.write_all(answer.as_bytes()).await.ok()
}

async fn socks(client: &mut TcpStream, desk: &Desk) -> Option<()> {
    greet(client, desk).await?;
    let place = place(client).await?;
    desk.note("SOCKS", &place);
    let server = desk.connect(&place).await;
    let refused = u8::from(server.is_none()) * 5;
    let answer = [5, refused, 0, 1, 0, 0, 0, 0, 0, 0];
    client.write_all(&answer).await.ok()?;
    copy_bidirectional(client, &mut server?)
        .await
        .ok()
        .map(drop)
}

/// RFC 1928 section 3 and RFC 1929.
async fn greet(client: &mut TcpStream, desk: &Desk) -> Option<()> {
    let [_version, count] = read(client).await?;
    let mut offered = vec![0; count.into()];
    client.read_exact(&mut offered).await.ok()?;
    let Some(login) = lock(&desk.login).clone() else {
        return client.write_all(&[5, 0]).await.ok();
    };
    if !offered.contains(&2) {
        client.write_all(&[5, 0xff]).await.ok();
        return None;
    }
    client.write_all(&[5, 2]).await.ok()?;
    let [_version] = read(client).await?;
    let right = (text(client).await?, text(client).await?) == login;
    client.write_all(&[1, u8::from(!right)]).await.ok()?;
    right.then_some(())
}

async fn place(client: &mut TcpStream) -> Option<String> {
    let [_version, _connect, _reserved, kind] = read(client).await?;
    let host = match kind {
        1 => std::net::Ipv4Addr::from(read::<4>(client).await?).to_string(),
        3 => text(client).await?,
        _ => format!("[{}]", std::net::Ipv6Addr::from(read::<16>(client).await?)),
    };
    Some(format!("{host}:{}", client.read_u16().await.ok()?))
}

async fn read<const N: usize>(stream: &mut TcpStream) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await.ok()?;
    Some(bytes)
}

async fn text(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = vec![0; stream.read_u8().await.ok()?.into()];
    stream.read_exact(&mut bytes).await.ok()?;
    String::from_utf8(bytes).ok()
}
