//! Render and reload, as consul-template does it, at its best.
//!
//! A blocking query for the healthy instances; where the servers differ from those rendered last,
//! a new file in place of the old one, and SIGHUP to nginx's master. Quicker than consul-template:
//! it is one thread that renders one upstream, it waits for no more changes to come (`wait` is
//! off, as by default), and it starts no `nginx -t` and no `nginx -s reload`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use testbed::http::Conn;
use testbed::nginx::Builder;
use testbed::{Consul, Dir, Nginx};

/// How long a query blocks. Short, since the thread looks between two queries whether it should
/// end; a change ends a query at once, as ever.
const WAIT: Duration = Duration::from_secs(2);

/// An nginx without the module, and the thread that keeps its servers in step with Consul.
pub struct RenderAndReload {
    nginx: Nginx,
    reloads: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct Template {
    conn: Conn,
    service: String,
    /// What stands behind each server's address and weight.
    parameters: String,
    file: PathBuf,
    index: u64,
    rendered: String,
}

impl RenderAndReload {
    /// `upstream` is what the upstream has beside its servers.
    pub fn start(
        consul: &Consul,
        dir: &Dir,
        conf: Builder,
        service: &str,
        upstream: &str,
        parameters: &str,
    ) -> RenderAndReload {
        let file = dir.join(format!("{service}.servers"));
        let mut template = Template::new(consul, service, parameters, &file)
            .unwrap_or_else(|error| panic!("the first rendering of {}: {error}", file.display()));
        let nginx = conf
            .module(false)
            .http(format!("upstream {service} {{ {upstream} include {}; }}", file.display()))
            .server(service)
            .start();
        let master = Pid::from_raw(nginx.pid() as i32).expect("no process has the ID 0");

        let (reloads, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, stopped) = (reloads.clone(), stop.clone());
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match template.next() {
                    Ok(false) => {}
                    Ok(true) => {
                        kill_process(master, Signal::HUP).expect("nginx is alive");
                        counted.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(error) => panic!("{}: {error}", template.file.display()),
                }
            }
        });
        RenderAndReload { nginx, reloads, stop, thread: Some(thread) }
    }

    pub fn nginx(&self) -> &Nginx {
        &self.nginx
    }

    pub fn reloads(&self) -> usize {
        self.reloads.load(Ordering::Relaxed)
    }
}

impl Drop for RenderAndReload {
    fn drop(&mut self) {
        // Before nginx, which ends with its field: no signal may go to a process that is gone.
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Template {
    fn new(consul: &Consul, service: &str, parameters: &str, file: &Path) -> io::Result<Template> {
        let mut conn = Conn::open(consul.addr())?;
        conn.set_timeout(WAIT * 4);
        let mut template = Template {
            conn,
            service: service.into(),
            parameters: parameters.into(),
            file: file.into(),
            index: 0,
            rendered: String::new(),
        };
        template.next()?;
        Ok(template)
    }

    /// Waits for the next answer. Whether there is a new file.
    fn next(&mut self) -> io::Result<bool> {
        let (index, wait) = (self.index, WAIT.as_secs());
        let path =
            format!("/v1/health/service/{}?passing&index={index}&wait={wait}s", self.service);
        let answer = self.conn.get(&path)?;
        if answer.status != 200 {
            return Err(io::Error::other(format!("{path}: {} {}", answer.status, answer.text())));
        }
        self.index = answer.header("x-consul-index").parse().map_err(io::Error::other)?;
        let rendered = self.render(&answer.json());
        if rendered == self.rendered {
            return Ok(false);
        }
        let new = self.file.with_extension("new");
        fs::write(&new, &rendered)?;
        fs::rename(&new, &self.file)?;
        self.rendered = rendered;
        Ok(true)
    }

    fn render(&self, entries: &Value) -> String {
        let entries = entries.as_array().map(Vec::as_slice).unwrap_or_default();
        // By ID, as templates have it: Consul's own order is not stable.
        let mut servers: Vec<(&str, String)> = entries
            .iter()
            .map(|entry| {
                let service = &entry["Service"];
                let (address, port) = (service["Address"].as_str(), &service["Port"]);
                let (weight, parameters) = (&service["Weights"]["Passing"], &self.parameters);
                let address = address.unwrap_or_default();
                let server = format!("server {address}:{port} weight={weight} {parameters};\n");
                (service["ID"].as_str().unwrap_or_default(), server)
            })
            .collect();
        servers.sort_unstable();
        servers.into_iter().map(|(_, server)| server).collect()
    }
}
