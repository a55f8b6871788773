//! Runs the demo from outside, and holds it against the tutorial's 二、multiprocessing.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{fs, iter};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
#[cfg(target_os = "linux")]
use {nix::libc, nix::sys::signal::kill, std::io::Write, std::os::fd::AsRawFd};

#[test]
fn the_child_prints_between_start_and_end() {
    let run = Run::start("exec \"$0\"");
    let parent = run.pid();
    let end = run.end();
    assert!(end.status.success(), "{end:?}");
    assert_lines(&end.lines, parent);
}

#[test]
fn each_line_goes_to_a_file_once() {
    let run = Run::start("exec \"$0\" > \"$OUT\"");
    let parent = run.pid();
    let end = run.end();
    assert!(end.status.success(), "{end:?}");
    let lines: Vec<String> = fs::read_to_string(OUT)
        .unwrap()
        .lines()
        .map(String::from)
        .collect();
    assert_lines(&lines, parent);
}

/// Asserts that the four lines are there in order, the third from a child process.
fn assert_lines(lines: &[String], parent: Pid) {
    assert_eq!(lines.len(), 4, "not four lines: {lines:?}");
    assert_eq!(lines[0], format!("Parent process {parent}."));
    assert_eq!(lines[1], "Child process will start.");
    let child = lines[2]
        .strip_prefix("Run child process test (")
        .and_then(|l| l.strip_suffix(")..."));
    let child = child.unwrap_or_else(|| panic!("no line of the child's: {lines:?}"));
    assert_ne!(child, parent.to_string(), "the target ran in the parent");
    assert_eq!(lines[3], "Child process end.");
}

#[test]
#[cfg(target_os = "linux")]
fn the_parent_waits_for_the_child() {
    let (mut run, children) = Run::held(ROOM);
    stop(children[0]);
    let _ = (run.line(), run.line());
    while state(run.pid()) != 'S' {
        assert_ne!(state(run.pid()), 'Z', "the parent ended before the child");
        thread::sleep(Duration::from_millis(1));
    }
    kill(children[0], Signal::SIGCONT).unwrap();
    assert_eq!(
        run.line().unwrap(),
        format!("Run child process test ({})...", children[0])
    );
    assert_eq!(run.line().unwrap(), "Child process end.");
    assert!(run.end().status.success());
}

