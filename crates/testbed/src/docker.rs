//! Containers of a real Docker engine.
//!
//! They are told apart from whatever else runs on that engine by a label of this process. Each is
//! removed with its value; and when the process ends, whatever the reason, a small shell removes
//! all that carries the label ([`crate::warden`] knows nothing of containers).

use std::io::{Read, Write};
use std::process::{ChildStdin, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::eventually;
use crate::warden::shell_that_stays;

/// Where the engine listens, for whoever has to be in between.
pub const SOCKET: &str = "/var/run/docker.sock";

const LABEL: &str = "testbed";

/// Reads until its input ends, which it does with the process that holds the other end.
const REAPER: &str = r#"
while read -r _; do :; done
containers=$(docker ps -aq --filter label="$1")
[ -z "$containers" ] || docker rm -f -v $containers
networks=$(docker network ls -q --filter label="$1")
[ -z "$networks" ] || docker network rm $networks
# An image that others were made of goes only after them.
for _ in 1 2 3; do
    images=$(docker images -aq --filter label="$1" | sort -u)
    [ -z "$images" ] || docker rmi -f $images
done
"#;

static REAPER_INPUT: OnceLock<ChildStdin> = OnceLock::new();

/// What an image of a shell and `sleep` needs, out of this system: the two and their libraries.
const IMAGE: &str = r#"
set -e
files="/bin/sh /bin/sleep"
libraries=$(ldd /bin/sh /bin/sleep | grep -o '/[^ :]*' | grep -v '^/bin/' | sort -u)
tar -chf - $files $libraries 2>/dev/null | docker import -c "LABEL $1" -c 'ENV PATH=/bin' - "$2"
"#;

/// How long a container may take from its start until its first process does something.
const READY: Duration = Duration::from_secs(20);

/// The engine, and an image to make containers of. All tests of a process share it.
pub struct Docker {
    label: String,
    image: String,
}

/// A container. It is removed with the value.
pub struct Container {
    name: String,
    id: String,
}

/// A network. It is removed with the value, which has to outlive the containers in it.
pub struct Network {
    name: String,
}

impl Docker {
    /// The engine, where there is one that answers; else one line on standard error, once.
    pub fn get() -> Option<&'static Docker> {
        static FOUND: OnceLock<Option<Docker>> = OnceLock::new();
        FOUND.get_or_init(Docker::find).as_ref()
    }

    fn find() -> Option<Docker> {
        let version = Command::new("docker")
            .args(["version", "--format", "{{.Server.Version}}"])
            .stderr(Stdio::null())
            .output();
        if !version.is_ok_and(|version| version.status.success()) {
            // Not by a macro: the test runner shows those of failed tests only.
            let _ = writeln!(std::io::stderr(), "skipped: no Docker engine answers");
            return None;
        }
        let own = format!("{}-{}", std::process::id(), random());
        let label = format!("{LABEL}={own}");
        // Kept open as long as the process lives.
        let _ = REAPER_INPUT.set(shell_that_stays(&["-c", REAPER, "sh", &label]));
        let image = format!("testbed-{own}");
        let made = Command::new("sh").args(["-c", IMAGE, "sh", &label, &image]).output();
        let made = made.expect("run sh");
        assert!(made.status.success(), "make an image: {}", text(&made));
        Some(Docker { label, image })
    }

    /// An image with a shell, `sleep`, and nothing else.
    pub fn image(&self) -> &str {
        &self.image
    }

    /// The same image under another name, for whoever looks at that.
    pub fn tag(&self, name: &str) -> String {
        run(&["tag", &self.image, name]);
        name.to_owned()
    }

    /// A name that no other container has.
    pub fn name(&self, part: &str) -> String {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        format!("{}-{part}-{n}", self.image)
    }

    /// Starts a container that waits until it is told to end, with these arguments of `docker run`.
    pub fn run(&self, name: &str, args: &[&str]) -> Container {
        self.run_script(name, args, SLEEPS)
    }

    /// The same with a script of its own, which has to say `ready` once its traps are set: a signal
    /// before that is lost on the first process of a container.
    pub fn run_script(&self, name: &str, args: &[&str], script: &str) -> Container {
        let container = self.run_image(name, args, &self.image, script);
        eventually(READY, &format!("{name} is ready"), || container.docker(&["logs"]) == "ready");
        container
    }

    /// The same of another image.
    pub fn run_image(&self, name: &str, args: &[&str], image: &str, script: &str) -> Container {
        self.run_command(name, args, image, &["sh", "-c", script])
    }

    /// Another image, with its own command.
    pub fn run_plain(&self, name: &str, args: &[&str], image: &str) -> Container {
        self.run_command(name, args, image, &[])
    }

    fn run_command(&self, name: &str, args: &[&str], image: &str, command: &[&str]) -> Container {
        let mut all = vec!["run", "--detach", "--name", name, "--label", &self.label];
        all.extend(args);
        all.push(image);
        all.extend(command);
        // Removed with the value even where it does not start.
        let mut container = Container { name: name.to_owned(), id: String::new() };
        container.id = run(&all);
        container
    }

    /// The same image with other settings, as `--change` of `docker commit` takes them.
    pub fn commit(&self, args: &[&str]) -> String {
        let (name, image) = (self.name("made-of"), self.name("made"));
        let made_of = Container { id: name.clone(), name };
        run(&["create", "--name", &made_of.name, "--label", &self.label, &self.image, "sh"]);
        run(&[&["commit"], args, &[&made_of.name, &image]].concat());
        image
    }

    pub fn network(&self, name: &str) -> Network {
        run(&["network", "create", "--label", &self.label, name]);
        Network { name: name.to_owned() }
    }
}

