//! The page in a real browser, where there is one: Debian's package chromium.
//!
//! Pictures of it are left in `target/tmp/status`.

mod common;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use common::{NOW, Sample, peer, server};

/// A page that is served as long as the test runs; what is on it depends on how often it was asked
/// for.
struct Site {
    address: SocketAddr,
    requests: Arc<AtomicU64>,
}

impl Site {
    fn new(sample: impl Fn(u64) -> Sample + Send + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(AtomicU64::new(0));
        let count = requests.clone();
        // It ends with the test.
        thread::spawn(move || {
            server::serve(&listener, |_| sample(count.fetch_add(1, Ordering::Relaxed)));
        });
        Self { address, requests }
    }

    fn url(&self, args: &str) -> String {
        format!("http://{}{}?format=html{args}", self.address, server::PREFIX)
    }
}

/// What the browser has at the end, and what it wrote to its console.
struct Seen {
    page: String,
    console: Vec<String>,
}

/// Looks at a page with these options; `None` where there is no browser.
fn browse(name: &str, url: &str, options: &[&str]) -> Option<Seen> {
    let Some(chromium) = ["chromium", "chromium-browser", "google-chrome"]
        .iter()
        .flat_map(|name| {
            std::env::split_paths(&std::env::var_os("PATH")?)
                .map(|dir| dir.join(name))
                .find(|path| path.is_file())
        })
        .next()
    else {
        println!("skipped: there is no browser (Debian's package chromium)");
        return None;
    };
    let profile = directory().join(format!("{name}.profile"));
    let output = Command::new("timeout")
        .args(["--kill-after=5", "120"])
        .arg(chromium)
        // Containers have no place for its sandbox; it sees nothing but this page.
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        .args(["--no-first-run", "--disable-background-networking", "--hide-scrollbars"])
        .args(["--enable-logging=stderr"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .args(options)
        .arg(url)
        .output()
        .unwrap();
    let _ = fs::remove_dir_all(&profile);
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}:\n{log}", output.status);
    let console = log.lines().filter(|line| line.contains(":CONSOLE")).map(str::to_owned);
    Some(Seen {
        page: String::from_utf8_lossy(&output.stdout).into_owned(),
        console: console.collect(),
    })
}

fn directory() -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("status");
    fs::create_dir_all(&path).unwrap();
    path
}

/// The time of the page goes on as fast as it has nothing to do. After these nine seconds it was
/// refreshed once, after five; on a machine that is busy time goes on a little further.
const NINE_SECONDS: [&str; 2] = ["--virtual-time-budget=9000", "--dump-dom"];

fn hostile() -> Sample {
    let mut sample = Sample::new(NOW);
    let text = "<script>console.error('hacked')</script><img src=x onerror=console.error('hacked')>\
                \"'\u{202E}gnp.exe\u{2066}";
    sample.push_hostile(text.repeat(2).as_bytes(), NOW);
    sample
}

#[test]
fn a_scale_up_is_seen_without_a_reload() {
    let site = Site::new(|nth| {
        let mut sample = Sample::new(NOW);
        if nth > 0 {
            sample.peers[0].push(peer(99, "10.0.0.99:8080", "web-99", NOW));
            sample.document.upstreams[0].held = 7;
        }
        sample
    });
    let Some(seen) = browse("scale-up", &site.url(""), &NINE_SECONDS) else { return };
    assert!(site.requests.load(Ordering::Relaxed) >= 2, "it was never refreshed");
    assert!(seen.page.contains("10.0.0.99:8080") && seen.page.contains("7 removals held"));
    assert!(seen.page.contains("serving (5)"));
    assert_eq!(seen.console, [""; 0]);
}

#[test]
fn it_stands_still_when_told_to() {
    let site = Site::new(|_| Sample::new(NOW));
    if browse("still", &site.url("&refresh=off"), &NINE_SECONDS).is_some() {
        assert_eq!(site.requests.load(Ordering::Relaxed), 1);
    }
}

