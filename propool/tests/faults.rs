#![cfg(target_os = "linux")]
//! Damage that is done to the demo from outside, and what must become of it.
//!
//! A test reads the lines of a `Run`, and acts when all workers have said that they run a task: they
//! sleep then. If one of them was done too early for the test, `repeat` starts another run. Orphans
//! become children of this process, so `end` finds any that the parent did not wait for. A run that
//! hangs is killed, and `end` says so.

use std::fs;
use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::iter;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{self, Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

#[test]
fn four_workers_share_out_all_tasks() {
    let (mut run, workers) = Run::in_tasks();
    for child in run.children() {
        assert!(workers.contains(&child), "a fifth worker");
    }
    let last = iter::from_fn(|| run.line()).find(|line| line.starts_with("Run"));
    assert!(workers.contains(&worker(&last.expect("a fifth task"))));
    let end = run.end();
    assert!(end.status.success(), "{end:?}");
}

/// Tasks that were dealt out beforehand would wait for one of the workers.
#[test]
fn a_task_goes_to_a_worker_that_is_free() {
    for run in [0, 1, 2, 3].map(|task| thread::spawn(move || held(task))) {
        run.join().expect("the others do the rest");
    }
}

#[test]
fn the_time_of_a_task_is_measured() {
    let seconds = held(0);
    assert!(seconds >= 3.1, "{seconds} is the time that was drawn");
}

/// Stops the worker of a task until the others have done all the rest, and no sleep would last so
/// long. Returns how many seconds that task runs, as it says.
fn held(task: usize) -> f64 {
    let begin = format!("Task {task} runs ");
    repeat(|| {
        let (mut run, workers) = Run::in_tasks();
        poll(|| ['S', 'Z'].contains(&state(workers[task]))); // it has said so before it sleeps
        kill(workers[task], Signal::SIGSTOP).ok()?;
        let stopped = Instant::now();
        for _ in 0..4 {
            let ended = iter::from_fn(|| run.line()).find(|line| line.starts_with("Task"));
            if ended.expect("a task that ends").starts_with(&begin) {
                return None;
            }
        }
        thread::sleep(Duration::from_millis(3150).saturating_sub(stopped.elapsed()));
        kill(workers[task], Signal::SIGCONT).unwrap();
        let end = run.end();
        assert!(end.status.success(), "{end:?}");
        let line = end.lines.iter().find(|line| line.starts_with(&begin))?;
        line.split(' ').nth(3)?.parse().ok()
    })
}

#[test]
fn a_worker_that_was_killed_is_reported_and_the_others_go_on() {
    let (end, worker) = repeat(|| {
        let (run, workers) = Run::in_tasks();
        kill(workers[1], Signal::SIGABRT).ok()?;
        let end = run.end();
        let idle = end.lines.iter().any(|line| line.starts_with("Task 1 runs"));
        (!idle).then_some((end, workers[1]))
    });
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    let error = format!("Error: \"worker {worker} was killed by SIGABRT\"\n");
    assert_eq!(end.errors, error);
    let ended = end.lines.iter().filter(|line| line.starts_with("Task"));
    assert!(ended.count() >= 4, "the others do the rest: {end:?}");
    assert!(!end.lines.contains(&"All subprocesses done.".to_string()));
}

#[test]
fn all_workers_that_were_killed_are_reported() {
    let (end, workers) = repeat(|| {
        let (run, workers) = Run::in_tasks();
        for worker in workers {
            kill(worker, Signal::SIGKILL).ok()?;
        }
        let end = run.end();
        let idle = end.lines.iter().any(|line| line.starts_with("Task"));
        (!idle).then_some((end, workers))
    });
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    for worker in workers {
        let error = format!("worker {worker} was killed by SIGKILL");
        assert!(end.errors.contains(&error), "{error}: {end:?}");
    }
}

/// When nobody reads the output any more, each of the five tasks panics as it prints.
#[test]
fn a_worker_outlives_a_task_that_panics() {
    let (end, workers) = repeat(|| {
        let (mut run, workers) = Run::in_tasks();
        run.lines = None;
        let end = run.end();
        (end.errors.matches("panicked").count() == 5).then_some((end, workers))
    });
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    for worker in workers {
        let error = format!("worker {worker} exited with status 1");
        assert!(end.errors.contains(&error), "{error}: {end:?}");
    }
}

/// The output has room for all first lines, and for a part of the line of the first task that ends.
/// That one panics, and its worker waits to show it, as standard error is full. Then there is room
/// for the rest again.
#[test]
fn a_task_that_panics_is_reported_and_loses_nothing() {
    let file = concat!(env!("CARGO_TARGET_TMPDIR"), "/propool-reported");
    let (end, error) = repeat(|| {
        let digits = process::id().to_string().len(); // as the demo's process ids have, mostly
        let room = "Parent process .\nWaiting for all subprocesses done...\nTask 0 run".len()
            + 4 * "Run task 0 ()...\n".len()
            + 5 * digits;
        fs::write(file, vec![b'\n'; 512 - room]).unwrap();
        let (mut errors, full) = UnixStream::pair().unwrap();
        full.set_nonblocking(true).unwrap();
        while (&full).write(b" ").is_ok() {}
        full.set_nonblocking(false).unwrap();
        let run = Run::start(LIMITED, file, OwnedFd::from(full).into());
        poll(|| fs::metadata(file).unwrap().len() == 512 || state(run.parent) == 'Z');
        for child in run.children() {
            poll(|| ['S', 'Z'].contains(&state(child)));
        }
        fs::write(file, "").unwrap();
        let mut error = String::new();
        errors.read_to_string(&mut error).unwrap();
        let end = run.end();
        let rest = fs::read_to_string(file).unwrap();
        let all =
            rest.matches(" seconds.\n").count() == 5 && error.matches("panicked").count() == 1;
        all.then_some((end, error))
    });
    assert_eq!(end.status.code(), Some(1), "{error}");
    assert!(error.contains("Error: \"worker "), "{error}");
    assert!(error.ends_with(" exited with status 1\"\n"), "{error}");
}

#[test]
fn the_workers_end_quietly_and_take_no_task_when_the_parent_was_killed() {
    let end = repeat(|| {
        let (mut run, _) = Run::in_tasks();
        run.demo.kill().unwrap();
        run.demo.wait().unwrap();
        let end = run.end();
        let taken = end.lines.iter().any(|line| line.starts_with("Run"));
        (!taken).then_some(end)
    });
    assert_eq!(end.errors, "");
}

/// The output goes to a file that `ulimit -f` limits to 512 bytes, and there is room left for the
/// parent's first line alone.
#[test]
fn no_worker_is_left_when_the_parent_panics() {
    let file = concat!(env!("CARGO_TARGET_TMPDIR"), "/propool-panics");
    fs::write(file, [b'\n'; 512 - "Parent process 1234567.\n".len()]).unwrap();
    let end = Run::start(LIMITED, file, Stdio::piped()).end();
    assert_eq!(end.status.code(), Some(101), "{end:?}");
}

/// Lets the demo print into a file until there are 512 bytes.
const LIMITED: &str = "trap '' XFSZ; ulimit -f 1; exec \"$0\" >> \"$1\"";

/// Makes attempts until one gives a result.
fn repeat<T>(attempt: impl FnMut() -> Option<T>) -> T {
    let mut attempts = iter::repeat_with(attempt).take(10);
    attempts.find_map(|result| result).expect("one of ten runs")
}

/// A run of the demo, in a process group of its own.
struct Run {
    demo: Child,
    parent: Pid,
    lines: Option<Lines<BufReader<ChildStdout>>>,
    over: Sender<()>,
    watchdog: JoinHandle<bool>,
}

/// How a run ended.
#[derive(Debug)]
struct End {
    lines: Vec<String>, // that had not been read
    errors: String,
    status: ExitStatus,
}

impl Run {
    /// Runs a shell script that becomes the demo by `exec "$0"`, and knows the file as `$1`.
    fn start(script: &str, file: &str, stderr: Stdio) -> Run {
        set_child_subreaper(true).unwrap();
        let mut demo = Command::new("/bin/sh")
            .args(["-c", script, env!("CARGO_BIN_EXE_propool"), file])
            .env("RUST_BACKTRACE", "0")
            .process_group(0)
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let lines = demo
            .stdout
            .take()
            .map(|output| BufReader::new(output).lines());
        let parent = Pid::from_raw(demo.id().try_into().unwrap());
        let (over, watched) = mpsc::channel();
        let watchdog = thread::spawn(move || {
            let hangs = watched.recv_timeout(Duration::from_secs(60)).is_err();
            hangs && killpg(parent, Signal::SIGKILL).is_ok()
        });
        Run {
            demo,
            parent,
            lines,
            over,
            watchdog,
        }
    }

    /// A run in which each of four workers runs a task, and the workers in the order of the tasks.
    fn in_tasks() -> (Run, [Pid; 4]) {
        repeat(|| {
            let mut run = Run::start("exec \"$0\"", "", Stdio::piped());
            let mut lines: Vec<String> = iter::from_fn(|| run.line()).take(6).collect();
            lines.retain(|line| line.starts_with("Run task "));
            lines.sort();
            let workers: Vec<Pid> = lines.iter().map(|line| worker(line)).collect();
            Some((run, workers.try_into().ok()?)) // four, or else a task has ended already
        })
    }

    fn children(&self) -> Vec<Pid> {
        let children = format!("/proc/{0}/task/{0}/children", self.parent);
        let children = fs::read_to_string(children).unwrap();
        let pids = children.split_whitespace().map(|pid| pid.parse().unwrap());
        pids.map(Pid::from_raw).collect()
    }

    /// The next line of its output; none at the end.
    fn line(&mut self) -> Option<String> {
        self.lines.as_mut()?.next().map(Result::unwrap)
    }

    /// Waits until all its processes have ended.
    fn end(mut self) -> End {
        let lines = iter::from_fn(|| self.line()).collect();
        let output = self.demo.wait_with_output().unwrap();
        let _ = self.over.send(()); // nobody is there to be told if it hung
        let end = End {
            lines,
            errors: String::from_utf8(output.stderr).unwrap(),
            status: output.status,
        };
        assert!(!self.watchdog.join().unwrap(), "it hangs: {end:?}");
        let orphan = end.status.signal().is_none() && killpg(self.parent, None).is_ok();
        assert!(!orphan, "a child that the parent did not wait for: {end:?}");
        end
    }
}

/// The process that a line names in brackets.
fn worker(line: &str) -> Pid {
    let pid = line.split(['(', ')']).nth(1).expect(line);
    Pid::from_raw(pid.parse().expect(line))
}

fn poll(condition: impl Fn() -> bool) {
    while !condition() {
        thread::sleep(Duration::from_millis(1));
    }
}

/// What a process does, by Linux's letter for it: S if it sleeps, Z if it has ended.
fn state(pid: Pid) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or(") Z".to_string());
    stat.rsplit(") ").next().unwrap().chars().next().unwrap()
}
