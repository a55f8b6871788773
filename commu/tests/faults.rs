#![cfg(target_os = "linux")]
//! Damage that is done to the demo from outside, and what must become of it.
//!
//! A test reads the lines of a `Run`, and acts on the one that it has just read: the writer's sleeps
//! leave the time. If a run was over too early for that, `repeat` starts another one. Orphans become
//! children of this process, so `end` finds any that the parent did not wait for. A run that hangs
//! is killed, and `end` says so.

use std::fs;
use std::io::{BufRead, BufReader, Lines};
use std::iter;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::unistd::Pid;

const WRITER: &str = "Process to write: ";
const READER: &str = "Process to read: ";

/// The reader goes on only when the parent has waited for the writer, and for something after that.
#[test]
fn a_slow_reader_gets_every_value() {
    let mut run = Run::start("exec \"$0\"");
    let (writer, reader) = (run.pid(WRITER), run.pid(READER));
    let _ = kill(reader, Signal::SIGSTOP); // or the run is over, and had no slow reader
    poll(|| ['T', 'Z'].contains(&state(reader)));
    poll(|| kill(writer, None).is_err() || state(run.parent) == 'Z');
    poll(|| ['S', 'Z'].contains(&state(run.parent)));
    let _ = kill(reader, Signal::SIGCONT);
    let end = run.end();
    assert!(end.status.success(), "{end:?}");
    assert!(end.got_all(), "a value is lost: {end:?}");
}

/// With SIGTERM blocked, it is to be seen that the parent has sent it.
#[test]
fn the_reader_is_ended_by_sigterm() {
    let mut term = SigSet::empty();
    term.add(Signal::SIGTERM);
    term.thread_block().unwrap(); // the demo inherits it
    let mut run = Run::start("exec \"$0\"");
    term.thread_unblock().unwrap();
    let reader = run.pid(READER);
    let status = || fs::read_to_string(format!("/proc/{reader}/status")).unwrap_or_default();
    let sent = || status().contains("ShdPnd:\t0000000000004000");
    poll(|| sent() || state(reader) == 'Z');
    assert!(sent(), "the reader has ended without SIGTERM");
    kill(reader, Signal::SIGKILL).unwrap();
    let end = run.end();
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    let error = format!("Error: \"process {reader} was killed by SIGKILL\"\n");
    assert_eq!(end.errors, error);
}

#[test]
fn a_reader_that_was_killed_is_reported() {
    end_after_kill(READER, Signal::SIGKILL, READER);
    end_after_kill(READER, Signal::SIGABRT, "Get A");
    end_after_kill(READER, Signal::SIGTERM, "Get B");
    end_after_kill(READER, Signal::SIGKILL, "Get C");
}

#[test]
fn a_writer_that_was_killed_is_reported() {
    end_after_kill(WRITER, Signal::SIGKILL, WRITER);
    end_after_kill(WRITER, Signal::SIGABRT, "Put A");
    end_after_kill(WRITER, Signal::SIGTERM, "Put B");
    end_after_kill(WRITER, Signal::SIGKILL, "Put C");
}

/// Kills a process when a line that begins so has been printed.
fn end_after_kill(process: &str, signal: Signal, line: &str) {
    let (end, pid) = repeat(|| {
        let mut run = Run::start("exec \"$0\"");
        run.until(line);
        let pid = run.pid(process);
        kill(pid, signal).ok()?;
        let end = run.end();
        (!end.status.success()).then_some((end, pid))
    });
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    let error = format!("process {pid} was killed by {signal}");
    assert!(end.errors.contains(&error), "{error}: {end:?}");
}

#[test]
fn a_stopped_reader_does_not_outlive_the_writer_that_was_killed() {
    let end = repeat(|| {
        let mut run = Run::start("exec \"$0\"");
        let (writer, reader) = (run.pid(WRITER), run.pid(READER));
        kill(reader, Signal::SIGSTOP).ok()?;
        poll(|| ['T', 'Z'].contains(&state(reader)));
        kill(writer, Signal::SIGKILL).ok()?;
        let end = run.end();
        (!end.status.success()).then_some(end)
    });
    assert_eq!(end.status.code(), Some(1), "{end:?}");
}

