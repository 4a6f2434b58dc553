//! The service as a process of its own. It ends with the test.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

use crate::LONG;

pub(crate) struct Program {
    child: Child,
    /// Kept open: what it prints has somewhere to go.
    _output: BufReader<ChildStdout>,
    pub(crate) address: SocketAddr,
    pub(crate) operators: SocketAddr,
}

/// Where the next line says that it listens.
async fn listening(output: &mut BufReader<ChildStdout>, words: &str) -> SocketAddr {
    let mut line = String::new();
    timeout(LONG, output.read_line(&mut line)).await.expect("a line in time").unwrap();
    let said: SocketAddr = line.trim().strip_prefix(words).expect("an address").parse().unwrap();
    (Ipv4Addr::LOCALHOST, said.port()).into()
}

fn command(variables: &[(&str, String)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_failover-web"));
    command.env_clear().envs(variables.iter().cloned()).env("PORT", "0").kill_on_drop(true);
    command
}

impl Program {
    /// Starts it and waits until it says where it listens; give it an `OPERATOR_PORT`.
    pub(crate) async fn start(variables: &[(&str, String)]) -> Self {
        let mut child = command(variables).stdout(Stdio::piped()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let address = listening(&mut output, "listening on ").await;
        let operators = listening(&mut output, "listening for operators on ").await;
        Self { child, _output: output, address, operators }
    }

    /// What it says when it cannot start.
    pub(crate) async fn fails(variables: &[(&str, String)]) -> String {
        let output = timeout(LONG, command(variables).output()).await.expect("an end in time").unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id().expect("it runs")).unwrap();
        kill_process(Pid::from_raw(id).unwrap(), signal).unwrap();
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub(crate) async fn ends_well(mut self) {
        let status = timeout(LONG, self.child.wait()).await.expect("an end in time").unwrap();
        assert!(status.success(), "{status}");
    }
}
