//! A separate Postgres server, for tests that kill it.
#![allow(dead_code, missing_docs, unreachable_pub)] // Each test uses a part.

use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use tempfile::TempDir;

use super::postgres::services;

pub struct Server {
    dir: TempDir,
    port: u16,
}

impl Server {
    /// Runs `scripts/services` with this word for this server.
    pub fn script(&self, word: &str) -> String {
        let (home, port) = (self.dir.path().as_os_str(), self.port.to_string());
        let port = ("THROUGHLINE_TEST_POSTGRES_PORT", port.as_ref());
        services(word, &[("TMPDIR", home), port]).unwrap()
    }

    pub fn start() -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        // Postgres does not run as root and needs access to the folder.
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let server = Self { dir, port };
        server.script("start");
        server
    }

    /// Kills the server like a crash.
    pub fn crash(&self) {
        let data = self.dir.path().join("throughline-services/postgres");
        let file = data.join("postmaster.pid");
        let pid = std::fs::read_to_string(&file).unwrap();
        let pid = pid.lines().next().unwrap();
        let killed = Command::new("kill").args(["-QUIT", pid]).status().unwrap();
        assert!(killed.success());
        while file.exists() {
            sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.script("stop");
    }
}