#[test]
fn both_end_when_the_parent_was_killed() {
    let mut run = Run::start("exec \"$0\"");
    run.until("Get A");
    kill(run.parent, Signal::SIGKILL).unwrap();
    let end = run.end();
    assert!(end.got_all(), "a value is lost: {end:?}");
}

#[test]
fn all_end_when_nobody_can_print() {
    let end = Run::start("exec \"$0\" > /dev/full").end();
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    let error = " exited with status 1\"\n"; // the writer, for which the parent waits first
    assert!(end.errors.ends_with(error), "{end:?}");
}

/// Makes attempts until one gives a result.
fn repeat<T>(attempt: impl FnMut() -> Option<T>) -> T {
    let mut attempts = iter::repeat_with(attempt).take(10);
    attempts.find_map(|result| result).expect("one of ten runs")
}

/// A run of the demo, in a process group of its own.
struct Run {
    demo: Child,
    parent: Pid,
    output: Lines<BufReader<ChildStdout>>,
    lines: Vec<String>, // that have been read
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
    /// Runs a shell script that becomes the demo by `exec "$0"`.
    fn start(script: &str) -> Run {
        set_child_subreaper(true).unwrap();
        let mut demo = Command::new("/bin/sh")
            .args(["-c", script, env!("CARGO_BIN_EXE_commu")])
            .env("RUST_BACKTRACE", "0")
            .process_group(0)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(demo.stdout.take().unwrap()).lines();
        let parent = Pid::from_raw(demo.id().try_into().unwrap());
        let (over, watched) = mpsc::channel();
        let watchdog = thread::spawn(move || {
            let hangs = watched.recv_timeout(Duration::from_secs(60)).is_err();
            hangs && killpg(parent, Signal::SIGKILL).is_ok()
        });
        Run {
            demo,
            parent,
            output,
            lines: Vec::new(),
            over,
            watchdog,
        }
    }

    /// Reads on until there is a line that begins so, and returns the rest of it.
    fn until(&mut self, begin: &str) -> String {
        loop {
            let mut lines = self.lines.iter();
            if let Some(rest) = lines.find_map(|line| line.strip_prefix(begin)) {
                return rest.to_string();
            }
            let line = self.output.next().expect(begin);
            self.lines.push(line.unwrap());
        }
    }

    fn pid(&mut self, begin: &str) -> Pid {
        Pid::from_raw(self.until(begin).parse().unwrap())
    }

    /// Waits until all its processes have ended.
    fn end(mut self) -> End {
        self.lines.extend(self.output.map(Result::unwrap));
        let output = self.demo.wait_with_output().unwrap();
        let _ = self.over.send(()); // nobody is there to be told if it hung
        let end = End {
            lines: self.lines,
            errors: String::from_utf8(output.stderr).unwrap(),
            status: output.status,
        };
        assert!(!self.watchdog.join().unwrap(), "it hangs: {end:?}");
        let orphan = end.status.signal().is_none() && killpg(self.parent, None).is_ok();
        assert!(!orphan, "a child that the parent did not wait for: {end:?}");
        end
    }
}

impl End {
    fn got_all(&self) -> bool {
        let got = self.lines.iter().filter(|line| line.starts_with("Get"));
        got.eq(&["A", "B", "C"].map(|value| format!("Get {value} from queue.")))
    }
}

fn poll(condition: impl Fn() -> bool) {
    while !condition() {
        thread::sleep(Duration::from_millis(1));
    }
}

/// What a process does, by Linux's letter for it: S if it sleeps, T if it is stopped, Z if it has
/// ended.
fn state(pid: Pid) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or(") Z".to_string());
    stat.rsplit(") ").next().unwrap().chars().next().unwrap()
}
