//! Runs the demo from outside, and holds it against the tutorial's 五、进程间通信.

use std::io::{self, BufRead, BufReader, Read};
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
use {
    nix::libc,
    nix::sys::signal::{SigSet, kill},
    std::io::Write,
    std::os::fd::AsRawFd,
};

const PUT: [&str; 3] = [
    "Put A to queue...",
    "Put B to queue...",
    "Put C to queue...",
];
const GET: [&str; 3] = [
    "Get A from queue.",
    "Get B from queue.",
    "Get C from queue.",
];

#[test]
fn values_go_in_order_from_one_process_to_another() {
    let run = Run::start("exec \"$0\"");
    let parent = run.pid();
    let end = run.end();
    assert!(end.status.success(), "{end:?}");
    assert_eq!(end.errors, "");
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

/// Asserts that two processes have printed all their lines, each in order.
fn assert_lines(lines: &[String], parent: Pid) {
    assert_eq!(lines.len(), 8, "not eight lines: {lines:?}");
    let of = |begin: &str| {
        lines
            .iter()
            .filter(|l| l.starts_with(begin))
            .collect::<Vec<_>>()
    };
    assert_eq!(of("Put"), PUT);
    assert_eq!(of("Get"), GET);
    let place = |line: &str| lines.iter().position(|l| l == line);
    assert!(
        PUT.iter()
            .zip(GET)
            .all(|(put, get)| place(put) < place(get)),
        "{lines:?}"
    );
    let [write, read] = ["Process to write: ", "Process to read: "].map(|begin| {
        assert_eq!(of(begin).len(), 1, "{lines:?}");
        of(begin)[0].trim_start_matches(begin)
    });
    assert!(
        place(&format!("Process to write: {write}")) < place(PUT[0]),
        "{lines:?}"
    );
    assert!(
        place(&format!("Process to read: {read}")) < place(GET[0]),
        "{lines:?}"
    );
    assert_ne!(write, read, "one process writes and reads");
    assert!(
        ![write, read].contains(&parent.to_string().as_str()),
        "the parent writes or reads"
    );
}

#[test]
#[cfg(target_os = "linux")]
fn a_slow_reader_gets_every_value() {
    let (mut run, writer, reader) = Run::stopped();
    kill(writer, Signal::SIGCONT).unwrap();
    run.until_reaped(writer);
    kill(reader, Signal::SIGCONT).unwrap();
    let lines: Vec<String> = iter::from_fn(|| run.line()).collect();
    assert!(
        lines.ends_with(&GET.map(String::from)),
        "a value is lost: {lines:?}"
    );
    let end = run.end();
    assert!(end.status.success(), "{end:?}");
}

/// With SIGTERM blocked, it is to be seen that the parent has sent it.
#[test]
#[cfg(target_os = "linux")]
fn the_reader_is_ended_by_sigterm() {
    let mut term = SigSet::empty();
    term.add(Signal::SIGTERM);
    term.thread_block().unwrap(); // the demo inherits it
    let (run, _, reader) = Run::stopped();
    term.thread_unblock().unwrap();
    killpg(run.pid(), Signal::SIGCONT).unwrap();
    let status = || fs::read_to_string(format!("/proc/{reader}/status")).unwrap_or_default();
    while !status().contains("ShdPnd:\t0000000000004000") {
        assert_ne!(state(reader), 'Z', "the reader has ended without SIGTERM");
        thread::sleep(Duration::from_millis(1));
    }
    kill(reader, Signal::SIGKILL).unwrap();
    let end = run.end();
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    assert_eq!(
        end.errors,
        format!("Error: process {reader} was killed by SIGKILL\n")
    );
}

#[test]
#[cfg(target_os = "linux")]
fn a_reader_killed_before_the_first_value_is_reported() {
    for signal in [Signal::SIGKILL, Signal::SIGABRT, Signal::SIGTERM] {
        let (run, writer, reader) = Run::stopped();
        kill(reader, signal).unwrap();
        kill(reader, Signal::SIGCONT).unwrap(); // it is stopped, and would stay so
        while state(reader) != 'Z' {
            thread::sleep(Duration::from_millis(1));
        }
        kill(writer, Signal::SIGCONT).unwrap();
        let end = run.end();
        assert_eq!(end.status.code(), Some(1), "{end:?}");
        let reader = format!("Error: process {reader} was killed by {signal}\n");
        let writer = format!("Error: process {writer} exited with status 1\n");
        assert!(end.errors.ends_with(&(reader + &writer)), "{end:?}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_process_killed_between_values_is_reported() {
    for (kills_writer, after) in [
        (true, PUT[0]),
        (true, PUT[1]),
        (false, GET[0]),
        (false, GET[1]),
    ] {
        // A run that is over before it comes to the kill does not count.
        let (end, killed) = iter::repeat_with(|| {
            let (mut run, writer, reader) = Run::stopped();
            killpg(run.pid(), Signal::SIGCONT).unwrap();
            while run.line().expect("a value") != after {}
            let killed = if kills_writer { writer } else { reader };
            let _ = kill(killed, Signal::SIGKILL);
            (run.end(), killed)
        })
        .take(10)
        .find(|(end, _)| !end.status.success())
        .expect("a run fails in which a process was killed");
        assert_eq!(end.status.code(), Some(1), "{end:?}");
        let error = format!("Error: process {killed} was killed by SIGKILL\n");
        assert!(end.errors.contains(&error), "{end:?}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_reader_killed_after_the_last_value_was_put_is_reported() {
    let (run, writer, reader) = Run::stopped();
    kill(writer, Signal::SIGCONT).unwrap();
    run.until_reaped(writer);
    kill(reader, Signal::SIGKILL).unwrap();
    let end = run.end();
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    let error = format!("Error: process {reader} was killed by SIGKILL\n");
    assert!(end.errors.contains(&error), "{end:?}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_writer_killed_before_the_first_value_is_reported() {
    let (run, writer, _) = Run::stopped();
    kill(writer, Signal::SIGKILL).unwrap();
    let end = run.end(); // the reader ends, though it is stopped
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    assert_eq!(
        end.errors,
        format!("Error: process {writer} was killed by SIGKILL\n")
    );
}

#[test]
#[cfg(target_os = "linux")]
fn both_end_when_the_parent_was_killed() {
    let (run, _, _) = Run::stopped();
    run.kill_parent();
    killpg(run.pid(), Signal::SIGCONT).unwrap();
    let lines = run.end().lines;
    assert!(
        GET.iter().all(|get| lines.contains(&get.to_string())),
        "a value is lost: {lines:?}"
    );
}

#[test]
#[cfg(target_os = "linux")]
fn all_end_when_nobody_can_print() {
    let (mut run, _, _) = Run::stopped();
    run.close();
    killpg(run.pid(), Signal::SIGCONT).unwrap();
    assert_eq!(run.end().status.code(), Some(1));
    assert_eq!(
        Run::start("exec \"$0\" > /dev/full").end().status.code(),
        Some(1)
    );
}

/// A file for a run's output, which its shell knows as `$OUT`.
const OUT: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/commu-output");

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
                env!("CARGO_BIN_EXE_commu"),
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

    /// Runs the demo with its writer and its reader stopped before they print anything.
    #[cfg(target_os = "linux")]
    fn stopped() -> (Run, Pid, Pid) {
        let (mut run, children) = Run::held(0);
        for &child in &children {
            stop(child);
        }
        let size = run.shrink(); // what fills the output is read, for room for what they will print
        io::copy(
            &mut run.output.as_mut().unwrap().take(size),
            &mut io::sink(),
        )
        .unwrap();
        (run, children[0], children[1])
    }

    /// Waits until the parent has waited for a child.
    #[cfg(target_os = "linux")]
    fn until_reaped(&self, child: Pid) {
        while kill(child, None).is_ok() {
            assert_ne!(state(self.pid()), 'Z', "the parent ended early");
            thread::sleep(Duration::from_millis(1));
        }
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