#[test]
#[cfg(target_os = "linux")]
fn a_child_that_was_killed_is_reported() {
    for signal in [Signal::SIGKILL, Signal::SIGABRT, Signal::SIGTERM] {
        let (run, children) = Run::held(ROOM);
        kill(children[0], signal).unwrap();
        let end = run.end();
        assert_eq!(end.status.code(), Some(1), "{end:?}");
        assert_eq!(
            end.errors,
            format!("Error: process {} was killed by {signal}\n", children[0])
        );
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_child_that_panics_is_reported() {
    let (mut run, children) = Run::held(ROOM);
    run.close(); // so that the child panics as it prints
    let end = run.end();
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    assert!(
        end.errors.contains("panicked"),
        "the panic is not shown: {end:?}"
    );
    let error = format!("Error: process {} exited with status 1\n", children[0]);
    assert!(end.errors.ends_with(&error), "{end:?}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_child_ends_when_the_parent_was_killed() {
    let (run, _) = Run::held(ROOM);
    run.kill_parent();
    let end = run.end();
    assert_eq!(end.errors, "");
}

/// Enough for the parent's first two lines, and too little for the child's after them.
#[cfg(target_os = "linux")]
const ROOM: u64 = 50;

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_no_success() {
    let end = Run::start("exec \"$0\" > /dev/full").end();
    assert!(!end.status.success(), "{end:?}");
}

/// A file for a run's output, which its shell knows as `$OUT`.
const OUT: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/multipro-output");

/// Only ends a run that hangs: no result depends on it.
const DEADLINE: Duration = Duration::from_secs(60);

/// Held to start a run, and to close an output: a run that is being started has copies of the
/// outputs of all others, until its shell runs.
static START: Mutex<()> = Mutex::new(());

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
    /// Runs a shell script that turns into the demo by `exec "$0"`.
    fn start(script: &str) -> Run {
        #[cfg(target_os = "linux")] // a child that nobody waited for then shows in `end`
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let _start = START.lock();
        let mut parent = Command::new("/bin/sh")
            .args([
                "-c",
                &format!("echo; {script}"),
                env!("CARGO_BIN_EXE_multipro"),
            ])
            .env("OUT", OUT)
            .env("RUST_BACKTRACE", "0")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(parent.stdout.take().unwrap());
        output.read_line(&mut String::new()).unwrap(); // the shell's `echo`
        let group = Pid::from_raw(parent.id().try_into().unwrap());
        let (over, watched) = mpsc::channel();
        let watchdog = thread::spawn(move || {
            let over = watched.recv_timeout(DEADLINE);
            if over.is_err() {
                let _ = killpg(group, Signal::SIGKILL); // it hangs, or the test has failed
            }
            over == Err(RecvTimeoutError::Timeout)
        });
        Run {
            parent,
            output: Some(output),
            over,
            watchdog,
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.parent.id().try_into().unwrap())
    }

    /// The next line of its output; none at the end.
    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        self.output.as_mut()?.read_line(&mut line).unwrap();
        let text = line.trim_start_matches(' '); // what `held` fills the output with are spaces
        assert!(
            text.is_empty() || text.ends_with('\n'),
            "half a line: {text}"
        );
        (!text.is_empty()).then(|| text.trim_end().to_string())
    }

    /// Closes its output, so that it cannot print any more.
    #[cfg(target_os = "linux")]
    fn close(&mut self) {
        let _start = START.lock();
        self.output = None;
    }

    /// Waits until all its processes have ended, and the parent has reaped its children.
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
        let orphaned = status.signal().is_none() && killpg(self.pid(), None).is_ok();
        let _ = self.over.send(());
        assert!(
            !self.watchdog.join().unwrap(),
            "it hangs: {lines:?} {errors}"
        );
        assert!(
            !orphaned,
            "a child that the parent did not wait for: {lines:?} {errors}"
        );
        End {
            lines,
            errors,
            status,
        }
    }

    /// Kills the parent, and waits until it is dead.
    #[cfg(target_os = "linux")]
    fn kill_parent(&self) {
        kill(self.pid(), Signal::SIGKILL).unwrap();
        while state(self.pid()) != 'Z' {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Makes the pipe of its output as small as it can be, and returns its size.
    #[cfg(target_os = "linux")]
    fn shrink(&self) -> u64 {
        let output = self.output.as_ref().unwrap().get_ref().as_raw_fd();
        // SAFETY: the call gets numbers only; no memory of this process is touched.
        let size = unsafe { libc::fcntl(output, libc::F_SETPIPE_SZ, 1) };
        size.try_into().unwrap()
    }

    /// Runs the demo with an output that has room for `room` bytes and is not read before the next
    /// `line`: whoever prints more waits. Returns the children that the parent has made by then.
    #[cfg(target_os = "linux")]
    fn held(room: u64) -> (Run, Vec<Pid>) {
        let mut run = Run::start("read -r filler; printf \"%${filler}s\"; exec \"$0\"");
        let filler = run.shrink() - room;
        writeln!(run.parent.stdin.take().unwrap(), "{filler}").unwrap();
        let children = format!("/proc/{0}/task/{0}/children", run.pid());
        let children = || fs::read_to_string(&children).unwrap();
        while children().is_empty() || state(run.pid()) != 'S' {
            assert_ne!(state(run.pid()), 'Z', "it ended early");
            thread::sleep(Duration::from_millis(1));
        }
        let children = children();
        let children = children
            .split_whitespace()
            .map(|pid| Pid::from_raw(pid.parse().unwrap()));
        let children = children.collect();
        (run, children)
    }
}

/// What a process does, by Linux's letter for it: T if it is stopped, Z if it has ended.
#[cfg(target_os = "linux")]
fn state(pid: Pid) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or(") Z".to_string());
    stat.rsplit(") ").next().unwrap().chars().next().unwrap()
}

/// Stops a process, unless it has ended, and waits until it has stopped.
#[cfg(target_os = "linux")]
fn stop(pid: Pid) {
    let _ = kill(pid, Signal::SIGSTOP);
    while !['T', 'Z'].contains(&state(pid)) {
        thread::sleep(Duration::from_millis(1));
    }
}
