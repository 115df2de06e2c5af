//! The client against a server that answers byte by byte what the test wants, over a real socket.

use std::time::{Duration, Instant};

use consul_watch::agent::{Address, Secret, Token};
use consul_watch::client::Service;
use consul_watch::error::{Cause, Retry};
use consul_watch::query::Parameter;
use consul_watch::watch::{Answer, Ask, Transport};
use consul_watch::{Agents, Error, Pool, Query};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

const TOKEN: &str = "b1gs33cr3t";

fn agents(address: &str) -> Agents {
    Agents {
        token: Some(Token::Fixed(Secret::new(TOKEN.as_bytes()).unwrap())),
        timeout: Duration::from_secs(2),
        max_response: 1000,
        ..Agents::at(Address::parse(address).unwrap())
    }
}

fn web() -> Query {
    Query::new("web").unwrap()
}

fn service(agents: &Agents, query: Query) -> Service {
    Pool::new(100, |text| panic!("{text}")).client(agents).unwrap().service(query)
}

/// Reads one request's head.
async fn request(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

/// A server for one connection, which answers its first request with `bytes` and then waits for
/// the client to close. Its result is the request.
async fn server(bytes: Vec<u8>) -> (String, JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let task = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let head = request(&mut stream).await;
        // The client may hang up in the middle of a body that is too large.
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        head
    });
    (address, task)
}

fn response(status: &str, headers: &str, body: &str) -> Vec<u8> {
    let len = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Length: {len}\r\n{headers}\r\n{body}").into_bytes()
}

async fn ask(bytes: Vec<u8>, ask: Ask) -> (Result<Answer, Error>, String) {
    let (address, task) = server(bytes).await;
    let query = Query::new("my web").unwrap().with(Parameter::Datacenter, "dc2").unwrap();
    let answer = service(&agents(&address), query).ask(ask).await;
    (answer, task.await.unwrap())
}

async fn fails(bytes: Vec<u8>) -> Error {
    ask(bytes, Ask::Consistent).await.0.unwrap_err()
}

#[tokio::test]
async fn asks_as_the_health_api_wants_it() {
    let ok = || response("200 OK", "X-Consul-Index: 7\r\n", "[]");
    let (answer, head) = ask(ok(), Ask::Consistent).await;
    let answer = answer.unwrap();
    assert_eq!((answer.index, answer.body.as_slice()), (7, b"[]".as_slice()));
    assert!(head.starts_with("GET /v1/health/service/my%20web?dc=dc2&consistent HTTP/1.1\r\n"));
    let head = head.to_ascii_lowercase();
    assert!(head.contains(&format!("x-consul-token: {TOKEN}\r\n")));
    assert!(!head.contains("accept-encoding"), "{head}");

    let (_, head) = ask(ok(), Ask::Blocking { index: 42 }).await;
    assert!(head.contains("?dc=dc2&index=42&wait=25000ms HTTP/1.1"), "{head}");
}

#[tokio::test]
async fn a_connection_serves_many_questions() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        for _ in 0..3 {
            request(&mut stream).await;
            let answer = response("200 OK", "X-Consul-Index: 7\r\n", "[]");
            stream.write_all(&answer).await.unwrap();
        }
    });
    let mut service = service(&agents(&address), web());
    for _ in 0..3 {
        service.ask(Ask::Consistent).await.unwrap();
    }
    server.await.unwrap();
}

#[tokio::test]
async fn statuses() {
    let index = "X-Consul-Index: 1\r\n";
    let denied = fails(response("403 Forbidden", index, "ACL not found")).await;
    assert_eq!((denied.cause(), denied.retry()), (Cause::Denied, Retry::Slowly));

    let error = fails(response("500 Internal Server Error", index, "No cluster leader")).await;
    assert_eq!(error.to_string(), "status 500: No cluster leader");
    assert_eq!((error.cause(), error.retry()), (Cause::Status, Retry::BackOff));

    let error = fails(response("500 x", index, "No path to datacenter")).await;
    assert_eq!(error.retry(), Retry::Slowly);

    let html = format!("<html>\r\n\u{1b}[31m{}", "x".repeat(5000));
    let error = fails(response("502 Bad Gateway", "", &html)).await;
    let text = error.to_string();
    assert!(text.starts_with("status 502") && text.len() < 300, "{text}");
    assert!(text.bytes().all(|b| (b' '..=b'~').contains(&b)), "{text:?}");
}

