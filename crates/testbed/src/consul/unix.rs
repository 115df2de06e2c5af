//! An agent that is asked through a Unix socket.

use std::path::PathBuf;

use super::{Builder, Consul};

/// The longest path that the kernel takes for a socket, without the byte that ends it.
const LONGEST: usize = 107;

impl Builder {
    /// Listens on a socket in the test's directory too, beside its address.
    #[must_use]
    pub fn unix_socket(mut self) -> Builder {
        self.unix_socket = true;
        self
    }
}

impl Consul {
    /// The path of its socket, if it has one.
    pub fn unix_path(&self) -> PathBuf {
        assert!(self.builder.unix_socket, "this needs Builder::unix_socket");
        self.builder.own_path("sock")
    }

    /// As in `consul_address`.
    pub fn unix_url(&self) -> String {
        format!("unix:{}", self.unix_path().display())
    }
}

pub(super) fn config(builder: &Builder) -> Result<String, String> {
    let path = builder.own_path("sock");
    let length = path.as_os_str().len();
    if length > LONGEST {
        return Err(format!(
            "{} is {length} bytes long and a socket's path at most {LONGEST}: \
             set CARGO_TARGET_DIR to a shorter path",
            path.display()
        ));
    }
    Ok(format!("addresses {{ http = \"{} unix://{}\" }}", builder.ip, path.display()))
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    use super::*;
    use crate::{Dir, Net};

    fn status(path: &Path) -> io::Result<String> {
        let mut stream = UnixStream::connect(path)?;
        stream.write_all(b"GET /v1/status/leader HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.lines().next().unwrap_or_default().to_owned())
    }

    #[test]
    fn answers_on_its_socket_and_on_its_address() {
        let (net, dir) = (Net::isolated(), Dir::new("consul_unix"));
        let mut consul = Consul::builder(&net, &dir).unix_socket().start();
        let path = consul.unix_path();
        assert_eq!(consul.unix_url(), format!("unix:{}", path.display()));
        assert_eq!(status(&path).unwrap(), "HTTP/1.0 200 OK");
        assert_eq!(consul.raw("GET", "/v1/status/leader", "").unwrap().status, 200);

        // One that was killed leaves its socket behind, and nobody listens there.
        consul.kill();
        assert!(path.exists() && status(&path).is_err());
        consul.restart();
        assert_eq!(status(&path).unwrap(), "HTTP/1.0 200 OK");
        consul.stop();
        assert!(!path.exists());
    }

    #[test]
    fn a_path_that_is_too_long_is_refused() {
        let (net, dir) = (Net::isolated(), Dir::new(&"long".repeat(30)));
        let error = Consul::builder(&net, &dir).unix_socket().try_start().err().unwrap();
        assert!(error.contains("CARGO_TARGET_DIR"), "{error}");
    }
}
