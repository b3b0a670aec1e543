//! The clients' door: HTTP/1.1 towards container clients.
//!
//! [`listen`] accepts connections and keeps out what is not HTTP; [`dispatch`] turns a request into a route and a grant; [`blob`],
//! [`manifest`] and [`listing`] ask the cache and say its answer in headers. How bytes reach the socket is [`body`]'s and [`sendfile`]'s
//! business alone. No decision about what may be served is made here.

pub mod blob;
pub mod body;
pub mod conditional;
pub mod dispatch;
pub mod doorman;
pub mod failure;
pub mod fair;
pub mod listen;
pub mod listing;
pub mod manifest;
pub mod observe;
pub mod problem;
pub mod sendfile;
mod work;