#[tokio::test]
async fn a_redirect_is_an_error_and_the_token_stays() {
    let (other, task) = server(response("200 OK", "X-Consul-Index: 7\r\n", "[]")).await;
    let error = fails(response("301 Moved", &format!("Location: {other}/\r\n"), "")).await;
    assert_eq!(error.cause(), Cause::Status);
    assert!(!task.is_finished(), "nobody came to the other place");
    task.abort();
}

#[tokio::test]
async fn the_index_must_be_there_and_a_number() {
    for headers in ["", "X-Consul-Index: \r\n", "X-Consul-Index: -1\r\n", "X-Consul-Index: 7x\r\n"]
    {
        let error = fails(response("200 OK", headers, "[]")).await;
        assert!(matches!(error, Error::Index), "{headers:?}: {error}");
    }
    let huge = response("200 OK", "X-Consul-Index: 18446744073709551615\r\n", "[]");
    assert_eq!(ask(huge, Ask::Consistent).await.0.unwrap().index, u64::MAX);
}

#[tokio::test]
async fn a_body_over_the_limit_is_cut_while_it_comes() {
    let error = fails(response("200 OK", "X-Consul-Index: 7\r\n", &"x".repeat(1001))).await;
    assert!(matches!(error, Error::TooLarge { limit: 1000 }), "{error}");
    let body = "x".repeat(1000);
    assert!(
        ask(response("200 OK", "X-Consul-Index: 7\r\n", &body), Ask::Consistent).await.0.is_ok()
    );

    // Chunks without an end.
    let mut chunks =
        b"HTTP/1.1 200 OK\r\nX-Consul-Index: 7\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..100_000 {
        chunks.extend(b"4\r\nxxxx\r\n");
    }
    assert!(matches!(fails(chunks).await, Error::TooLarge { limit: 1000 }));
}

#[tokio::test]
async fn a_body_that_breaks_off_is_an_error() {
    let bytes = b"HTTP/1.1 200 OK\r\nX-Consul-Index: 7\r\nContent-Length: 99\r\n\r\n[".to_vec();
    assert_eq!(fails(bytes).await.cause(), Cause::Transport);
    assert_eq!(fails(b"\x16\x03\x01 what?\r\n\r\n".to_vec()).await.cause(), Cause::Transport);
    assert_eq!(fails(Vec::new()).await.cause(), Cause::Transport);
}

#[tokio::test]
async fn an_answer_that_stalls_ends_with_the_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        request(&mut stream).await;
        let half = b"HTTP/1.1 200 OK\r\nX-Consul-Index: 7\r\nContent-Length: 99\r\n\r\n[";
        stream.write_all(half).await.unwrap();
        std::future::pending::<()>().await;
    });
    let agents = Agents { timeout: Duration::from_millis(200), ..agents(&address) };
    let begin = Instant::now();
    let error = service(&agents, web()).ask(Ask::Consistent).await.unwrap_err();
    assert!(matches!(error, Error::Timeout), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(10));
    server.abort();
}

#[tokio::test]
async fn nobody_there() {
    // A port that was just free.
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let agents = agents(&format!("http://{address}"));
    let error = service(&agents, web()).ask(Ask::Consistent).await.unwrap_err();
    assert_eq!((error.cause(), error.retry()), (Cause::Transport, Retry::BackOff));
    let text = error.to_string();
    assert!(text.contains("refused") && !text.contains(TOKEN), "{text}");
}

#[tokio::test]
async fn a_name_is_resolved() {
    let (address, task) = server(response("200 OK", "X-Consul-Index: 7\r\n", "[]")).await;
    let agents = agents(&address.replace("127.0.0.1", "localhost"));
    assert_eq!(service(&agents, web()).ask(Ask::Consistent).await.unwrap().index, 7);
    assert!(task.await.unwrap().to_ascii_lowercase().contains("host: localhost:"));
}
