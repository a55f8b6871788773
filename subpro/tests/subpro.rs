//! Runs the demo from outside, and holds it against the tutorial's 四、subprocess.
//!
//! Shell scripts stand in for the programs that it runs, so that no network is needed.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{fs, iter};

/// All of them fail, which Python does not mind.
const PS: (&str, &str) = ("ps", "printf '%s\\n' python cobra");
const GREP: (&str, &str) = (
    "grep",
    "while read -r l; do [ $l = $1 ] && echo grep $l; done; exit 3",
);
const LS: (&str, &str) = ("ls", "printf 'ls'; printf ' [%s]' \"$@\"; echo; exit 2");
const PING: (&str, &str) = ("ping", "printf 'ping'; printf ' [%s]' \"$@\"; echo; exit 1");
const LINE: &str = "---------------";
const OUTPUT: [&str; 5] = [
    "grep python",
    LINE,
    "ls [-l]",
    LINE,
    "ping [-c] [4] [www.baidu.com]",
];

#[test]
fn three_programs_print_in_order() {
    let end = Run::start("order", "exec \"$0\"", &[PS, GREP, LS, PING]).end();
    assert!(end.status.success(), "{end:?}");
    assert_eq!(end.lines, OUTPUT);
}

#[test]
fn three_programs_print_in_order_to_a_file() {
    let end = Run::start("file", "exec \"$0\" > \"$OUT\"", &[PS, GREP, LS, PING]).end();
    assert!(end.status.success(), "{end:?}");
    assert_eq!(
        fs::read_to_string(OUT).unwrap().lines().collect::<Vec<_>>(),
        OUTPUT
    );
}

#[test]
fn ps_gets_its_argument_from_the_shell() {
    let ps = ("ps", "[ $# = 1 ] && [ $1 = -aux ] && echo python");
    let end = Run::start("ps", "exec \"$0\"", &[ps, GREP, LS, PING]).end();
    assert_eq!(end.lines, OUTPUT);
}

#[test]
fn a_missing_program_is_named() {
    let end = Run::start("no-ping", "exec \"$0\"", &[PS, GREP, LS]).end();
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    assert_eq!(end.lines, OUTPUT[..4], "what came before stands");
    assert_eq!(
        end.errors,
        "Error: run ping: No such file or directory (os error 2)\n"
    );
    let end = Run::start("no-ls", "exec \"$0\"", &[PS, GREP, PING]).end();
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    assert_eq!(end.lines, OUTPUT[..2], "what came before stands");
    assert_eq!(
        end.errors,
        "Error: run ls: No such file or directory (os error 2)\n"
    );
}

#[test]
#[cfg(target_os = "linux")]
fn the_parent_waits_for_ping() {
    let ping = ("ping", "echo waits; read -r line; echo $line");
    let mut run = Run::start("wait", "exec \"$0\"", &[PS, GREP, LS, ping]);
    while run.line().expect("a line of ping's") != "waits" {}
    let stat = format!("/proc/{}/stat", run.parent.id());
    let state = || {
        fs::read_to_string(&stat)
            .unwrap()
            .rsplit(") ")
            .next()
            .unwrap()
            .chars()
            .next()
    };
    while state() != Some('S') {
        assert_ne!(state(), Some('Z'), "the parent ended before ping");
        thread::sleep(Duration::from_millis(1));
    }
    writeln!(run.parent.stdin.as_ref().unwrap(), "goes on").unwrap();
    let end = run.end();
    assert!(end.status.success(), "{end:?}");
    assert_eq!(end.lines, ["goes on"]);
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_no_success() {
    let end = Run::start("full", "exec \"$0\" > /dev/full", &[PS, GREP, LS, PING]).end();
    assert!(!end.status.success(), "{end:?}");
}

/// A file for a run's output, which its shell knows as `$OUT`.
const OUT: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/subpro-output");

/// Only ends a run that hangs: no result depends on it.
const DEADLINE: Duration = Duration::from_secs(60);

/// Held to write programs, and to fork: a process that is forked while a program is being written
/// has it open too, and a program that somebody has open for writing cannot be run.
static FORK: Mutex<()> = Mutex::new(());

/// A run of the demo, in a process group of its own; one that hangs is killed and fails its test.
struct Run {
    parent: Child,
    output: Option<BufReader<ChildStdout>>,
    over: Sender<()>,
    watchdog: JoinHandle<bool>,
}

/// How a run ended.
#[derive(Debug)]
struct End {
    lines: Vec<String>,
    errors: String,
    status: ExitStatus,
}

impl Run {
    /// Runs a shell script that turns into the demo by `exec "$0"`, with nothing but `programs`
    /// on its path, in a directory of the given name.
    fn start(name: &str, script: &str, programs: &[(&str, &str)]) -> Run {
        let _fork = FORK.lock();
        let path = format!("{}/subpro-{name}", env!("CARGO_TARGET_TMPDIR"));
        let _ = fs::remove_dir_all(&path); // an earlier run's
        fs::create_dir(&path).unwrap();
        for (program, lines) in programs {
            let program = format!("{path}/{program}");
            fs::write(&program, format!("#!/bin/sh\n{lines}\n")).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let mut parent = Command::new("/bin/sh")
            .args(["-c", script, env!("CARGO_BIN_EXE_subpro")])
            .env("PATH", path)
            .env("OUT", OUT)
            .env("RUST_BACKTRACE", "0")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = parent.stdout.take().map(BufReader::new);
        let group = parent.id();
        let (over, watched) = mpsc::channel();
        let watchdog = thread::spawn(move || {
            let over = watched.recv_timeout(DEADLINE);
            if over.is_err() {
                let _fork = FORK.lock();
                let kill = format!("kill -KILL -{group}"); // it hangs, or the test has failed
                let _ = Command::new("/bin/sh").args(["-c", &kill]).status();
            }
            over == Err(RecvTimeoutError::Timeout)
        });
        Run {
            parent,
            output,
            over,
            watchdog,
        }
    }

    /// The next line of its output; none at the end.
    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        self.output.as_mut()?.read_line(&mut line).unwrap();
        assert!(
            line.is_empty() || line.ends_with('\n'),
            "half a line: {line}"
        );
        (!line.is_empty()).then(|| line.trim_end().to_string())
    }

    /// Waits until all its processes have ended.
    fn end(mut self) -> End {
        let lines = iter::from_fn(|| self.line()).collect();
        let mut errors = String::new();
        self.parent
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut errors)
            .unwrap();
        let status = self.parent.wait().unwrap();
        let _ = self.over.send(());
        assert!(
            !self.watchdog.join().unwrap(),
            "it hangs: {lines:?} {errors}"
        );
        End {
            lines,
            errors,
            status,
        }
    }
}
