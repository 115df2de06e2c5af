//! The least of an HTTP server: enough for a browser, a scraper, and a look at the headers.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};

use consul_status::{Answer, Error, Format, Header, Request, request};

use super::{Sample, Table};

/// Where the status stands.
pub const PREFIX: &str = "/consul";

/// Answers requests for as long as the listener lives; `sample` says with what, given how many
/// requests there were.
pub fn serve(listener: &TcpListener, mut sample: impl FnMut(u64) -> Sample) {
    for (nth, stream) in (0..).zip(listener.incoming()) {
        // A client that goes away is no news.
        let _ = stream.and_then(|stream| respond(stream, || sample(nth)));
    }
}

fn respond(mut stream: TcpStream, sample: impl FnOnce() -> Sample) -> io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut accept = String::new();
    for line in lines {
        let line = line?;
        match line.split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("accept") => {
                value.clone_into(&mut accept)
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut words = first.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (path, args) = target.split_once('?').unwrap_or((target, ""));
    let path = percent(path);
    if !path.starts_with(PREFIX.as_bytes()) {
        return write!(stream, "HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n");
    }
    let parts = request::Parts {
        method: method.as_bytes(),
        path: request::rest(&path, PREFIX.as_bytes()),
        args: args.as_bytes(),
        accept: accept.as_bytes(),
    };
    let answer = Request::parse(&parts).and_then(|request| {
        let (format, head) = (request.format, request.head);
        let Sample { document, peers } = sample();
        let rows = Table { peers, ..Table::default() };
        let answer = Answer::new(document, rows, request, Some(PREFIX.as_bytes()))?;
        Ok((format, head, answer))
    });
    match answer {
        Ok((format, head, mut answer)) => {
            headers(&mut stream, 200, format)?;
            let mut buffer = Vec::new();
            let mut more = !head;
            while more {
                more = answer.fill(&mut buffer);
                stream.write_all(&buffer)?;
                buffer.clear();
            }
            Ok(())
        }
        Err(error) => refuse(&mut stream, error),
    }
}

fn refuse(stream: &mut TcpStream, error: Error) -> io::Result<()> {
    headers(stream, error.status(), Format::Json)?;
    stream.write_all(&error.body())
}

/// Answers one request with this page, whatever was asked for; gives the request's first line.
pub fn reply(mut stream: TcpStream, headers: &[Header], page: &str) -> io::Result<String> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    write!(stream, "HTTP/1.0 200 -\r\nContent-Type: text/html\r\n")?;
    for (name, value) in headers {
        write!(stream, "{name}: {value}\r\n")?;
    }
    write!(stream, "\r\n{page}")?;
    Ok(first)
}

fn headers(stream: &mut TcpStream, status: u16, format: Format) -> io::Result<()> {
    write!(stream, "HTTP/1.0 {status} -\r\nContent-Type: {}\r\n", format.content_type())?;
    for (name, value) in format.headers() {
        write!(stream, "{name}: {value}\r\n")?;
    }
    write!(stream, "\r\n")
}

fn percent(path: &str) -> Vec<u8> {
    let mut bytes = path.bytes();
    let mut out = Vec::new();
    while let Some(byte) = bytes.next() {
        let escaped = (byte == b'%').then(|| {
            let digit = |byte| char::from(byte).to_digit(16).map(|digit| digit as u8);
            Some(digit(bytes.next()?)? << 4 | digit(bytes.next()?)?)
        });
        out.extend(escaped.unwrap_or(Some(byte)));
    }
    out
}