/// Ends on SIGTERM at once. A shell that waits for `sleep` would let a signal wait for it, too.
const SLEEPS: &str = "trap 'exit 0' TERM; echo ready; while :; do sleep 1000 & wait $!; done";

impl Container {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// `docker VERB ARGS… NAME`
    pub fn docker(&self, args: &[&str]) -> String {
        run(&[args, &[self.id.as_str()]].concat())
    }

    /// `docker exec NAME sh -c SCRIPT`
    pub fn exec(&self, script: &str) -> String {
        run(&["exec", &self.id, "sh", "-c", script])
    }

    pub fn connect(&self, network: &str) {
        run(&["network", "connect", network, &self.id]);
    }

    pub fn disconnect(&self, network: &str) {
        run(&["network", "disconnect", network, &self.id]);
    }

    pub fn rename(&mut self, name: &str) {
        run(&["rename", &self.id, name]);
        self.name = name.to_owned();
    }

    pub fn inspect(&self) -> Value {
        let answer = run(&["inspect", &self.id]);
        let mut answer: Value = serde_json::from_str(&answer).expect("docker inspect gives JSON");
        answer[0].take()
    }

    /// The host's port that an exposed one is bound to.
    pub fn port(&self, exposed: &str) -> u16 {
        let inspected = self.inspect();
        let port = &inspected["NetworkSettings"]["Ports"][exposed][0]["HostPort"];
        let port = port.as_str().and_then(|port| port.parse().ok());
        port.unwrap_or_else(|| panic!("{} has no binding of {exposed}: {inspected}", self.name))
    }

    /// Its address in a network.
    pub fn ip(&self, network: &str) -> String {
        let inspected = self.inspect();
        let ip = inspected["NetworkSettings"]["Networks"][network]["IPAddress"].as_str();
        ip.unwrap_or_else(|| panic!("{} is not in {network}: {inspected}", self.name)).to_owned()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // By name: where it did not start there is no ID.
        let _ = output(&["rm", "--force", "--volumes", &self.name]);
    }
}

impl Network {
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = output(&["network", "rm", &self.name]);
    }
}

/// Runs the docker program; what it says, without the line's end.
#[track_caller]
fn run(args: &[&str]) -> String {
    let output = output(args);
    assert!(output.status.success(), "docker {}: {}", args.join(" "), text(&output));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn output(args: &[&str]) -> Output {
    Command::new("docker").args(args).stdin(Stdio::null()).output().expect("run docker")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn random() -> u32 {
    let mut bytes = [0; 4];
    let source = std::fs::File::open("/dev/urandom");
    source.and_then(|mut file| file.read_exact(&mut bytes)).expect("read /dev/urandom");
    u32::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_goes_with_its_value() {
        let Some(docker) = Docker::get() else { return };
        let name = docker.name("life");
        let container = docker.run(&name, &["--publish", "127.0.0.1::80"]);
        assert!(container.port("80/tcp") > 0);
        assert_eq!(container.exec("echo hello"), "hello");
        assert_eq!(container.inspect()["State"]["Running"], true);
        drop(container);
        assert!(!output(&["inspect", &name]).status.success());
    }

    #[test]
    fn a_container_ends_at_once_when_it_is_told_to() {
        let Some(docker) = Docker::get() else { return };
        let container = docker.run(&docker.name("ends"), &[]);
        container.docker(&["stop", "--time", "30"]);
        assert_eq!(container.inspect()["State"]["ExitCode"], 0);
    }
}