/// Serves the page with a script that does what a reader would; no policy forbids it here.
fn read_by(script: &'static str) -> (String, Arc<AtomicU64>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let requests = Arc::new(AtomicU64::new(0));
    let count = requests.clone();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let page = Sample::new(NOW).text("/", "format=html");
            let page = page.replace("</body>", &format!("<script>{script}</script></body>"));
            // A browser asks for an icon, too.
            if let Ok(first) = server::reply(stream, &[], &page)
                && first.starts_with("GET / ")
            {
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    (url, requests)
}

#[test]
fn a_refresh_keeps_what_the_reader_did() {
    let (url, requests) = read_by(
        "const before = document.querySelector('main');
         setTimeout(() => {
           document.getElementById('http-1').open = true;
           document.getElementById('http-0-serving').open = false;
           document.querySelector('#http-1 > summary').focus({ preventScroll: true });
           scrollTo(0, 120);
         }, 1000);
         setTimeout(() => {
           const seen = [document.activeElement.parentElement.id, scrollY,
             document.querySelector('main') !== before];
           document.body.dataset.seen = seen.join();
         }, 8000);",
    );
    let options = ["--window-size=1000,300", NINE_SECONDS[0], NINE_SECONDS[1]];
    let Some(seen) = browse("reader", &url, &options) else { return };
    assert!(requests.load(Ordering::Relaxed) >= 2, "it was never refreshed");
    assert!(seen.page.contains("data-seen=\"http-1,120,true\""), "{}", seen.page);
    let open = |id: &str| {
        let (_, rest) = seen.page.split_once(&format!("id=\"{id}\"")).unwrap();
        rest.split_once('>').unwrap().0.contains("open")
    };
    assert!(open("http-1") && !open("http-0-serving"));
    // And what nobody touched is as the server has it.
    assert!(open("http-0") && open("http-0-not-serving") && !open("stream-2"));
}

#[test]
fn a_refresh_waits_while_text_is_selected() {
    let (url, requests) = read_by(
        "setTimeout(() => getSelection().selectAllChildren(document.querySelector('h2')), 1000);",
    );
    if browse("selected", &url, &NINE_SECONDS).is_some() {
        assert_eq!(requests.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn a_page_that_is_old_says_so() {
    // The second answer has no upstream of the name that is asked for any more.
    let site = Site::new(|nth| {
        let mut sample = Sample::new(NOW);
        if nth > 0 {
            sample.document.upstreams.retain(|upstream| upstream.name.bytes() != b"api");
        }
        sample
    });
    let url = site.url("").replace("?", "/upstreams/api?");
    let Some(seen) = browse("old", &url, &NINE_SECONDS) else { return };
    let note = "! The page cannot be refreshed (nginx answered 404): this is from 14:03:11 UTC.";
    assert!(seen.page.contains(note), "{}", seen.page);
    assert!(seen.page.contains("<h2>api</h2>"), "what was there is still shown");
}

#[test]
fn hostile_text_does_nothing() {
    let site = Site::new(|_| hostile());
    let Some(seen) = browse("hostile", &site.url("&q=%3Cscript%3E"), &NINE_SECONDS) else { return };
    assert_eq!(seen.console, [""; 0]);
    assert!(seen.page.contains("&lt;script&gt;console.error('hacked')"));
    assert_eq!(seen.page.matches("<script>").count(), 1);
    assert!(!seen.page.contains("<img") && !seen.page.contains('\u{202E}'));
}

/// The other tests look for an empty console: here it is not.
#[test]
fn what_the_policy_forbids_is_seen() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let headers: Vec<_> = consul_status::Format::Html.headers().collect();
            let _ =
                server::reply(stream, &headers, "<script>alert(1)</script><p style=\"top:0\">x");
        }
    });
    let Some(seen) = browse("forbidden", &url, &["--dump-dom"]) else { return };
    let violations = seen.console.iter().filter(|line| line.contains("Content Security Policy"));
    assert_eq!(violations.count(), 2, "{:?}", seen.console);
}

#[test]
fn pictures() {
    let site = Site::new(|_| hostile());
    for (name, size, scheme) in [
        ("light-wide", "1280,1800", "1"),
        ("dark-wide", "1280,1800", "0"),
        ("light-narrow", "400,1800", "1"),
        ("dark-narrow", "400,1800", "0"),
    ] {
        let path = directory().join(format!("{name}.png"));
        let _ = fs::remove_file(&path);
        let options = [
            format!("--window-size={size}"),
            format!("--blink-settings=preferredColorScheme={scheme}"),
            format!("--screenshot={}", path.display()),
        ];
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let Some(seen) = browse(name, &site.url(""), &options) else { return };
        assert_eq!(seen.console, [""; 0]);
        let picture = fs::read(&path).unwrap();
        assert!(picture.starts_with(b"\x89PNG") && picture.len() > 20_000);
    }
}
